"""Examples: what is read and what may follow, as token ids."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from softprompt.data.records import Record
from softprompt.runtime.progress import Progress, silent

_log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from softprompt.data.task import Task


@dataclasses.dataclass(frozen=True)
class Example:
    """One input and its possible continuations, as token ids.

    Attributes:
      input: ids of what the model reads, at least one.
      candidates: ids of each continuation: one for each label, or the one target.
      answer: which candidate is the right one; None if that is not known.
      record: what it was made from.
      truncated: whether the input was cut.
    """

    input: Sequence[int]
    candidates: Sequence[Sequence[int]]
    answer: int | None
    record: Record
    truncated: bool


def make_examples(
    task: "Task", records: Sequence[Record], split: str, progress: Progress = silent
) -> list[Example]:
    """An example of every record, under a progress bar; says how many were cut."""
    examples = []
    with progress(f"tokenise {split}", len(records), "examples") as bar:
        for record in records:
            examples.append(task.example(record))
            bar.advance()
    _log.info(f"{split}: {len(examples)} examples")
    say_truncated(examples, task, split)
    return examples


def examples_digest(splits: Mapping[str, Sequence[Example]]) -> str:
    """SHA-256 of all that training and evaluation read of the examples."""
    digest = hashlib.sha256()
    for split, examples in splits.items():
        for example in examples:
            content = [
                split,
                list(example.input),
                list(map(list, example.candidates)),
                example.answer,
            ]
            digest.update(json.dumps(content).encode())
    return digest.hexdigest()


def say_truncated(examples: Sequence[Example], task: "Task", split: str) -> None:
    """Say how many inputs were cut, if any were."""
    if cut := sum(example.truncated for example in examples):
        _log.info(
            f"{split}: {cut} cut to {task.max_tokens} tokens, at the end of their longest field"
        )
