"""Datasets of examples, made from records."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from softprompt.data.examples import Dataset, Example, Examples
from softprompt.data.records import Record, Records, Rows, as_records
from softprompt.data.stored_examples import NumberedExamples, stored_examples
from softprompt.data.task import Task
from softprompt.runtime.bars import bars_in_notebooks
from softprompt.runtime.progress import Progress

_log = logging.getLogger(__name__)

Encode = Callable[[Iterable[Record]], Iterator[Example]]
"""Encodes records in order. A record may become several examples."""


def make_examples(
    task: Task, records: Rows, split: str = "data", progress: Progress = bars_in_notebooks
) -> Dataset:
    """Encode records as examples, with their answers; log how many were truncated.

    The examples of stored records are stored too; see `read_stored`. Others are kept in memory.

    Args:
      task: the compiled template.
      records: a sequence of records or of mappings, such as dictionaries.
      split: the name of the records in messages and in the progress bar.
      progress: shows how many records are done.

    Raises:
      UserError: if a record does not fit the template; see `Task.example`.

    Examples:
      >>> base = load_base("smollm2-135m-instruct")
      >>> verbalizer = {"positive": " positive", "negative": " negative"}
      >>> task = make_task(base, TemplateSettings(input="{text}"), verbalizer, virtual_tokens=5)
      >>> records = [{"text": "A joy.", "label": "positive"}] * 2
      >>> examples = make_examples(task, records)
      >>> examples
      Examples(2 examples)
      >>> examples[0]
      Example(3 tokens, 2 candidates)
      >>> examples[0].candidates[examples[0].answer] == base.tokenizer(" positive").input_ids
      True
    """
    return dataset_of(task, task.examples, records, split, progress)


def dataset_of(
    task: Task,
    encode: Encode,
    records: Rows,
    split: str,
    progress: Progress,
    kind: str = "examples",
) -> Dataset:
    """Encode records with a function; see `make_examples`.

    Args:
      task: the task that the function uses.
      encode: encodes the records.
      records, split, progress: see `make_examples`.
      kind: what the function makes, for messages and for the key of a store.
    """
    rows = as_records(records)
    encoded = _numbered(encode, rows, split, progress)
    examples: Dataset
    if rows.digest is None:
        examples = Examples(example for _, example in encoded)
    else:
        try:
            examples = stored_examples(task, rows, encoded, kind)
        except OSError as error:
            _log.warning(f"{split}: kept in memory, because it cannot be stored ({error})")
            encoded = _numbered(encode, rows, split, progress)
            examples = Examples(example for _, example in encoded)
    _log.info(f"{split}: {len(examples)} {kind}")
    log_truncated(examples.truncated, task, split)
    return examples


def _numbered(encode: Encode, records: Records, split: str, progress: Progress) -> NumberedExamples:
    """Yield the examples of records, each with the number of its record."""
    waiting: deque[tuple[int, Record]] = deque()  # records since the one of the last example

    def read() -> Iterator[Record]:
        for number, record in enumerate(records):
            waiting.append((number, record))
            yield record

    with progress(f"tokenize {split}", len(records), "examples") as bar:
        done = -1
        for example in encode(read()):
            while waiting[0][1] is not example.record:
                waiting.popleft()
            number = waiting[0][0]
            if number > done:
                bar.advance()
            done = number
            yield number, example


def log_truncated(count: int, task: Task, split: str) -> None:
    """Log how many inputs were truncated, if any were."""
    if count:
        if task.template.messages:
            where = "without their first turns"
        else:
            where = "at the end of their longest field"
        _log.info(f"{split}: {count} truncated to {task.max_tokens} tokens, {where}")
