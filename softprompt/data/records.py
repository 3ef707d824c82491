"""Records: what one line of a dataset says, and where it stands."""

import csv
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from softprompt.errors import UserError


@dataclasses.dataclass(frozen=True)
class Record:
    """Fields by name, and the place to name in an error (`file:line`)."""

    fields: Mapping[str, Any]
    where: str

    def text(self, field: str) -> str:
        """A field as text; numbers and booleans as JSON writes them.

        Raises `UserError` if there is no such field, or it is empty or no plain value.
        """
        if field not in self.fields:
            raise UserError(
                f"{self.where}: no field {field!r} (its fields: {', '.join(self.fields)})"
            )
        value = self.fields[field]
        if isinstance(value, bool | int | float):
            value = json.dumps(value)
        if not isinstance(value, str):
            raise UserError(f"{self.where}: field {field!r} is {type(value).__name__}, not text")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise UserError(f"{self.where}: field {field!r} has half a surrogate pair in it")
        if not value.strip():
            raise UserError(f"{self.where}: field {field!r} is empty")
        return value


def read_records(source: str) -> list[Record]:
    """Read a dataset.

    Args:
      source: a `.jsonl` file (one JSON object a line, blank lines skipped), a `.csv`
        file with a header, or `hub:NAME#SPLIT` for one read by the `datasets` package.

    Raises:
      UserError: with file and line, if a line cannot be read or there is no record.
    """
    if source.startswith("hub:"):
        records = list(_read_hub(source))
    else:
        path = Path(source)
        readers = {".jsonl": _read_jsonl, ".csv": _read_csv}
        if path.suffix not in readers:
            raise UserError(
                f"{source}: unknown kind of dataset (known: .jsonl, .csv, hub:NAME#SPLIT)"
            )
        try:
            records = list(readers[path.suffix](path))
        except OSError as error:
            raise UserError(f"{source}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise UserError(f"{source}:{_first_undecodable(path)}: not UTF-8 text") from None
    if not records:
        raise UserError(f"{source}: has no records")
    return records


def parse_jsonl(lines: Iterable[str], source: str) -> Iterator[Record]:
    """Records from lines of JSON, blank ones skipped; `UserError` if one is no JSON object."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _parse_object(line, f"{source}:{number}")


def _parse_object(line: str, where: str) -> Record:
    try:
        fields = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(fields, dict):
        raise UserError(f"{where}: not a JSON object")
    return Record(fields, where)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")


def _first_undecodable(path: Path) -> int:
    """The first line that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.decode(errors="ignore").encode() != line:
                return number
    raise AssertionError(f"{path} is UTF-8")


def _read_jsonl(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as file:
        yield from parse_jsonl(file, str(path))


def _read_csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # long texts are cut by the template, and counted
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            for row in rows:
                where = f"{path}:{rows.line_num}"
                if None in row or None in row.values():
                    raise UserError(f"{where}: not as many columns as the header")
                yield Record(row, where)
        except csv.Error as error:
            raise UserError(f"{path}:{rows.line_num}: not valid CSV ({error})") from None


def _read_hub(source: str) -> Iterator[Record]:
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
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{source}: cannot be loaded ({reason})") from error
    for number, row in enumerate(rows):
        yield Record(row, f"{source} row {number}")
