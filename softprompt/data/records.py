"""Records: the rows of a dataset before a template turns them into text."""

import abc
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, overload

import numpy as np

from softprompt.data.formats import read_rows
from softprompt.data.media import without_media
from softprompt.data.sources import Source, files_of, source_name
from softprompt.errors import UserError, reason_of
from softprompt.files.json_lines import parse_json_lines

_READ_TOGETHER = 512  # records, in a pass over all of them
_DICT, _INFO = "dataset_dict.json", "dataset_info.json"  # in folders of `save_to_disk`


@dataclasses.dataclass(frozen=True)
class Record:
    """One row of a dataset.

    Attributes:
      fields: values by field name.
      where: the record's place for error messages, such as `file:line`.

    Examples:
      >>> Record({"text": "A joy.", "stars": 5}, "reviews.jsonl:1").text("stars")
      '5'
    """

    fields: Mapping[str, Any]
    where: str

    def text(self, field: str) -> str:
        """Return a field as text; numbers and booleans are written as in JSON.

        Raises:
          UserError: if the field is missing, empty, or neither text, number nor boolean.
        """
        if field not in self.fields:
            names = ", ".join(map(str, self.fields))
            raise UserError(f"{self.where}: no field {field!r} (its fields: {names})")
        value = self.fields[field]
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{self.where}: field {field!r} is {value}, not a number")
        if isinstance(value, bool | int | float):
            try:
                value = json.dumps(value)
            except ValueError as error:  # an integer of too many digits
                raise UserError(f"{self.where}: field {field!r}: {error}") from None
        if not isinstance(value, str):
            raise UserError(f"{self.where}: field {field!r} is {type(value).__name__}, not text")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(f"{self.where}: field {field!r} has half of a surrogate pair") from None
        if not value.strip():
            raise UserError(f"{self.where}: field {field!r} is empty")
        return value


Rows = Sequence[Mapping[str, Any] | Record]
"""Any sequence of mappings or records, such as a list of dicts or a `datasets.Dataset`."""


class Records(Sequence[Record]):
    """A sequence whose records are read on access, so that they need not fit in memory.

    Attributes:
      digest: a hash that identifies the records in every process; None if there is none.
    """

    digest: str | None = None

    @abc.abstractmethod
    def record(self, number: int) -> Record:
        """Return one record; `number` is in `range(len(self))`."""

    def records(self, numbers: Sequence[int]) -> Iterable[Record]:
        """Return several records."""
        return map(self.record, numbers)

    def __iter__(self) -> Iterator[Record]:
        for first in range(0, len(self), _READ_TOGETHER):
            yield from self.records(range(first, min(first + _READ_TOGETHER, len(self))))

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> "Part": ...
    def __getitem__(self, index: int | slice) -> "Record | Part":
        numbers = range(len(self))[index]
        return self.record(numbers) if isinstance(numbers, int) else Part(self, np.array(numbers))


class Part(Records):
    """Some records of a sequence.

    Args:
      records: the sequence.
      numbers: the indices of the records, `[N]`.
    """

    def __init__(self, records: Sequence[Record], numbers: np.ndarray):
        self._records, self._numbers = as_records(records), numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def digest(self) -> str | None:  # type: ignore[override]
        if self._records.digest is None:
            return None
        numbers = np.asarray(self._numbers, "<i8").tobytes()
        return hashlib.sha256(self._records.digest.encode() + numbers).hexdigest()

    def record(self, number: int) -> Record:
        return self._records.record(int(self._numbers[number]))

    def records(self, numbers: Sequence[int]) -> Iterable[Record]:
        return self._records.records(self._numbers[list(numbers)].tolist())


class _RowRecords(Records):
    """A sequence of mappings as records."""

    def __init__(self, rows: Rows, name: str):
        self._rows, self._name = rows, name

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, number: int) -> Record:
        row, where = self._rows[number], f"{self._name} {number}"
        if isinstance(row, Record):
            return row
        if not isinstance(row, Mapping):
            raise UserError(f"{where}: {type(row).__name__}, not a mapping of fields")
        return Record(row, where)


def as_records(rows: Rows, name: str = "row") -> Records:
    """Return a sequence of mappings as records, and `Records` unchanged.

    Args:
      rows: any object with a length and rows by index. Rows are read on access, so they
        need not fit in memory.
      name: the name of a row in error messages, before its number.
    """
    return rows if isinstance(rows, Records) else _RowRecords(rows, name)


def read_records(source: str | Rows, name: str = "row") -> Sequence[Record]:
    """Read a dataset.

    Args:
      source: a source as in `read_source`, or a sequence of mappings.
      name: the name of a row of a sequence in error messages, before its number.

    Raises:
      UserError: if a row cannot be read, with its place, or if there are no records.
    """
    if isinstance(source, str):
        return read_source(source)
    return _require_records(as_records(source, name), f"sequence of {name}s")


def read_source(source: Source) -> Sequence[Record]:
    """Read the records of a source.

    Args:
      source: a file: `.jsonl` (one JSON object per line; blank lines are skipped), `.csv` with a
        header, `.parquet` (needs the `pyarrow` package), or `.txt`, which is one record with the
        field `text`; a folder of such files, or a pattern such as `data/*.jsonl`; a folder that
        `save_to_disk` of the `datasets` package wrote; `hub:NAME#SPLIT` for a dataset on the
        Hugging Face Hub (both need that package); or a sequence of these.

    Raises:
      MissingData: if a file does not exist.
      UserError: if a row cannot be read, with its file and line, or if there are no records.
    """
    if isinstance(source, str):
        return _require_records(_read_one(source), source)
    records = [record for text in source for record in _read_one(text)]
    return _require_records(records, source_name(source))


def _require_records(records: Sequence[Record], where: str) -> Sequence[Record]:
    if not len(records):
        raise UserError(f"{where}: has no records")
    return records


def parse_jsonl(lines: Iterable[str], source: str) -> Iterator[Record]:
    """Parse lines of JSON as records.

    Raises:
      UserError: if a line is not a JSON object; see `parse_json_lines`.
    """
    for where, fields in parse_json_lines(lines, source):
        yield Record(fields, where)


def _read_one(source: str) -> Sequence[Record]:
    if source.startswith("hub:"):
        return _read_hub(source)
    if os.path.isfile(os.path.join(source, _DICT)):
        raise UserError(
            f"{source}: holds the splits {', '.join(_folders_in(source))}; name one of them, such "
            f"as {os.path.join(source, 'train')}"
        )
    if is_saved_dataset(source):
        return _read_saved(source)
    return [Record(row, where) for path in files_of(source) for where, row in read_rows(path)]


def is_saved_dataset(source: str) -> bool:
    """Return whether a source is a folder that `save_to_disk` wrote."""
    return any(os.path.isfile(os.path.join(source, name)) for name in (_DICT, _INFO))


def _folders_in(folder: str) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def _read_hub(source: str) -> Sequence[Record]:
    datasets = _import_datasets(source)
    name, _, split = source.removeprefix("hub:").partition("#")
    if not split:
        raise UserError(f"{source}: name a split, as in hub:stanfordnlp/sst2#train")
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # the package raises errors of a dozen unrelated kinds
        raise UserError(f"{source}: cannot be loaded ({reason_of(error)})") from error
    return as_records(without_media(rows, source), f"{source} row")


def _read_saved(source: str) -> Sequence[Record]:
    """Read a folder that `save_to_disk` wrote; it holds Arrow files and JSON, and no code."""
    datasets = _import_datasets(source)
    try:
        rows = datasets.load_from_disk(source).with_format(None)
        rows.data.validate(full=True)  # otherwise a damaged file could end the process later
    except Exception as error:  # the package raises errors of a dozen unrelated kinds
        raise UserError(f"{source}: cannot be loaded ({reason_of(error)})") from error
    return as_records(without_media(rows, source), f"{source} row")


def _import_datasets(source: str) -> ModuleType:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{source}: needs the datasets package; run: pip install datasets"
        ) from None
    return datasets
