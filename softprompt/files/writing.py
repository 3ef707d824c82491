"""Atomic writes: a file is either complete or unchanged."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from softprompt.errors import UserError


def write_file(path: Path, text: str) -> None:
    """Replace a file atomically.

    The text is written to a temporary file, flushed to disk and renamed, so that a crash
    leaves either the old content or the new one.

    Raises:
      OSError: if it cannot be written; see `write_errors`.
    """
    new = _temporary(path)
    try:
        with new.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)  # half a file would keep a full disk full
        raise


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn an error of the operating system in the context into a message that names the path.

    Raises:
      UserError: one line.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    except ValueError as error:
        if "\0" not in str(path):
            raise
        raise UserError(f"{str(path)!r}: cannot be written ({error})") from None


def require_writable(path: Path) -> None:
    """Check that `write_file` can write a file, before long work whose result it will hold.

    Raises:
      UserError: if the folder does not exist or cannot be written, or if the path is a folder,
        a pipe or a device.
    """
    with write_errors(path):
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: cannot be written (not a regular file)")
        new = _temporary(path)
        new.open("x").close()
        new.unlink()


def _temporary(path: Path) -> Path:
    """Return the path of the temporary file, where nothing exists.

    The name contains the number of the process, because several may write the same file. What a
    killed process left there is removed, and so is a link or a pipe, which would send the text
    elsewhere.
    """
    new = path.parent / f".{path.name}.{os.getpid()}.new"
    new.unlink(missing_ok=True)
    return new
