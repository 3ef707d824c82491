"""The rows of tables about runs: one per run, or one per combination of settings."""

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softprompt.errors import UserError
from softprompt.experiment.metric_names import lower_is_better
from softprompt.experiment.reading import PATH_KEYS
from softprompt.report.collect import RunRecord
from softprompt.report.tables import Row, cell

PATH_COLUMNS = ("run", *map(".".join, PATH_KEYS))
"""The columns of `run_rows` that hold paths."""


def run_rows(
    records: Sequence[RunRecord], keys: Sequence[str], relative_to: Path | None = None
) -> list[Row]:
    """One row per run: its folder, some of its settings, its seed, and how it ended.

    Args:
      records: the runs.
      keys: the settings to show, such as `prompt.length`.
      relative_to: show folders relative to this one; by default as they were given.
    """
    metrics = dict.fromkeys(record.metric for record in records)
    failed = any(record.error for record in records)
    rows = []
    for record in records:
        folder = os.path.relpath(record.folder, relative_to) if relative_to else record.folder
        row: Row = {"run": str(folder)}
        row |= {key: record.settings.get(key) for key in keys}
        row |= {"seed": record.settings["seed"], "state": record.state, "step": record.step}
        row |= {f"validation {name}": record.validation.get(name) for name in metrics}
        if any(each.test for each in records):
            row |= {f"test {name}": record.test.get(name) for name in metrics}
        if any(each.forgetting is not None for each in records):
            row |= {"forgetting": record.forgetting}
        row |= {"seconds": record.seconds}
        rows.append(row | ({"error": record.error} if failed else {}))
    return rows


def seed_rows(records: Sequence[RunRecord], keys: Sequence[str]) -> list[Row]:
    """One row per combination of settings: the mean, minimum and maximum over its seeds.

    Args:
      records: the runs; those that are not finished are ignored.
      keys: the settings.
    """
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        if record.state == "finished" and record.quality is not None:
            combination = json.dumps([record.settings.get(key) for key in keys])
            groups.setdefault(combination, []).append(record)
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
    """Filter and sort rows.

    Args:
      rows: at least one row; all have the same columns.
      where: conditions `column=value` that a row must all meet.
      sort: the column to sort by; metrics are sorted best first. Rows without a value in it
        come last.
      reverse: reverse the order of the rows that have a value.

    Raises:
      UserError: if a condition is malformed or a column does not exist.
    """

    def column(name: str) -> str:
        if name in rows[0]:
            return name
        matches = [each for each in rows[0] if each.endswith((f" {name}", f".{name}"))]
        if not matches:
            raise UserError(f"no column {name!r}; the columns are {', '.join(rows[0])}")
        return matches[0]

    kept = list(rows)
    for condition in where:
        name, equals, value = condition.partition("=")
        if not equals:
            raise UserError(f"{condition!r}: a condition has the form column=value")
        key = column(name)
        kept = [row for row in kept if _equals(row[key], value)]
    if sort:
        key = column(sort)
        is_metric = key.startswith(("validation ", "test "))
        descending = is_metric and not lower_is_better(key.split(" ", 1)[1])
        present = [row for row in kept if row[key] is not None]
        if any(isinstance(row[key], str) for row in present):
            present.sort(key=lambda row: cell(row[key]))
        else:
            present.sort(key=lambda row: row[key], reverse=descending)
        if reverse:
            present.reverse()
        kept = [*present, *(row for row in kept if row[key] is None)]
    return kept


def _equals(value: Any, text: str) -> bool:
    """Whether a cell shows this text, or is the number that the text denotes."""
    if cell(value) == text:
        return True
    try:
        return isinstance(value, int | float) and value == float(text)
    except ValueError:
        return False
