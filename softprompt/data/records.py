"""Records: the rows of a dataset before a template turns them into text."""

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from softprompt.errors import UserError, reason_of
from softprompt.files.json_lines import parse_json_lines
from softprompt.files.reading import MEBIBYTE, missing_file

LONGEST_LINE = 64 * MEBIBYTE
"""The most bytes of a line of a file."""


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
      source: a `.jsonl` file (one JSON object per line; blank lines are skipped), a `.csv`
        file with a header, `hub:NAME#SPLIT` for a dataset on the Hugging Face Hub (needs
        the `datasets` package), or a sequence of mappings.
      name: the name of a row of a sequence in error messages, before its number.

    Raises:
      UserError: if a line cannot be read, with its file and line, or if there are no records.
    """
    if not isinstance(source, str):
        records, where = as_records(source, name), f"sequence of {name}s"
    elif source.startswith("hub:"):
        records, where = _read_hub(source), source
    else:
        records, where = _read_file(Path(source)), source
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


def _read_file(path: Path) -> list[Record]:
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv}
    if path.suffix not in readers:
        raise UserError(f"{path}: unknown kind of dataset (known: .jsonl, .csv, hub:NAME#SPLIT)")
    try:
        return list(readers[path.suffix](path))
    except FileNotFoundError:
        raise missing_file(path) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _lines(path: Path) -> Iterator[str]:
    """Iterate over the lines of a text file with their line breaks. The file may be a pipe."""
    try:
        file = path.open("rb")
    except ValueError as error:  # a NUL in the path
        raise UserError(f"{str(path)!r}: cannot be read ({error})") from None
    with file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise UserError(f"{path}:{number}: longer than {LONGEST_LINE // MEBIBYTE} MiB")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise UserError(f"{path}:{number}: not UTF-8 text") from None
            yield from io.StringIO(text, newline="")  # a carriage return also ends a line


def _read_jsonl(path: Path) -> Iterator[Record]:
    yield from parse_jsonl(_lines(path), str(path))


def _read_csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)  # long fields are truncated later, and counted
    rows = csv.DictReader(_lines(path), strict=True)
    try:
        for row in rows:
            where = f"{path}:{rows.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{where}: not the same number of columns as the header")
            yield Record(row, where)
    except csv.Error as error:
        raise UserError(f"{path}:{rows.line_num}: not valid CSV ({error})") from None


def _read_hub(source: str) -> Sequence[Record]:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{source}: needs the datasets package; run: pip install datasets"
        ) from None
    name, _, split = source.removeprefix("hub:").partition("#")
    if not split:
        raise UserError(f"{source}: name a split, as in hub:stanfordnlp/sst2#train")
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # the package raises errors of a dozen unrelated kinds
        raise UserError(f"{source}: cannot be loaded ({reason_of(error)})") from error
    return as_records(rows, f"{source} row")
