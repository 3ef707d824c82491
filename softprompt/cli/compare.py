"""`softprompt compare`: train several methods on one experiment and compare them."""

import argparse
import contextlib
import dataclasses
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from softprompt.cli.arguments import add_command, add_experiment, folder_option, integers, names
from softprompt.cli.progress import Bar, printed_log
from softprompt.cli.tables import print_table
from softprompt.errors import Stopped, UserError
from softprompt.experiment.methods import METHODS
from softprompt.runtime.signals import SIGNALS, handled_signals

if TYPE_CHECKING:
    from softprompt.sweep.comparison import Row

_TRAIN = "from softprompt.cli.compare import train_alone; train_alone()"
_STOPPED = {  # exit statuses of a process that a signal stopped, before or while it trained
    status: number for number in SIGNALS for status in (-number, 128 + number)
}
_MAX_CELL = 300  # characters, in compare.md


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
compare.md and compare.csv in the folder. If a run fails, the table says why, the other runs are
still trained, and the exit status is 1.
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
    """Compare the methods, and print and write the table.

    Raises:
      UserError: if a run failed, after the table is printed.
    """
    from softprompt.files.writing import write_errors, write_file
    from softprompt.report.tables import table
    from softprompt.sweep.comparison import compare

    folder = options.folder or Path("runs") / "compare" / options.experiment.stem
    with folder_option("--folder"):
        rows = compare(
            options.experiment, options.methods, options.seeds, options.words, folder, train
        )
    cells = table_rows(rows)
    print_table(
        cells,
        f"all columns are in {folder / 'compare.md'}",
        keep={rows[0].metric, "error"},
        left={"error"},
    )
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "compare.md", table(cells, "markdown", width=_MAX_CELL) + "\n")
        write_file(folder / "compare.csv", table(_csv_rows(rows), "csv") + "\n")
    failed = [row for row in rows if row.error]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(rows)} methods have failed runs, the first: "
            f"{failed[0].method}: {failed[0].error}; run the same command again to retry them"
        )


def train(file: Path, overrides: Sequence[str], folder: Path) -> None:
    """Train one run in its own process, so that its peak memory can be measured.

    Raises:
      UserError: if the run fails, with the reason.
      Stopped: on a signal, after the process has saved its state.
    """
    command = [sys.executable, "-c", _TRAIN, str(file), str(folder), *overrides]
    with tempfile.TemporaryFile() as output:
        # In a session of its own, the process does not receive Ctrl-C directly. It receives
        # each signal once, from here, and a second signal means "stop at once".
        with _signals_passed_on() as (received, receivers):
            process = subprocess.Popen(command, stdout=output, start_new_session=True)
            receivers.append(process)
            if received:
                process.terminate()
            process.wait()
        output.seek(0)
        reason = output.read().decode("utf-8", errors="replace").strip()
    if received:
        raise Stopped(received[0], "stopped; run the same command again to resume")
    if process.returncode in _STOPPED:
        raise Stopped(_STOPPED[process.returncode], "a run was stopped; so is the comparison")
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        raise UserError(f"the process ended with {name}; perhaps the memory was full")
    if process.returncode:
        raise UserError(reason or "the process failed; see the messages above")


@contextlib.contextmanager
def _signals_passed_on() -> Iterator[tuple[list[int], list[subprocess.Popen[bytes]]]]:
    """Pass signals that stop work on to processes, which save their state.

    Yields:
      The numbers of the signals that arrived, and a list for the processes.
    """
    received: list[int] = []
    receivers: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for process in receivers:
            process.terminate()

    before = {number: signal.signal(number, pass_on) for number in handled_signals()}
    try:
        yield received, receivers
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_alone() -> None:
    """Train the run that the arguments of this process describe; `train` starts the process.

    The reason of a failure goes to standard output.
    """
    from softprompt.experiment.reading import load_experiment
    from softprompt.training import loop

    file, folder, *overrides = sys.argv[1:]
    try:
        with printed_log(), contextlib.redirect_stdout(sys.stderr), folder_option("--folder"):
            loop.train(load_experiment(file, overrides), Path(folder), progress=Bar)
    except UserError as error:
        sys.stdout.buffer.write(str(error).encode("utf-8", errors="backslashreplace"))
        sys.exit(1)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.number)


def table_rows(rows: "Sequence[Row]") -> list[dict[str, Any]]:
    """The rows of the printed table; the column `error` exists only if there are errors."""

    def quality_range(row: "Row") -> str | None:
        if len(row.quality) < 2:
            return None
        return f"{min(row.quality):.3f} to {max(row.quality):.3f}"

    failed = any(row.error for row in rows)
    measured = any(row.forgetting for row in rows)
    return [
        {
            "method": row.method,
            row.metric: _mean(row.quality),
            "lowest to highest": quality_range(row),
            **({"forgetting": _mean(row.forgetting)} if measured else {}),
            "learned parameters": (
                None if row.trainable_parameters is None else f"{row.trainable_parameters:,}"
            ),
            "kept": _size(row.saved_bytes),
            "training": f"{row.train_seconds:,.0f} s" if row.train_seconds else None,
            "examples/s": f"{row.examples_per_second:.1f}" if row.examples_per_second else None,
            "peak memory": _size(row.peak_memory_bytes),
        }
        | ({"error": row.error} if failed else {})
        for row in rows
    ]


def _csv_rows(rows: "Sequence[Row]") -> list[dict[str, Any]]:
    several = ("quality", "forgetting")  # a value for each seed
    return [
        dataclasses.asdict(row) | {key: " ".join(map(str, getattr(row, key))) for key in several}
        for row in rows
    ]


def _mean(values: Sequence[float]) -> str | None:
    return f"{statistics.mean(values):.3f}" if values else None


def _size(count: int | None) -> str | None:
    """A number of bytes in a readable unit."""
    if count is None:
        return None
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
