"""Tables as text, Markdown or CSV: the only table maker of the package."""

import csv
import io
import json
from collections.abc import Collection, Sequence
from typing import Any

Row = dict[str, Any]
"""Cells by column name. All rows of a table have the same columns."""

_WIDTH = 60


def table(
    rows: Sequence[Row], form: str, *, left: Collection[str] = (), width: int | None = _WIDTH
) -> str:
    """Format a table.

    Args:
      rows: at least one row.
      form: `text`, `markdown` or `csv`.
      left: columns to align to the left, in addition to the first one. The others are aligned
        to the right.
      width: shorten cells to this number of characters; None: keep them. CSV cells are never
        shortened.

    Returns:
      The lines of the table, without a line break at the end.
    """
    columns = list(rows[0])
    if form == "csv":
        return _csv(rows, columns)
    lines = [columns, *([shorten(cell(value), width) for value in row.values()] for row in rows)]
    to_left = [i == 0 or name in left for i, name in enumerate(columns)]
    if form == "text":
        return "\n".join("  ".join(line).rstrip() for line in _aligned(lines, to_left))
    escaped = [[text.replace("|", "\\|") for text in line] for line in lines]
    head, *body = _aligned(escaped, to_left)
    rule = [
        f"{'-' * (len(text) - 1)}{'-' if is_left else ':'}"
        for text, is_left in zip(head, to_left, strict=True)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *body])


def cell(value: Any) -> str:
    """Format a value for a table: numbers with 4 significant digits, None as `-`."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def shorten(text: str, width: int | None = _WIDTH) -> str:
    """Put a text on one line, and truncate it to a number of characters, if there is one."""
    line = text.replace("\n", "\\n")
    return line if width is None or len(line) <= width else f"{line[: width - 1]}…"


def _aligned(lines: Sequence[Sequence[str]], to_left: Sequence[bool]) -> list[list[str]]:
    """Pad the cells of each column to one width."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        [
            text.ljust(width) if is_left else text.rjust(width)
            for text, width, is_left in zip(line, widths, to_left, strict=True)
        ]
        for line in lines
    ]


def _csv(rows: Sequence[Row], columns: Sequence[str]) -> str:
    written = io.StringIO()
    writer = csv.DictWriter(written, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _scalar(value) for key, value in row.items()} for row in rows)
    return written.getvalue().rstrip("\n")


def _scalar(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float) else json.dumps(value)
