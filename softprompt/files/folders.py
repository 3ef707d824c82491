"""Folders for results, checked before the work whose results they will hold."""

import os
from pathlib import Path

from softprompt.errors import FolderError


def require_usable(folder: Path) -> None:
    """Require that files can be written to a folder, or that the folder can be created.

    Nothing is created here, so that a mistake elsewhere leaves no empty folder behind.

    Args:
      folder: an existing folder or a new one.

    Raises:
      FolderError: if the path or one of its parents is a file, or cannot be written.
    """
    if "\0" in str(folder):
        raise FolderError(f"{str(folder)!r}: a path cannot contain NUL; choose another folder")
    try:
        absolute = folder.absolute()
        existing = next(path for path in (absolute, *absolute.parents) if path.exists())
        if not existing.is_dir():
            raise FolderError(f"{existing}: not a folder; choose another folder")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise FolderError(f"{existing}: cannot be written; choose another folder")
    except OSError as error:  # a name that is too long, or a folder that may not be searched
        reason = error.strerror
        raise FolderError(f"{folder}: cannot be used ({reason}); choose another folder") from None
