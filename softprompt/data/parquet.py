"""Rows of Parquet files. They are read with pyarrow, an optional package."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from softprompt.errors import UserError, reason_of, shortened
from softprompt.files.reading import MEBIBYTE, open_file

_ROWS = 1000  # decoded at once
_BUFFER = MEBIBYTE  # for each column


def read_parquet(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Iterate over the rows of a Parquet file.

    Yields:
      The place of each row as `file:row group N, row M`, counted from 1, and its values by
      column name.

    Raises:
      UserError: if pyarrow is not installed or the file is not valid, with row group, row and
        field where they are known.
    """
    with _opened(path) as file:
        for group in range(file.num_row_groups):
            where, count = f"{path}:row group {group + 1}", 0
            with _errors(where):
                for batch in file.iter_batches(_ROWS, row_groups=[group]):
                    for row in _plain_rows(batch, where, count):
                        count += 1
                        yield f"{where}, row {count}", row


def parquet_rows(path: Path) -> int:
    """Return the number of rows of a Parquet file.

    Raises:
      UserError: see `read_parquet`.
    """
    with _opened(path) as file:
        return file.metadata.num_rows


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a file as a `pyarrow.parquet.ParquetFile`."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: needs the pyarrow package; run: pip install pyarrow") from None
    with open_file(path) as content:
        with _errors(str(path)):
            # With a buffer, the columns of a row group are read part by part.
            file = parquet.ParquetFile(content, buffer_size=_BUFFER)
            names = file.schema_arrow.names
        if repeated := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{path}: two columns have the name {shortened(repeated[0])}")
        yield file


@contextlib.contextmanager
def _errors(where: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{where}: not valid Parquet ({reason_of(error)})") from None


def _plain_rows(batch: Any, where: str, before: int) -> list[dict[str, Any]]:
    """Return the rows of a batch as Python values.

    Args:
      batch: a `pyarrow.RecordBatch`.
      where: the file and the row group.
      before: number of rows of the group before the batch.
    """
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, or a date after the year 9999
        pass
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        for number, value in enumerate(column, before + 1):
            try:
                value.as_py()
            except (ValueError, OverflowError) as error:
                raise UserError(
                    f"{where}, row {number}: field {name!r} cannot be read ({reason_of(error)})"
                ) from None
    raise AssertionError("each value can be read, but the batch cannot")
