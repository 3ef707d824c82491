"""Runs as rows of cells, and these as text, Markdown or CSV."""

import csv
import io
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softprompt.errors import UserError
from softprompt.experiment.metric_names import lower_is_better
from softprompt.report.collect import RunRecord

Row = dict[str, Any]
_WIDEST = 60  # characters of a cell


def run_rows(
    records: Sequence[RunRecord], keys: Sequence[str], within: Path | None = None
) -> list[Row]:
    """A row for each run: folder, the given settings, seed, and how it ended.

    Args:
      records: the runs.
      keys: the settings.
      within: the folder that theirs are named from; by default the current one.
    """
    metrics = dict.fromkeys(record.metric for record in records)
    failed = any(record.error for record in records)
    rows = []
    for record in records:
        folder = os.path.relpath(record.folder, within) if within else str(record.folder)
        row: Row = {"run": folder}
        row |= {key: record.settings.get(key) for key in keys}
        row |= {"seed": record.settings["seed"], "state": record.state, "step": record.step}
        row |= {f"validation {name}": record.validation.get(name) for name in metrics}
        if any(each.test for each in records):
            row |= {f"test {name}": record.test.get(name) for name in metrics}
        row |= {"seconds": record.seconds}
        rows.append(row | ({"error": record.error} if failed else {}))
    return rows


def seed_rows(records: Sequence[RunRecord], keys: Sequence[str]) -> list[Row]:
    """A row for each combination of settings: the mean over its seeds, the lowest and highest."""
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        if record.state == "finished" and record.quality is not None:
            place = json.dumps([record.settings.get(key) for key in keys])
            groups.setdefault(place, []).append(record)
    rows = []
    for group in groups.values():
        values = [record.quality for record in group if record.quality is not None]
        row: Row = {key: group[0].settings.get(key) for key in keys}
        row |= {"runs": len(group), "mean": statistics.mean(values)}
        rows.append(row | {"lowest": min(values), "highest": max(values)})
    return rows


def chosen_rows(
    rows: Sequence[Row], where: Sequence[str], sort: str | None, *, reverse: bool = False
) -> list[Row]:
    """The rows whose columns have the given values, sorted.

    Args:
      rows: with the same columns.
      where: `column=value` each.
      sort: a column; of metrics the best come first.
      reverse: sorted the other way round.

    Raises:
      UserError: if there is no such column.
    """

    def column(name: str) -> str:
        if name in rows[0]:
            return name
        known = [each for each in rows[0] if each.endswith((f" {name}", f".{name}"))]
        if not known:
            raise UserError(f"no column {name!r}; there are {', '.join(rows[0])}")
        return known[0]

    kept = list(rows)
    for condition in where:
        name, equals, value = condition.partition("=")
        if not equals:
            raise UserError(f"{condition!r}: a condition is written column=value")
        key = column(name)
        kept = [row for row in kept if _is(row[key], value)]
    if sort:
        key = column(sort)
        of_metric = key.startswith(("validation ", "test "))
        downward = of_metric and not lower_is_better(key.split(" ", 1)[1])
        there = [row for row in kept if row[key] is not None]
        if any(isinstance(row[key], str) for row in there):
            there.sort(key=lambda row: cell(row[key]))
        else:
            there.sort(key=lambda row: row[key], reverse=downward)
        if reverse:
            there.reverse()
        kept = [*there, *(row for row in kept if row[key] is None)]
    return kept


def _is(value: Any, text: str) -> bool:
    """Whether a cell has a value, as it stands in a table or as a number written otherwise."""
    if cell(value) == text:
        return True
    try:
        return isinstance(value, int | float) and value == float(text)
    except ValueError:
        return False


def cell(value: Any) -> str:
    """A value as it stands in a table."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def aligned(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Cells padded to columns: the first one's text to the left, the others' to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        [cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(pairs)]
        for pairs in (zip(row, widths, strict=True) for row in rows)
    ]


def table(rows: Sequence[Row], form: str) -> str:
    """At least one row as `text`, `markdown` or `csv`."""
    if form == "csv":
        written = io.StringIO()
        writer = csv.DictWriter(written, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _scalar(value) for key, value in row.items()} for row in rows)
        return written.getvalue().rstrip("\n")
    cells = [list(rows[0]), *([short(cell(v)) for v in row.values()] for row in rows)]
    if form == "text":
        return "\n".join("  ".join(line).rstrip() for line in aligned(cells))
    lines = aligned([[each.replace("|", "\\|") for each in line] for line in cells])
    rule = [f"{'-' * (len(each) - 1)}{':' if i else '-'}" for i, each in enumerate(lines[0])]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def _scalar(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float) else json.dumps(value)


def short(text: str, widest: int = _WIDEST) -> str:
    """A text on one line of at most so many characters."""
    line = text.replace("\n", "\\n")
    return line if len(line) <= widest else f"{line[: widest - 1]}…"
