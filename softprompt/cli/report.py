"""`softprompt report`: write a page of figures and tables about runs."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from softprompt.cli.arguments import add_command, folder_option


def add_to(subparsers: Any) -> None:
    """Declare the command and its arguments."""
    command = add_command(
        subparsers,
        "report",
        run,
        "write a page of figures and tables about runs or a sweep",
        """\
Writes report.html, a single file that needs no network, and its tables as .csv and .md; prints
the path of the page. The page shows the metric against the prompt length or another setting
with the spread over seeds, learning curves, all settings together, the best run with the
command that repeats it, its predictions, and the vocabulary tokens nearest to its virtual
tokens.

examples:
  softprompt report runs/sentiment-length
  softprompt report runs/sentiment runs/long --output runs/report""",
    )
    command.add_argument(
        "folders", type=Path, nargs="+", metavar="FOLDER", help="folders of runs or sweeps"
    )
    command.add_argument(
        "--output", type=Path, metavar="DIR", help="where to write (default: the first FOLDER)"
    )


def run(options: argparse.Namespace) -> None:
    """Write the report."""
    from softprompt.report.page import write_report

    with folder_option("--output"):
        page = write_report(options.folders, options.output or options.folders[0], _rerun_command)
    print(page)


def _rerun_command(config: Path) -> str:
    """The command that trains a run again from its config.yaml."""
    return shlex.join(["softprompt", "train", str(config), "--run-dir", "runs/again"])
