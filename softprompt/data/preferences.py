"""Examples of preferences: an input with a chosen and a rejected answer."""

import dataclasses
from collections.abc import Iterable, Iterator

from softprompt.data.datasets import dataset_of
from softprompt.data.encoding import record_batches
from softprompt.data.examples import Dataset, Example
from softprompt.data.records import Record, Rows
from softprompt.data.task import Task
from softprompt.runtime.progress import Progress, silent


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

    def encode(rows: Iterable[Record]) -> Iterator[Example]:
        for batch in record_batches(rows):
            swapped = [_swapped(record) for record in batch]
            for pair in zip(task.examples(batch), task.examples(swapped), strict=True):
                yield _joined(*pair)

    return dataset_of(task, encode, records, split, progress, kind="pairs")


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
