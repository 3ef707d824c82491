"""Locks between processes: on a folder, or on a single file."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from softprompt.errors import FolderError, UserError


class InUseError(UserError):
    """Another running process holds the lock of the folder."""


@contextlib.contextmanager
def locked_folder(
    folder: Path, file: str, kind: str, work: str, *, shared: bool = False
) -> Iterator[None]:
    """Create a folder or open an existing one of its kind, and hold its lock.

    An `OSError` raised in the body becomes a `UserError` that names the file.

    Args:
      folder: the folder; missing parents are created.
      file: name of the file that marks a folder of this kind.
      kind: what the folder is, such as `run`, for error messages.
      work: what a process does there, such as `training`, for error messages.
      shared: let several processes hold the lock together.

    Raises:
      FolderError: if the folder has other content.
      UserError: if the folder cannot be read or written.
      InUseError: if another process holds the lock.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = [p.name for p in folder.iterdir() if p.name[0] != "."]
        if others and not (folder / file).exists():
            raise FolderError(
                f"{folder}: not a {kind} folder (it contains {others[0]}, but no {file}); "
                "choose another folder"
            )
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    with lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError:
            raise InUseError(f"{folder}: another process is {work} there") from None
        try:
            yield
        except OSError as error:
            where, reason = error.filename or folder, error.strerror or error
            raise UserError(f"{where}: cannot be read or written ({reason})") from error


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Wait for the exclusive lock of a file, and hold it.

    Args:
      path: an empty file that exists only for its lock; it is created if necessary.
    """
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
