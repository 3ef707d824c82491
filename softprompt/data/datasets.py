"""Datasets of examples, made from records."""

import logging
from collections.abc import Iterator

from softprompt.data.examples import Dataset, Example, Examples
from softprompt.data.records import Rows, as_records
from softprompt.data.task import Task
from softprompt.runtime.bars import bars_in_notebooks
from softprompt.runtime.progress import Progress

_log = logging.getLogger(__name__)


def make_examples(
    task: Task, records: Rows, split: str = "data", progress: Progress = bars_in_notebooks
) -> Dataset:
    """Encode records as examples, with their answers; log how many were truncated.

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

    def encoded() -> Iterator[Example]:
        with progress(f"tokenize {split}", len(records), "examples") as bar:
            last = None
            for example in task.examples(as_records(records)):
                yield example
                if example.record is not last:  # a record may become several examples
                    bar.advance()
                last = example.record

    examples = Examples(encoded())
    _log.info(f"{split}: {len(examples)} examples")
    log_truncated(examples.truncated, task, split)
    return examples


def log_truncated(count: int, task: Task, split: str) -> None:
    """Log how many inputs were truncated, if any were."""
    if count:
        if task.template.messages:
            where = "without their first turns"
        else:
            where = "at the end of their longest field"
        _log.info(f"{split}: {count} truncated to {task.max_tokens} tokens, {where}")
