"""Records: the rows of a dataset before a template turns them into text."""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, overload

from softprompt.data.formats import read_rows
from softprompt.data.media import without_media
from softprompt.data.sources import Source, files_of, source_name
from softprompt.errors import UserError, reason_of
from softprompt.files.json_lines import parse_json_lines


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


class _RowRecords(Sequence[Record]):
    """A sequence of mappings as records, which are made on access."""

    def __init__(self, rows: Rows, name: str):
        self._rows, self._name = rows, name

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        row, where = self._rows[number], f"{self._name} {number}"
        if isinstance(row, Record):
            return row
        if not isinstance(row, Mapping):
            raise UserError(f"{where}: {type(row).__name__}, not a mapping of fields")
        return Record(row, where)


def as_records(rows: Rows, name: str = "row") -> Sequence[Record]:
    """Return a sequence of mappings as records.

    Args:
      rows: any object with a length and rows by index. Rows are read on access, so they
        need not fit in memory.
      name: the name of a row in error messages, before its number.
    """
    return _RowRecords(rows, name)


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
    if os.path.isfile(os.path.join(source, "dataset_dict.json")):
        raise UserError(
            f"{source}: holds the splits {', '.join(_folders_in(source))}; name one of them, such "
            f"as {os.path.join(source, 'train')}"
        )
    if os.path.isfile(os.path.join(source, "dataset_info.json")):
        return _read_saved(source)
    return [Record(row, where) for path in files_of(source) for where, row in read_rows(path)]


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
