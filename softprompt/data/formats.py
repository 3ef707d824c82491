"""Rows of data files: JSON Lines, CSV, Parquet and plain text."""

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from softprompt.data.parquet import parquet_rows, read_parquet
from softprompt.errors import UserError, shortened
from softprompt.files.json_lines import parse_json_lines
from softprompt.files.reading import MEBIBYTE, missing_file, open_file

LONGEST_LINE = 64 * MEBIBYTE
"""The most bytes of a line of a file."""

Row = tuple[str, Mapping[str, Any]]
"""The place of a row for error messages, and its values by field name."""


def read_rows(path: Path) -> Iterator[Row]:
    """Iterate over the rows of a file. The ending of its name says how it is read.

    Raises:
      UserError: if the file cannot be read, or is not valid, with the place of the mistake.
    """
    if path.suffix not in READERS:
        raise UserError(
            f"{path}: unknown kind of dataset (known: {', '.join(READERS)}, a folder of such "
            "files, hub:NAME#SPLIT)"
        )
    try:
        yield from READERS[path.suffix](path)
    except FileNotFoundError:
        raise missing_file(path) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def estimated_rows(path: Path) -> int:
    """Return about how many rows a file has, without decoding them.

    Raises:
      UserError: if the file cannot be read.
    """
    if path.suffix == ".parquet":
        return parquet_rows(path)
    if path.suffix == ".txt":
        return 1
    with open_file(path) as file:
        return max(1, sum(block.count(b"\n") for block in iter(lambda: file.read(MEBIBYTE), b"")))


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


def _read_jsonl(path: Path) -> Iterator[Row]:
    yield from parse_json_lines(_lines(path), str(path))


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # long fields are truncated later, and counted
    rows = csv.DictReader(_lines(path), strict=True)
    last = 0  # line of the last row
    try:
        _require_distinct(rows.fieldnames or (), f"{path}:{rows.reader.line_num}")
        last = rows.reader.line_num
        for row in rows:
            last = rows.reader.line_num
            where = f"{path}:{last}"
            missing = [name for name, value in row.items() if value is None]
            if None in row or missing:
                what = f"no value for {shortened(missing[0])}" if missing else "too many values"
                raise UserError(f"{where}: not the same number of columns as the header ({what})")
            yield where, row
    except csv.Error as error:
        raise UserError(f"{path}:{last + 1}: not valid CSV ({error})") from None


def _require_distinct(names: Sequence[str], where: str) -> None:
    """Reject a header that names two columns alike. Columns without a name are ignored."""
    for name, count in Counter(names).items():
        if name and count > 1:
            raise UserError(f"{where}: {count} columns have the name {shortened(name)}")


def _read_txt(path: Path) -> Iterator[Row]:
    yield str(path), {"text": "".join(_lines(path))}


READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": read_parquet,
    ".txt": _read_txt,
}
"""The reader of each kind of file."""
