"""Examples of preferences: an input with a chosen and a rejected answer."""

import dataclasses
import logging
from collections.abc import Iterator

from softprompt.data.datasets import log_truncated
from softprompt.data.encoding import record_batches
from softprompt.data.examples import Dataset, Example, Examples
from softprompt.data.records import Record, Rows, as_records
from softprompt.data.task import Task
from softprompt.runtime.progress import Progress, silent

_log = logging.getLogger(__name__)


def preference_examples(
    task: Task, records: Rows, split: str = "data", progress: Progress = silent
) -> Dataset:
    """Encode records as examples with two candidates: the chosen answer, then the rejected one.

    Args:
      task: the compiled template. Its target has the field `chosen`.
      records: records with `chosen` and `rejected`, and the fields of the input.
      split: the name of the records in messages and in the progress bar.
      progress: shows how many records are done.

    Raises:
      UserError: if a record lacks a field, or does not fit; see `Task.example`.
    """

    def encoded() -> Iterator[Example]:
        with progress(f"tokenize {split}", len(records), "examples") as bar:
            for batch in record_batches(as_records(records)):
                swapped = [_swapped(record) for record in batch]
                for pair in zip(task.examples(batch), task.examples(swapped), strict=True):
                    yield _joined(*pair)
                    bar.advance()

    examples = Examples(encoded())
    _log.info(f"{split}: {len(examples)} pairs")
    log_truncated(examples.truncated, task, split)
    return examples


def _swapped(record: Record) -> Record:
    """Return the record with the rejected answer in place of the chosen one."""
    return Record({**record.fields, "chosen": record.text("rejected")}, record.where)


def _joined(chosen: Example, rejected: Example) -> Example:
    """Return one example with both answers. The longer one limits the length of the input."""
    shorter = min(chosen, rejected, key=lambda example: len(example.input))
    return dataclasses.replace(
        shorter,
        candidates=[chosen.candidates[0], rejected.candidates[0]],
        answer=0,
        record=chosen.record,
    )
