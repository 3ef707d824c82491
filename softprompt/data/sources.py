"""Sources of data: the files that a path, a folder or a pattern names, always in one order."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from softprompt.data.formats import READERS
from softprompt.errors import UserError
from softprompt.files.reading import missing_file

Source = str | Sequence[str]
"""A file, a folder, a pattern, a dataset on the hub, or a sequence of them."""


class MissingData(UserError):
    """A source names nothing that exists."""


def source_name(source: Source) -> str:
    """Return a source as text for a message."""
    return source if isinstance(source, str) else ", ".join(source)


def files_of(source: str) -> list[Path]:
    """Return the files of a source, sorted by name.

    Args:
      source: a file; a folder, for the data files that are directly in it; or a pattern with
        `*`, `?`, `[...]` or `**`. Hidden files are left out, unless a pattern names them.

    Raises:
      MissingData: if the source does not exist, or the pattern matches no file.
      UserError: if a folder has no data files, or the files are of several kinds.
    """
    if os.path.isdir(source):
        found = [path for path in _matches(Path(source), "*") if path.suffix in READERS]
        if not found:
            raise UserError(
                f"{source}: the folder has no {', '.join(READERS)} file directly in it; for those "
                f"in its folders, write a pattern such as {source}/**/*.jsonl"
            )
    elif _exists(source):
        return [Path(source)]
    elif not glob.has_magic(source):
        raise MissingData(str(missing_file(Path(source))))
    else:
        folder, pattern = _divided(Path(source))
        found = _matches(folder, pattern)
        if not found:
            raise MissingData(f"{source}: no file matches {pattern} in {folder}")
    kinds = sorted({path.suffix for path in found})
    if len(kinds) > 1:
        raise UserError(
            f"{source}: files of several kinds ({', '.join(kinds)}); name one of them, such as "
            f"*{kinds[0]}"
        )
    return found


def _exists(source: str) -> bool:
    """Whether a file exists, or cannot be looked for. Then an attempt to read it says why."""
    try:
        os.lstat(source)
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True
    return True


def _divided(path: Path) -> tuple[Path, str]:
    """Divide a path into the longest part that exists, and the rest, which is the pattern.

    The part that exists may contain the characters of patterns too.
    """
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    return folder, str(path.relative_to(folder))


def _matches(folder: Path, pattern: str) -> list[Path]:
    names = sorted(glob.glob(pattern, root_dir=folder, recursive=True))
    return [folder / name for name in names if not (folder / name).is_dir()]
