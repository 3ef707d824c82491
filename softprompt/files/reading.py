"""Read files from outside: only regular files, only up to a limit, only valid text.

A file from outside may be damaged or hostile. All readers of such files open them here, so
that a pipe cannot block the process and a huge file cannot fill the memory.
"""

import contextlib
import difflib
import io
import itertools
import os
import stat
from pathlib import Path

from softprompt.errors import UserError

MEBIBYTE = 2**20
_MAX_NAMES = 1000  # of a folder that are compared with a missing name


def missing_file(path: Path) -> UserError:
    """Return the error for a file that does not exist; it proposes one with a similar name.

    Only a typing mistake is similar: files of other splits must not be proposed.
    """
    if not path.parent.is_dir():
        return UserError(f"{path}: no such file; there is no folder {path.parent}")
    names: list[str] = []
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        listed = itertools.islice(entries, _MAX_NAMES)
        names += (e.name for e in listed if Path(e.name).suffix == path.suffix)
    close = difflib.get_close_matches(path.stem, [Path(name).stem for name in names], 1, 0.75)
    hint = f"; did you mean {close[0] + path.suffix!r}?" if close else ""
    return UserError(f"{path}: no such file{hint}")


def open_file(path: Path) -> io.BufferedReader:
    """Open a regular file for reading.

    Args:
      path: the file. Symbolic links are followed.

    Raises:
      UserError: if it does not exist, cannot be read, or is a folder, a pipe or a device.
    """
    try:
        # Opening a pipe without O_NONBLOCK would wait for a writer, perhaps forever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise missing_file(path) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # a NUL in the path
        raise UserError(f"{str(path)!r}: cannot be read ({error})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path}: not a regular file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, limit: int = 16 * MEBIBYTE) -> bytes:
    """Read a whole file.

    Args:
      path: the file.
      limit: the largest size to read, in bytes.

    Raises:
      UserError: as `open_file`, or if the file is larger.
    """
    with open_file(path) as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > limit:
        raise UserError(f"{path}: larger than {limit // MEBIBYTE} MiB")
    return content


def read_text(path: Path, limit: int = 16 * MEBIBYTE) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Args:
      path: the file.
      limit: the largest size to read, in bytes.

    Raises:
      UserError: as `read_bytes`, or if the file is not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
