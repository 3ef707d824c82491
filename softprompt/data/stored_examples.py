"""Examples of stored records. They are tokenized once, kept in a store, and read by their numbers.

Axis letters: N examples.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydantic

from softprompt.backbones.formats.tokenizer import plain_backend
from softprompt.data.examples import Dataset, Example, Summary, from_counts
from softprompt.data.records import Record, Records
from softprompt.data.row_file import RowFile, RowWriter
from softprompt.data.store import open_store, store_key
from softprompt.data.task import Task
from softprompt.errors import UserError
from softprompt.files.json_files import checked

_ROWS, _COUNTS = "examples.array_record", "counts.npy"
_READ_TOGETHER = 512  # examples, in a pass over all of them

NumberedExamples = Iterable[tuple[int, Example]]
"""Examples in order, each with the number of its record."""


class _About(pydantic.BaseModel):
    digest: str
    truncated: int


class StoredExamples(Dataset):
    """Examples that are read from a store on access, with their records.

    Args:
      folder: the folder of the store.
      about: what `write` returned, see `open_store`.
      records: the records of the examples.
      ids: the ids that tokens can have.

    Raises:
      UserError: if the store does not hold examples.
    """

    def __init__(self, folder: Path, about: dict[str, Any], records: Records, ids: range):
        described = checked(_About, about, str(folder))
        self.digest, self.truncated = described.digest, described.truncated
        self._folder, self._records, self._ids = folder, records, ids
        self._file = RowFile(folder / _ROWS)
        counts = np.load(folder / _COUNTS, allow_pickle=False)
        if counts.shape != (7, len(self._file)) or counts.dtype != np.int32:
            raise self._damaged(f"{len(self._file)} rows, and counts {counts.shape}")
        self.lengths, self.answers = from_counts(counts)

    def __len__(self) -> int:
        return len(self._file)

    def example(self, number: int) -> Example:
        row = self._checked(number, self._file.row(number))
        return _example(row, self._records.record(row[0]))

    def __iter__(self) -> Iterator[Example]:
        for first in range(0, len(self), _READ_TOGETHER):
            numbers = range(first, min(first + _READ_TOGETHER, len(self)))
            rows = list(map(self._checked, numbers, self._file.rows(numbers)))
            yield from map(_example, rows, self._records.records([row[0] for row in rows]))

    def _checked(self, number: int, row: Any) -> Any:
        """Check the row of an example, because its lengths decide where it is put in a batch."""
        try:
            source, tokens, candidates, answer, _, earlier = row
            spans = sum(stop - start for start, stop in earlier)
            counted = len(tokens), sum(map(len, candidates)) + spans, len(candidates), spans
            lengths = self.lengths
            expected = lengths.input, lengths.targets, lengths.candidates, lengths.earlier
            valid = (
                all(
                    count == of_all[number] for count, of_all in zip(counted, expected, strict=True)
                )
                and all(all(map(self._ids.__contains__, ids)) for ids in (tokens, *candidates))
                and all(0 <= start < stop <= len(tokens) for start, stop in earlier)
                and self.answers[number] == (-1 if answer is None else answer)
                and source in range(len(self._records))
            )
        except (TypeError, ValueError):
            valid = False
        if not valid:
            raise self._damaged(f"example {number}")
        return row

    def _damaged(self, how: str) -> UserError:
        return UserError(f"{self._folder}: is damaged ({how}); delete it, and start again")


def _example(row: Any, record: Record) -> Example:
    _, tokens, candidates, answer, truncated, earlier = row
    return Example(tokens, candidates, answer, record, truncated, tuple(map(tuple, earlier)))


def stored_examples(
    task: Task, records: Records, examples: NumberedExamples, kind: str
) -> StoredExamples:
    """Return the examples of records from a store. Write the store first if it is absent.

    Args:
      task: the task that encodes the records.
      records: records with a digest.
      examples: the examples. They are only iterated over if the store is absent.
      kind: the kind of the examples, because a task can make several kinds.

    Raises:
      OSError: if the store cannot be written.
    """

    def write(folder: Path) -> dict[str, Any]:
        summary = Summary()
        with RowWriter(folder / _ROWS) as writer:
            for source, each in examples:
                tokens, candidates = list(each.input), list(map(list, each.candidates))
                earlier = list(map(list, each.earlier))
                writer.write([source, tokens, candidates, each.answer, each.truncated, earlier])
                summary.add(each)
        np.save(folder / _COUNTS, summary.counts(), allow_pickle=False)
        return {"digest": summary.digest, "truncated": summary.truncated}

    virtual = task.virtual_tokens * max(1, len(task.tasks)) if None in task.pieces else 0
    folder, about = open_store(_key(task, records, virtual, kind), write)
    ids = range(-virtual, task.base.backbone.arch.vocab_size)
    return StoredExamples(folder, about, records, ids)


def _key(task: Task, records: Records, virtual: int, kind: str) -> str:
    """Return a key that depends on everything that decides the tokens of a row.

    The opening is not part of a row.
    """
    tokenizer, backbone = task.base.tokenizer, task.base.backbone
    text = plain_backend(tokenizer).to_str()
    return store_key(
        kind,
        records.digest,
        [hashlib.sha256(text.encode()).hexdigest(), tokenizer.chat_template],
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        [backbone.arch.vocab_size, backbone.separate_targets],
        task.template.model_dump(mode="json"),
        list((task.verbalizer or {}).items()),
        list(task.pieces),
        [task.max_tokens, virtual, list(task.tasks), task.task_field],
    )
