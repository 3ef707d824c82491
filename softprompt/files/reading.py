"""Read files from outside: only regular files, only up to a limit, only valid text.

A file from outside may be damaged or hostile. All readers of such files open them here, so
that a pipe cannot block the process and a huge file cannot fill the memory.
"""

import io
import os
import stat
from pathlib import Path

from softprompt.errors import UserError

MEBIBYTE = 2**20


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
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # a NUL in the path
        raise UserError(f"{str(path)!r}: cannot be read ({error})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path}: not a regular file")
    return os.fdopen(descriptor, "rb")


def read_text(path: Path, limit: int = 16 * MEBIBYTE) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Args:
      path: the file.
      limit: the largest size to read, in bytes.

    Raises:
      UserError: as `open_file`, or if the file is larger or is not UTF-8.
    """
    with open_file(path) as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > limit:
        raise UserError(f"{path}: larger than {limit // MEBIBYTE} MiB")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
