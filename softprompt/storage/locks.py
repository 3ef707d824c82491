"""Folders that one process at a time may write to."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from softprompt.errors import UserError


class InUseError(UserError):
    """A process that is still running has the folder."""


@contextlib.contextmanager
def locked_folder(
    folder: Path, file: str, kind: str, work: str, option: str, *, shared: bool = False
) -> Iterator[None]:
    """Make a folder, or find it as one of its kind, and hold its lock.

    Args:
      folder: where.
      file: what a folder of this kind has.
      kind, work, option: the kind, what processes do there, and how another one is chosen.
      shared: whether several processes may hold it.

    Raises:
      UserError: if it is a folder of another kind, or cannot be written.
      InUseError: if another process has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = [p.name for p in folder.iterdir() if p.name[0] != "."]
        if others and not (folder / file).exists():
            raise UserError(
                f"{folder}: is no {kind}'s folder (it has {others[0]}, but no {file}); "
                f"choose another folder with {option} (make: RUN=DIR)"
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
def alone(lock: Path) -> Iterator[None]:
    """Wait until no other process holds the lock of a file, and hold it."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
