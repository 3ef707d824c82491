"""`softprompt runs`: list runs in a table."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softprompt.cli.arguments import add_command
from softprompt.cli.progress import print_line
from softprompt.cli.tables import print_table


def add_to(subparsers: Any) -> None:
    """Declare the command and its arguments."""
    command = add_command(
        subparsers,
        "runs",
        run,
        "list runs in a table",
        """\
Searches folders for runs, including subfolders, and prints one row per run: the settings that
differ between the runs, the state and the last step, and the metric that selects the best
prompt. The last part of a column's name is enough to name it: length for prompt.length,
accuracy for validation accuracy. On a terminal, the table leaves out columns that do not fit.

examples:
  softprompt runs
  softprompt runs runs/sentiment-length --sort accuracy
  softprompt runs --where method=lora --where seed=0 --json""",
    )
    command.add_argument(
        "folders", type=Path, nargs="*", metavar="FOLDER", help="folders to search (default: runs)"
    )
    command.add_argument(
        "--sort", metavar="COLUMN", help="sort by a column; metrics are sorted best first"
    )
    command.add_argument("--reverse", action="store_true", help="reverse the order")
    command.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="COLUMN=VALUE",
        help="keep runs with this value; may be given several times",
    )
    command.add_argument(
        "--wide",
        action="store_true",
        help="print all columns, also where they do not fit",
    )
    command.add_argument("--json", action="store_true", help="print one line of JSON per run")


def run(options: argparse.Namespace) -> None:
    """Print the runs."""
    from softprompt.report.collect import collect, varied
    from softprompt.report.rows import PATH_COLUMNS, chosen_rows, run_rows

    records = collect(options.folders or [Path("runs")])
    asked = [condition.partition("=")[0] for condition in options.where]
    rows = run_rows(records, varied(records, [*asked, options.sort]))
    rows = chosen_rows(rows, options.where, options.sort, reverse=options.reverse)
    if not rows:
        print_line(f"none of the {len(records)} runs matches")
    elif options.json:
        for row in rows:
            print(json.dumps(row))
    else:
        print_table(
            rows,
            "--wide shows all columns",
            keep=[name for name in rows[0] if _is_asked(name, [*asked, options.sort])],
            left={"error"},
            paths=PATH_COLUMNS,
            wide=options.wide,
        )


def _is_asked(name: str, asked: Sequence[str | None]) -> bool:
    """Whether a column is a metric, or the user named it, perhaps by its last part."""
    ends = {name, name.rpartition(".")[2], name.rpartition(" ")[2]}
    return name.startswith(("validation ", "test ")) or not ends.isdisjoint(asked)
