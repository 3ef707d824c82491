"""Stores: folders in the cache that hold records and examples in a form that is fast to read.

A store is written once, under a temporary name, and then renamed, so it is complete or absent. The
file `contents.json`, which is written last, has the size and the SHA-256 of every other file. The
files are checked each time a store is opened, and a damaged store is written again. Stores hold
only ArrayRecord files, NumPy arrays and JSON. Nothing in them is executed.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydantic

from softprompt.errors import UserError
from softprompt.files.json_files import checked, read_json
from softprompt.files.reading import MEBIBYTE, open_file
from softprompt.files.writing import write_file
from softprompt.runtime.cache import cache_folder

_log = logging.getLogger(__name__)

_CONTENTS = "contents.json"
_MOST = 16 * 1024 * MEBIBYTE  # of all stores together
_PACKAGES = "tokenizers", "transformers", "jinja2"  # they decide the tokens of a row
_UNFINISHED = ".new"


class _File(pydantic.BaseModel):
    size: int
    sha256: str


class Contents(pydantic.BaseModel):
    """What a store holds.

    Attributes:
      files: the size and the SHA-256 of each file, by name.
      about: information that the writer of the store keeps with it.
    """

    files: dict[str, _File]
    about: dict[str, Any]


def store_key(*parts: Any) -> str:
    """Return the name of a store.

    Args:
      parts: JSON values that decide the contents of the store. The code of this package and the
        versions of the packages that it uses are added to them.
    """
    return hashlib.sha256(json.dumps([_code(), *parts]).encode()).hexdigest()


def open_store(key: str, write: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """Return the folder of a store. Write the store first if it is absent or damaged.

    If another process writes the same store, this one waits for it.

    Args:
      key: the name of the store, see `store_key`.
      write: writes the files into a new folder, and returns information to keep with them.

    Returns:
      The folder, and what `write` returned when the store was written.

    Raises:
      OSError: if the store cannot be written.
    """
    folder = stores_folder() / key
    if (contents := _intact(folder)) is None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(folder.parent)
        with _owned(folder.with_suffix(_UNFINISHED)) as new:
            contents = _intact(folder)  # another process may have written it by now
            if contents is None:
                about = write(new)
                files = {path.name: _described(path) for path in new.iterdir()}
                contents = Contents(files=files, about=about)
                write_file(new / _CONTENTS, contents.model_dump_json())
                shutil.rmtree(folder, ignore_errors=True)
                new.rename(folder)
        _remove_old(folder)
    with contextlib.suppress(OSError):
        os.utime(folder / _CONTENTS)
    return folder, contents.about


def stores_folder() -> Path:
    """Return the folder of all stores."""
    return cache_folder() / "data"


@contextlib.contextmanager
def _owned(folder: Path) -> Iterator[Path]:
    """Create an empty folder that no other process uses at the same time, and remove it at the end.

    The process that writes in the folder holds a lock. The lock ends with the process.
    """
    folder.mkdir(exist_ok=True)
    while (descriptor := _locked(folder)) is None:
        folder.mkdir(exist_ok=True)
    try:
        for path in folder.iterdir():  # left by a process that was killed
            path.unlink()
        yield folder
    finally:
        if _is_at(folder, descriptor):  # otherwise it was renamed
            shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _locked(folder: Path, *, wait: bool = True) -> int | None:
    """Lock a folder, and return the descriptor that holds the lock.

    Returns:
      None if the folder has been renamed or removed, or if it is locked and `wait` is false.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if wait:
            _log.info(f"{folder}: waiting for another process that is writing this data")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    else:
        wait = True
    if wait and _is_at(folder, descriptor):
        return descriptor
    os.close(descriptor)
    return None


def _is_at(folder: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(folder), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _described(path: Path) -> _File:
    with open_file(path) as file:
        return _File(
            size=os.fstat(file.fileno()).st_size,
            sha256=hashlib.file_digest(file, "sha256").hexdigest(),
        )


def _intact(folder: Path) -> Contents | None:
    """Return the contents of a store, or None if it is absent or damaged."""
    if not folder.is_dir():
        return None
    with contextlib.suppress(UserError, OSError):
        contents = checked(Contents, read_json(folder / _CONTENTS), str(folder))
        if all(_described(folder / Path(name).name) == f for name, f in contents.files.items()):
            return contents
    _log.warning(f"{folder}: the stored data is damaged, so it is made again")
    return None


def _remove_unfinished(root: Path) -> None:
    """Remove the folders that killed processes have left."""
    for folder in root.glob(f"*{_UNFINISHED}"):
        if (descriptor := _locked(folder, wait=False)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)


def _remove_old(kept: Path) -> None:
    """Remove the least recently used stores if all of them take too much space.

    A process can still use a removed store, because it keeps the files open.
    """
    sizes: dict[Path, tuple[float, int]] = {}
    for folder in kept.parent.iterdir():
        with contextlib.suppress(OSError):
            size = sum(path.stat().st_size for path in folder.iterdir())
            sizes[folder] = (folder / _CONTENTS).stat().st_mtime, size
    total = sum(size for _, size in sizes.values())
    for folder, (_, size) in sorted(sizes.items(), key=lambda item: item[1]):
        if total > _MOST and folder != kept:
            shutil.rmtree(folder, ignore_errors=True)
            total -= size


@functools.cache
def _code() -> str:
    """Return a hash of everything that decides how records are read and encoded."""
    versions = [importlib.metadata.version(package) for package in _PACKAGES]
    digest = hashlib.sha256(json.dumps(versions).encode())
    package = Path(__file__).parent.parent
    for layer in ("data", "experiment", "files"):
        for path in sorted((package / layer).glob("*.py")):
            digest.update(path.read_bytes())
    digest.update((package / "backbones" / "formats" / "tokenizer.py").read_bytes())
    return digest.hexdigest()
