"""`softprompt compare`: train several methods on one experiment and compare them."""

import argparse
import dataclasses
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt.cli.arguments import add_command, add_experiment, folder_option, integers, names
from softprompt.errors import UserError
from softprompt.experiment.methods import METHODS

if TYPE_CHECKING:
    from softprompt.sweep.comparison import Row


def add_to(subparsers: Any) -> None:
    """Declare the command and its arguments."""
    command = add_command(
        subparsers,
        "compare",
        run,
        "train several methods on one experiment, and print a table",
        f"""\
Trains each method with each seed in its own run, skips runs that are already finished, and
prints a table of the quality and the cost of each method. The table is also written to
compare.md and compare.csv in the folder.
Methods: {", ".join(METHODS)}, few-shot.
Two of them train nothing: none is the base model alone, and few-shot is the base model with
solved examples in its input (as many as the experiment's shots, or 4).

examples:
  softprompt compare experiments/sentiment.yaml
  softprompt compare experiments/sentiment.yaml --methods none,prompt,lora --seeds 0,1,2
  softprompt compare experiments/sentiment.yaml training.steps=80 --folder runs/short""",
    )
    add_experiment(command)
    command.add_argument(
        "--methods",
        type=names,
        default=["none", "few-shot", "prompt", "prefix", "lora", "full"],
        metavar="A,B",
        help="methods, separated by commas (default: none,few-shot,prompt,prefix,lora,full)",
    )
    command.add_argument(
        "--seeds",
        type=integers,
        default=[0],
        metavar="N,M",
        help="random seeds, separated by commas (default: 0)",
    )
    command.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="folder of the runs (default: runs/compare/<name of the file>)",
    )


def run(options: argparse.Namespace) -> None:
    """Compare the methods, and print and write the table."""
    from softprompt.files.writing import write_file
    from softprompt.report.tables import table
    from softprompt.sweep.comparison import compare

    folder = options.folder or Path("runs") / "compare" / options.experiment.stem
    with folder_option("--folder"):
        rows = compare(
            options.experiment, options.methods, options.seeds, options.words, folder, train
        )
    cells = table_rows(rows)
    write_file(folder / "compare.md", table(cells, "markdown") + "\n")
    write_file(folder / "compare.csv", table(_csv_rows(rows), "csv") + "\n")
    print(table(cells, "text"))


def train(file: Path, overrides: Sequence[str], folder: Path) -> None:
    """Train one run in its own process, so that its peak memory can be measured.

    Raises:
      UserError: if the process fails; it has printed the reason.
    """
    command = [sys.executable, "-m", "softprompt", "train", str(file), *overrides]
    done = subprocess.run([*command, "--run-dir", str(folder)], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise UserError(
            f"{folder}: training failed, see the message above; "
            "run the same command again to resume"
        )


def table_rows(rows: "Sequence[Row]") -> list[dict[str, Any]]:
    """The rows of the printed table."""

    def quality_range(row: "Row") -> str | None:
        if len(row.quality) == 1:
            return None
        return f"{min(row.quality):.3f} to {max(row.quality):.3f}"

    return [
        {
            "method": row.method,
            row.metric: f"{statistics.mean(row.quality):.3f}",
            "lowest to highest": quality_range(row),
            "learned parameters": f"{row.trainable_parameters:,}",
            "kept": _size(row.saved_bytes),
            "training": f"{row.train_seconds:,.0f} s" if row.train_seconds else None,
            "examples/s": f"{row.examples_per_second:.1f}" if row.examples_per_second else None,
            "peak memory": _size(row.peak_memory_bytes),
        }
        for row in rows
    ]


def _csv_rows(rows: "Sequence[Row]") -> list[dict[str, Any]]:
    return [dataclasses.asdict(row) | {"quality": " ".join(map(str, row.quality))} for row in rows]


def _size(count: int) -> str:
    """A number of bytes in a readable unit."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
