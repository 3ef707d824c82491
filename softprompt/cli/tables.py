"""Print tables to a terminal, whose width they fit, or in full to a file or a pipe."""

import shutil
import sys
from collections.abc import Collection, Sequence
from typing import Any

from softprompt.cli.progress import print_line


def print_table(
    rows: Sequence[dict[str, Any]],
    all_columns: str,
    *,
    keep: Collection[str] = (),
    left: Collection[str] = (),
    paths: Collection[str] = (),
    wide: bool = False,
) -> None:
    """Print a table to standard output, and name the columns that do not fit the terminal.

    Args:
      rows: at least one row.
      all_columns: where the user finds all columns, such as `--wide shows them`.
      keep, left, paths: columns; see `softprompt.report.tables`.
      wide: print everything, as if there were no terminal.
    """
    from softprompt.report.tables import fitted, table

    if wide or not sys.stdout.isatty():
        print(table(rows, "text", left=left, width=None))
        return
    rows, out = fitted(rows, shutil.get_terminal_size().columns, keep=keep, paths=paths)
    print(table(rows, "text", left=left, paths=paths))
    if out:
        print_line(f"left out to fit the terminal: {', '.join(out)} ({all_columns})")
