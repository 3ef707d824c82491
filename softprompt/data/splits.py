"""The splits of an experiment: read from their sources, or taken as shares of the training data.

Axis letters: N records.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from softprompt.data.records import Part, Record, Records, Rows, as_records, read_records
from softprompt.data.row_file import as_text
from softprompt.data.sources import MissingData, Source
from softprompt.data.store import open_store, store_key
from softprompt.data.stored_records import read_stored
from softprompt.errors import UserError, reason_of
from softprompt.experiment.data_settings import DataSettings
from softprompt.experiment.reading import SPLIT_ADVICE
from softprompt.experiment.schema import Experiment
from softprompt.runtime.progress import Progress, silent

_ADVICE = {"validation": SPLIT_ADVICE, "test": "for a run without test data, set data.test=null"}
_DIGESTS = "digests.npy"

_encode = json.JSONEncoder(sort_keys=True, default=as_text).encode


@dataclasses.dataclass(frozen=True)
class _Divided:
    """Training data that was divided, and how."""

    records: Sequence[Record]
    shares: Mapping[str, float]
    seed: int
    parts: Mapping[str, Sequence[Record]]


class SplitReader:
    """Reads the splits of experiments one after another, and keeps the splits that it read last.

    Args:
      progress: shows how many records of large files have been read.
    """

    def __init__(self, progress: Progress = silent) -> None:
        self._progress = progress
        self._records: dict[str | tuple[str, ...], Sequence[Record]] = {}
        self._divided: _Divided | None = None

    def read(
        self, experiment: Experiment, given: Mapping[str, Rows]
    ) -> dict[str, Sequence[Record]]:
        """Read the records of each split, in the order of the section `data`.

        The same data gives the same object as in the last call.

        Args:
          experiment: the experiment.
          given: by split, rows that replace what the experiment names.

        Raises:
          UserError: if data is missing or cannot be read, or a share of it has no record.
        """
        data = experiment.data
        names = DataSettings.model_fields
        if unknown := given.keys() - names.keys():
            raise UserError(f"records: {min(unknown)!r} is not one of {', '.join(names)}")
        sources = {split: source for split, source in data.sources.items() if split not in given}
        shares = {split: share for split, share in data.shares.items() if split not in given}
        self._records = {
            _key(source): self._records.get(_key(source)) or _read(source, split, self._progress)
            for split, source in sources.items()
        }
        splits = {split: self._records[_key(source)] for split, source in sources.items()}
        for split, rows in given.items():
            name = f"{split} row"
            splits[split] = read_records(as_records(rows, name), name)
        if shares:
            splits |= self._divide(splits["train"], shares, experiment.seed)
        return {split: splits[split] for split in names if split in splits}

    def _divide(
        self, records: Sequence[Record], shares: Mapping[str, float], seed: int
    ) -> Mapping[str, Sequence[Record]]:
        last = self._divided
        if not (last and last.records is records and (last.shares, last.seed) == (shares, seed)):
            last = _Divided(records, shares, seed, divide(records, shares, seed))
            self._divided = last
        return last.parts


def read_split(experiment: Experiment, split: str, progress: Progress = silent) -> Sequence[Record]:
    """Read the records of one split that the experiment has.

    Raises:
      UserError: if the data is missing or cannot be read.
    """
    data = experiment.data
    if split in data.shares or (split == "train" and data.shares):
        return divide(_read(data.train, "train", progress), data.shares, experiment.seed)[split]
    return _read(data.sources[split], split, progress)


def divide(
    records: Sequence[Record], shares: Mapping[str, float], seed: int
) -> dict[str, Sequence[Record]]:
    """Take shares of the training data for other splits.

    The seed and the fields of a record decide its split, so records with the same fields are in
    the same split, and another order of the records gives the same splits. A split has at most
    its share of the records, rounded, and at least one. Its records are in random order, so that
    the first of them are a fair sample. The training data keeps its order.

    Args:
      records: all N records.
      shares: the share of each other split, in (0, 1). The first split is taken first.
      seed: a whole number of 32 bits.

    Returns:
      The records of each split. `train` gets the rest.

    Raises:
      UserError: if a split has no record.
    """
    digests = _digests(as_records(records), seed)
    _, groups, sizes = np.unique(digests, return_inverse=True, return_counts=True)  # random order
    part_of = np.zeros(len(sizes), np.int8)  # 0 for training
    for part, share in enumerate(shares.values(), 1):
        wanted = max(1, round(share * len(records)))
        for group in np.flatnonzero(part_of == 0):
            if sizes[group] <= wanted:
                part_of[group] = part
                wanted -= sizes[group]
            if wanted == 0:
                break
    by_group = np.argsort(groups, kind="stable")
    of_part = {split: by_group[part_of[groups[by_group]] == i] for i, split in enumerate(shares, 1)}
    of_part["train"] = np.flatnonzero(part_of[groups] == 0)
    parts: dict[str, Sequence[Record]] = {
        split: Part(records, numbers) for split, numbers in of_part.items()
    }
    for split, chosen in parts.items():
        if not chosen:
            raise UserError(
                f"data.{split}: no record is left for it; the training data has {len(records)} "
                f"records, {len(sizes)} of them different; name files instead of shares"
            )
    return parts


def _digests(records: Records, seed: int) -> np.ndarray:
    """Return the digest of every record, uint64 `[N]`. Digests of stored records are stored too."""

    def computed() -> np.ndarray:
        return np.fromiter((_digest(r, seed) for r in records), np.uint64, len(records))

    if records.digest is None:
        return computed()

    def write(folder: Path) -> dict[str, Any]:
        np.save(folder / _DIGESTS, computed(), allow_pickle=False)
        return {}

    try:
        folder, _ = open_store(store_key("digests", records.digest, seed), write)
        digests = np.load(folder / _DIGESTS, allow_pickle=False)
    except OSError:  # the disk is full
        return computed()
    if digests.shape != (len(records),) or digests.dtype != np.uint64:
        raise UserError(f"{folder}: is damaged; delete it, and start again")
    return digests


def _digest(record: Record, seed: int) -> int:
    """Return a number of 64 bits that depends on the seed and on the values of all fields."""
    fields = {str(name): value for name, value in record.fields.items()}
    try:
        text = _encode(fields)
    except (TypeError, ValueError, RecursionError) as error:  # only rows in memory have such values
        raise UserError(
            f"{record.where}: its fields cannot be compared with those of other records "
            f"({reason_of(error)}), so no split can be taken from this data"
        ) from None
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=seed.to_bytes(4, "little"))
    return int.from_bytes(digest.digest(), "little")


def _key(source: Source) -> str | tuple[str, ...]:
    return source if isinstance(source, str) else tuple(source)


def _read(source: Source, split: str, progress: Progress) -> Sequence[Record]:
    """Read the records of a split; missing data of another split than `train` gets advice."""
    try:
        return read_stored(source, progress)
    except MissingData as error:
        if split not in _ADVICE:
            raise
        raise UserError(f"{error}; {_ADVICE[split]}") from None
