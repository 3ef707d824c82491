"""Tables as text, Markdown or CSV: the only table maker of the package."""

import csv
import io
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from softprompt.errors import printable

Row = dict[str, Any]
"""Cells by column name. All rows of a table have the same columns."""

_WIDTH = 60
_ENOUGH = 24  # columns are left out before a cell becomes shorter than this to fit a terminal
_MAX_PADDING = 200  # longer cells push the rest of their line to the right
_GAP = 2  # spaces between two columns of a text table


def table(
    rows: Sequence[Row],
    form: str,
    *,
    left: Collection[str] = (),
    paths: Collection[str] = (),
    width: int | None = _WIDTH,
) -> str:
    """Format a table.

    Args:
      rows: at least one row.
      form: `text`, `markdown` or `csv`.
      left: columns to align to the left, in addition to the first one. The others are aligned
        to the right.
      paths: columns of paths, which are shortened at the front.
      width: shorten cells to this number of characters; None: keep them. CSV cells are never
        shortened.

    Returns:
      The lines of the table, without a line break at the end.
    """
    columns = list(rows[0])
    if form == "csv":
        return _csv(rows, columns)
    cells = [[_short(row[name], name in paths, width) for name in columns] for row in rows]
    lines = [[shorten(name, width) for name in columns], *cells]
    to_left = [i == 0 or name in left for i, name in enumerate(columns)]
    if form == "text":
        return "\n".join((" " * _GAP).join(line).rstrip() for line in _aligned(lines, to_left))
    escaped = [[text.replace("|", "\\|") for text in line] for line in lines]
    head, *body = _aligned(escaped, to_left)
    rule = [
        f"{'-' * (len(text) - 1)}{'-' if is_left else ':'}"
        for text, is_left in zip(head, to_left, strict=True)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *body])


def fitted(
    rows: Sequence[Row], space: int, *, keep: Collection[str] = (), paths: Collection[str] = ()
) -> tuple[list[Row], list[str]]:
    """Make rows fit a width: shorten long cells, then leave out columns.

    A heading such as `prompt.length` becomes `length` where that is unambiguous. Columns with
    one value in all rows are left out first, then the last ones. The first column stays.

    Args:
      rows: at least one row.
      space: number of characters in a line of the text table.
      keep: columns that are left out only after all others.
      paths: columns of paths, which are shortened at the front.

    Returns:
      Rows of texts for `table`, and the columns that were left out.
    """
    columns = list(rows[0])
    texts = {name: [_short(row[name], name in paths, _WIDTH) for row in rows] for name in columns}
    widths = {name: max(map(len, [name, *texts[name]])) for name in columns}
    if _line_length(widths.values()) <= space:
        return [dict(row) for row in rows], []
    headings = _last_parts(columns)
    least = {
        name: max(len(headings[name]), min(_ENOUGH, max(map(len, texts[name])))) for name in columns
    }
    widths = {name: max(least[name], *map(len, texts[name])) for name in columns}
    order = sorted(
        reversed(columns[1:]), key=lambda name: (name in keep, len(set(texts[name])) > 1)
    )
    out = []
    while order and _line_length([least[name] for name in columns if name not in out]) > space:
        out.append(order.pop(0))
    shown = {name: width for name, width in widths.items() if name not in out}
    while (excess := _line_length(shown.values()) - space) > 0:
        widest = max(shown, key=lambda name: shown[name] - least[name])
        if shown[widest] == least[widest]:  # only the first column is left
            shown[widest] = max(space, 1)
            break
        shown[widest] -= min(excess, max(1, (shown[widest] - least[widest]) // 2))
    new = [
        {
            shorten(headings[name], width): _short(row[name], name in paths, width)
            for name, width in shown.items()
        }
        for row in rows
    ]
    return new, [name for name in columns if name in out]


def cell(value: Any) -> str:
    """Format a value for a table: numbers with 4 significant digits, None as `-`."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def shorten(text: str, width: int | None = _WIDTH) -> str:
    """Put a text on one line, and truncate it to a number of characters, if there is one.

    Characters that a terminal would not print are escaped.
    """
    line = printable(text if width is None else text[: width + 1])
    return line if width is None or len(line) <= width else f"{line[: width - 1]}…"


def shorten_path(path: str, width: int | None = _WIDTH) -> str:
    """Shorten a path at the front, to its last folders that fit: `…/runs/a`."""
    line = shorten(path, None)
    if width is None or len(line) <= width:
        return line
    end = line[len(line) - width + 1 :]
    slash = end.find("/", 0, -1)
    return f"…{end[max(slash, 0) :]}"


def _short(value: Any, is_path: bool, width: int | None) -> str:
    return shorten_path(cell(value), width) if is_path else shorten(cell(value), width)


def _last_parts(columns: Sequence[str]) -> Mapping[str, str]:
    """The last parts of dotted names where they differ from all other names."""
    last = [name.rpartition(".")[2] or name for name in columns]
    return {
        name: short if last.count(short) == 1 else name
        for name, short in zip(columns, last, strict=True)
    }


def _line_length(widths: Collection[int]) -> int:
    return sum(widths) + _GAP * (len(widths) - 1)


def _aligned(lines: Sequence[Sequence[str]], to_left: Sequence[bool]) -> list[list[str]]:
    """Pad the cells of each column to one width."""
    widths = [min(_MAX_PADDING, max(map(len, column))) for column in zip(*lines, strict=True)]
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
