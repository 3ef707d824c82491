"""Files of rows that are read by their numbers: JSON values in an ArrayRecord file."""

import contextlib
import datetime
import decimal
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from softprompt.errors import UserError, reason_of

_FORM = "group_size:16,zstd:1"  # 16 rows are compressed together
_READ_TOGETHER = 512  # rows, in a pass over all of them
_DENSE = 4  # a range is read as a whole if at least one in four of its rows is wanted
_TYPE = "type that is not JSON"
_PLAIN = bytes, datetime.date, datetime.time, datetime.timedelta, decimal.Decimal


class RowWriter:
    """Writes rows to a new file, one after another. A context manager that completes the file.

    Args:
      path: the file.

    Raises:
      OSError: if a row cannot be written, for example because the disk is full.
    """

    def __init__(self, path: Path):
        self._path, self._rows = path, 0
        self._writer = ArrayRecordWriter(str(path), _FORM)

    def write(self, row: Any) -> None:
        """Write a row. A value that JSON cannot hold, such as a date, becomes `NotJSON`.

        Raises:
          OSError: see above.
          ValueError, RecursionError: if a number has too many digits, or the row is nested too
            deeply.
        """
        content = _encode(row).encode()
        try:
            self._writer.write(content)
        except RuntimeError as error:
            raise self._failed(error) from None
        self._rows += 1

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            with contextlib.suppress(RuntimeError):
                self._writer.close()
            return
        try:
            self._writer.close()
        except RuntimeError as error:
            raise self._failed(error) from None
        written = len(RowFile(self._path))
        if written != self._rows:
            raise OSError(None, f"{written} of {self._rows} rows were written", str(self._path))

    def _failed(self, error: RuntimeError) -> OSError:
        return OSError(None, reason_of(error), str(self._path))


class RowFile:
    """A file that a `RowWriter` has written. Several threads may read it.

    A checksum of the format itself protects each group of rows.

    Args:
      path: the file.
    """

    def __init__(self, path: Path):
        self._path = path
        # Without threads that read ahead, a row is read several times faster.
        self._reader = ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
        self._rows: int = self._reader.num_records()

    def __len__(self) -> int:
        return self._rows

    def row(self, number: int) -> Any:
        """Return a row; `number` is in `range(len(self))`.

        Raises:
          UserError: if the file is damaged.
        """
        return self._read(number, number + 1)[0]

    def rows(self, numbers: Sequence[int]) -> list[Any]:
        """Return several rows. Numbers that are close together are read fastest.

        Raises:
          UserError: if the file is damaged.
        """
        first, last = min(numbers), max(numbers)
        if last - first < _DENSE * len(numbers):
            found = self._read(first, last + 1)
            return [found[number - first] for number in numbers]
        return [self.row(number) for number in numbers]

    def __iter__(self) -> Iterator[Any]:
        for first in range(0, self._rows, _READ_TOGETHER):
            yield from self._read(first, min(first + _READ_TOGETHER, self._rows))

    def _read(self, first: int, stop: int) -> list[Any]:
        try:
            return [_decode(content.decode()) for content in self._reader.read(first, stop)]
        except (RuntimeError, ValueError, IndexError) as error:
            raise UserError(
                f"{self._path}: is damaged ({reason_of(error)}); delete the folder that contains "
                "it, and start again"
            ) from None


class NotJSON:
    """A value of a type that JSON cannot hold, such as a date. Its class has the name of the type.

    Attributes:
      text: the value as text.
    """

    text: str


def as_text(value: Any) -> str:
    """Return a value that JSON cannot hold as text that is the same in every process."""
    if isinstance(value, NotJSON):
        return value.text
    return str(value) if isinstance(value, _PLAIN) else type(value).__name__


def _described(value: Any) -> dict[str, str]:
    return {_TYPE: type(value).__name__, "text": as_text(value)}


def _restored(value: dict[str, Any]) -> Any:
    """Return a JSON object. If it describes another value, return that value as `NotJSON`."""
    if len(value) == 2 and isinstance(name := value.get(_TYPE), str):
        return type(name, (NotJSON,), {"text": str(value.get("text"))})()
    return value


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=_described).encode
_decode = json.JSONDecoder(object_hook=_restored).decode
