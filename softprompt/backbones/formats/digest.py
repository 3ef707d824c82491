"""The digest of a model's weights, remembered on disk.

The fingerprint of a model contains the SHA-256 of all its weights. To compute it, one process must
read the whole model, which takes minutes for a large one. The next start finds the result in a
record.

The record is a hidden file beside the first file of the weights, so that all hosts that share a
file system find it. If that folder cannot be written, the record is in the user's cache folder. It
is also there for models inside installed Python packages, because a folder of `site-packages`
belongs to the package's installer, which would leave an unknown file behind.

A record is valid as long as the names, sizes and modification times of all files are the same. A
record that is damaged or does not match is ignored and replaced. A record is as trustworthy as the
files beside it, because whoever can write it can also change the weights. Small models have no
record.
"""

import contextlib
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic

from softprompt.backbones.formats.directory import ModelFile
from softprompt.errors import UserError
from softprompt.files.json_files import checked, read_json
from softprompt.files.reading import MEBIBYTE
from softprompt.files.writing import write_file
from softprompt.runtime.cache import cache_folder

_VERSION = 1  # increase it when the same files get another digest, such as by a new conversion
_SMALL = 16 * MEBIBYTE  # the digest of smaller models takes less than a tenth of a second
_SETTLED = 2.0  # seconds; the coarsest modification times of common file systems
_PACKAGES = {"site-packages", "dist-packages"}


class Record(pydantic.BaseModel):
    """The content of a record.

    Attributes:
      version: `_VERSION`.
      model: the SHA-256 of the file format, the model type and the architecture. The digest
        depends on them, because they determine how tensors are converted.
      files: the name, the size in bytes and the modification time in nanoseconds of each file of
        the weights. For a symbolic link these are the target's.
      digest: the SHA-256 of the weights.
    """

    version: int
    model: str
    files: list[tuple[str, int, int]]
    digest: str = pydantic.Field(pattern="^[0-9a-f]{64}$")


class RememberedDigest:
    """The digest of the weights of a model.

    Create it before the weights are read.

    Args:
      file: the model.
      arch: the architecture of its backbone.
    """

    def __init__(self, file: ModelFile, arch: Any):
        self._paths = file.weight_files
        text = f"{type(file).__name__} {file.config['model_type']} {arch!r}"
        self._model = hashlib.sha256(text.encode()).hexdigest()
        self._files = _described(self._paths)
        self._latest = time.time() - _SETTLED

    def read(self) -> str | None:
        """Return the digest, or None if no valid record has it."""
        for place in self._places():
            with contextlib.suppress(UserError):
                record = checked(Record, read_json(place), str(place))
                if record == self.record(record.digest):
                    return record.digest
        return None

    def write(self, digest: str) -> None:
        """Remember the digest for the next start, if the files have not changed meanwhile.

        A file that was changed in the last two seconds could be changed again with the same
        modification time. The digest of such a file is not remembered. It is not an error if no
        folder can be written.
        """
        if not self.unchanged():
            return
        text = self.record(digest).model_dump_json(indent=1) + "\n"
        for place in self._places():
            with contextlib.suppress(OSError):
                if place.parent != self._paths[0].parent:
                    place.parent.mkdir(parents=True, exist_ok=True)
                write_file(place, text)
                return

    def unchanged(self) -> bool:
        """Return whether the files are as at the start, and were not changed shortly before."""
        modified = max(modified for *_, modified in self._files)
        try:
            return modified / 1e9 <= self._latest and _described(self._paths) == self._files
        except OSError:  # a file was removed meanwhile
            return False

    def record(self, digest: str) -> Record:
        """Return the record of a digest."""
        return Record(version=_VERSION, model=self._model, files=self._files, digest=digest)

    def _places(self) -> Iterator[Path]:
        """Yield the files that can hold the record, the preferred one first."""
        if sum(size for _, size, _ in self._files) < _SMALL:
            return
        first = self._paths[0]
        if not _PACKAGES.intersection(first.absolute().parts):
            yield first.with_name(f".{first.name}.digest")
        name = hashlib.sha256(str(first.resolve()).encode()).hexdigest()
        yield cache_folder() / "digests" / name


def _described(paths: list[Path]) -> list[tuple[str, int, int]]:
    """Return the name, the size and the modification time of each file."""
    resolved = [path.resolve() for path in paths]
    states = [path.stat() for path in resolved]
    return [
        (path.name, state.st_size, state.st_mtime_ns)
        for path, state in zip(resolved, states, strict=True)
    ]
