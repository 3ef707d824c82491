"""A copy of the weights of a GGUF file, from which the next process starts faster.

Dequantizing a model of 135 million parameters takes a second, mostly because the operating
system must provide new memory. A copy in the user's cache folder holds the parameters as the
backbone uses them. It is mapped into memory, and JAX on a CPU computes on the mapped file itself,
so that nothing is converted or copied.

A copy is only used for the very file that it was made from, by the code that made it: its header
holds the record of `digest.py`, with size and modification time, and a hash of this package's code.
Names, shapes and dtypes must be the same as in the backbone. They determine the size of the copy.

At each start, the whole copy is checked for damage. SHA-256 reads 0.4 GB/s on a CPU without
instructions for it, which would take longer than dequantizing. Therefore the 8-byte words of each
page of 4 KiB are added, at the speed of the memory, and the header holds the SHA-256 of all sums.
This finds every change within one word, and pages that are missing, empty or in another place. It
does not stop somebody who can write to the cache folder, but they can also replace the compiled
programs that are in it.

Nothing depends on a copy. It is not made if the disk is nearly full, if the folder cannot be
written, or if another process is making one. A copy replaces the one of an earlier version of the
same file, and copies of files that no longer exist are removed.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import math
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pydantic

from softprompt.backbones.formats.digest import Record, RememberedDigest
from softprompt.backbones.formats.gguf import GGUFFile
from softprompt.errors import UserError
from softprompt.files.json_files import checked, parse_json
from softprompt.files.reading import MEBIBYTE, open_file
from softprompt.runtime.cache import cache_folder

_PAGE = 4096  # bytes; arrays begin at pages
_LONGEST_HEADER = MEBIBYTE
_SMALLEST, _LARGEST = 16 * MEBIBYTE, 4096 * MEBIBYTE  # of the parameters that are copied
_FREE = 4  # the copy must fit this many times on the disk

Arrays = Mapping[tuple[Any, ...], Any]
"""Arrays, or their shapes and dtypes, by the path of the parameter."""


class _Header(pydantic.BaseModel):
    """The first line of a copy.

    Attributes:
      source: the path of the GGUF file.
      record: identifies the GGUF file, and holds the digest of its weights.
      code: `_code()`.
      arrays: the path, the dtype and the shape of each array.
      sums: the SHA-256 of the sums of all pages.
    """

    source: str
    record: Record
    code: str
    arrays: list[tuple[str, str, list[int]]]
    sums: str


class WeightsCopy:
    """The copy of the weights of a GGUF file for one choice of dtypes.

    Create it before the weights are read.

    Args:
      file: the model.
      arch: the architecture of its backbone.
      shapes: the shapes and dtypes of the backbone's parameters.
    """

    def __init__(self, file: GGUFFile, arch: Any, shapes: Arrays):
        self._source = str(file.path.resolve())
        self._remembered = RememberedDigest(file, arch)
        self._shapes = shapes
        self._arrays = [
            (".".join(map(str, path)), np.dtype(value.dtype).name, list(value.shape))
            for path, value in shapes.items()
        ]
        dtypes = "-".join(sorted({dtype for _, dtype, _ in self._arrays}))
        name = hashlib.sha256(self._source.encode()).hexdigest()
        self._path = cache_folder() / "weights" / f"{name}.{dtypes}"

    def read(self) -> tuple[dict[tuple[Any, ...], np.ndarray], str] | None:
        """Return the parameters, mapped into memory, and the digest of the weights in the file.

        Returns:
          None if there is no copy, or if it belongs to another file or is damaged.
        """
        with contextlib.suppress(UserError, OSError, ValueError):
            with open_file(self._path) as file:
                header = _read_header(file)
                if header != self._header(header.record.digest, header.sums):
                    return None
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            arrays, end = {}, 0
            for start, (path, shape) in zip(self._starts(), self._shapes.items(), strict=True):
                count = math.prod(shape.shape)
                arrays[path] = np.frombuffer(data, shape.dtype, count, start).reshape(shape.shape)
                end = start + arrays[path].nbytes
            if len(data) == end and _sums(arrays) == header.sums:
                return arrays, header.record.digest
        return None

    def write(self, arrays: Arrays, digest: str) -> None:
        """Make the copy for the next process.

        It is not an error if this fails, or if a copy of this size would not be useful.

        Args:
          arrays: the parameters.
          digest: the digest of the weights in the file.
        """
        held = {path: np.asarray(value) for path, value in arrays.items()}
        size = sum(array.nbytes for array in held.values())
        if not _SMALLEST <= size <= _LARGEST or not self._remembered.unchanged():
            return
        with contextlib.suppress(OSError):
            folder = self._path.parent
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove_useless(folder)
                if shutil.disk_usage(folder).free > _FREE * size:
                    self._replace(held, self._header(digest, _sums(held)))

    def _replace(self, arrays: Arrays, header: _Header) -> None:
        """Write the copy under a temporary name, and rename it.

        Processes that use the old copy keep it. What a crash leaves incomplete does not have the
        right sums, so there is no need to wait until the disk has written everything.
        """
        new = self._path.with_suffix(".new")
        new.unlink(missing_ok=True)
        try:
            with new.open("xb") as file:
                file.write(header.model_dump_json().encode() + b"\n")
                for start, array in zip(self._starts(), arrays.values(), strict=True):
                    file.seek(start)
                    file.write(_bytes(array).data)
            new.replace(self._path)
        except OSError:
            new.unlink(missing_ok=True)
            raise

    def _header(self, digest: str, sums: str) -> _Header:
        return _Header(
            source=self._source,
            record=self._remembered.record(digest),
            code=_code(),
            arrays=self._arrays,
            sums=sums,
        )

    def _starts(self) -> Iterator[int]:
        """Yield where each array begins in the copy, in bytes."""
        start = _LONGEST_HEADER
        for shape in self._shapes.values():
            yield start
            size = math.prod(shape.shape) * np.dtype(shape.dtype).itemsize
            start += -(-size // _PAGE) * _PAGE


def _read_header(file: Any) -> _Header:
    line = file.readline(_LONGEST_HEADER)
    return checked(_Header, parse_json(line.decode(), "header"), "header")


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _sums(arrays: Arrays) -> str:
    """Return the SHA-256 of the sum of each page, and of the bytes after the last whole page."""
    digest = hashlib.sha256()
    for array in arrays.values():
        content = _bytes(array)
        whole = len(content) // _PAGE * _PAGE
        digest.update(content[:whole].view("<u8").reshape(-1, _PAGE // 8).sum(axis=1).data)
        digest.update(content[whole:].data)
    return digest.hexdigest()


@functools.cache
def _code() -> str:
    """Return a hash of everything that determines which parameters a file becomes."""
    digest = hashlib.sha256(importlib.metadata.version("gguf").encode())
    for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _remove_useless(folder: Path) -> None:
    """Remove the copies of files that no longer exist, and files that are not copies."""
    for path in folder.iterdir():
        if path.name == ".lock":
            continue
        try:
            with open_file(path) as file:
                useful = path.suffix != ".new" and os.path.exists(_read_header(file).source)
        except (UserError, ValueError):
            useful = False
        if not useful:
            path.unlink(missing_ok=True)
