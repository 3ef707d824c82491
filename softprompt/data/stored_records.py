"""Records of large files. They are kept in a store, so that they need not fit in memory."""

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softprompt.data.formats import estimated_rows, read_rows
from softprompt.data.records import Record, Records, is_saved_dataset, read_source
from softprompt.data.row_file import RowFile, RowWriter
from softprompt.data.sources import Source, files_of, source_name
from softprompt.data.store import open_store, store_key
from softprompt.errors import UserError, reason_of
from softprompt.files.reading import MEBIBYTE, open_file
from softprompt.runtime.progress import Bar, Progress, silent

_log = logging.getLogger(__name__)

LARGE = 4 * MEBIBYTE
"""Files of this total size or more are kept in a store. Smaller ones are read at each start."""

_ROWS = "records.array_record"
_COUNTED = 512  # records between two reports of progress


class StoredRecords(Records):
    """Records that are read from a store on access.

    Args:
      folder: the folder of the store.
      digest: identifies the records.
      paths: the files that they come from.
    """

    def __init__(self, folder: Path, digest: str, paths: Sequence[Path]):
        self.digest = digest
        self._file, self._paths = RowFile(folder / _ROWS), paths

    def __len__(self) -> int:
        return len(self._file)

    def record(self, number: int) -> Record:
        return self._record(self._file.row(number))

    def records(self, numbers: Sequence[int]) -> list[Record]:
        return [self._record(row) for row in self._file.rows(numbers)]

    def _record(self, row: Any) -> Record:
        file, place, fields = row
        return Record(fields, f"{self._paths[file]}{place}")


def read_stored(source: Source, progress: Progress = silent) -> Sequence[Record]:
    """Read a source as `read_source` does, but keep the records of large files in a store.

    Args:
      source: see `read_source`.
      progress: shows how many records are done.

    Raises:
      MissingData, UserError: see `read_source`.
    """
    paths = _large_files(source)
    if paths is None:
        return read_source(source)
    states = [_state(path) for path in paths]
    key = store_key("records", [(path.suffix, _digest(path)) for path in paths])

    def write(folder: Path) -> dict[str, Any]:
        total = sum(map(estimated_rows, paths))
        with (
            progress(f"read {source_name(source)}", total, "records") as bar,
            RowWriter(folder / _ROWS) as writer,
        ):
            count = _write_rows(paths, writer, bar)
        for path, state in zip(paths, states, strict=True):
            if _state(path) != state:
                raise UserError(f"{path}: was changed while it was read; start again")
        if not count:
            raise UserError(f"{source_name(source)}: has no records")
        return {}

    try:
        folder, _ = open_store(key, write)
        return StoredRecords(folder, key, paths)
    except OSError as error:
        _log.warning(f"the data is kept in memory, because it cannot be stored ({error})")
        return read_source(source)


def _large_files(source: Source) -> list[Path] | None:
    """Return the files of a source if they are large; None if small or not regular files."""
    texts = [source] if isinstance(source, str) else source
    if any(text.startswith("hub:") or is_saved_dataset(text) for text in texts):
        return None
    paths = [path for text in texts for path in files_of(text)]
    if all(os.path.isfile(path) for path in paths) and sum(map(os.path.getsize, paths)) >= LARGE:
        return paths
    return None


def _state(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def _digest(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_rows(paths: Sequence[Path], writer: RowWriter, bar: Bar) -> int:
    """Write the rows of all files, each with the index of its file. Return the number of rows."""
    count = 0
    for number, path in enumerate(paths):
        for where, fields in read_rows(path):
            try:
                writer.write([number, where.removeprefix(str(path)), fields])
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: cannot be stored ({reason_of(error)})") from None
            count += 1
            if count % _COUNTED == 0:
                bar.advance(_COUNTED)
    return count
