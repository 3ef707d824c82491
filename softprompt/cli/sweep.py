"""`softprompt sweep`: train an experiment with many settings side by side."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt.cli.arguments import add_command, add_experiment, folder_option
from softprompt.cli.progress import Bar
from softprompt.cli.tables import print_table
from softprompt.errors import UserError
from softprompt.runtime.progress import duration

if TYPE_CHECKING:
    from softprompt.sweep.plan import Plan
    from softprompt.sweep.space import Space, Trial


def add_to(subparsers: Any) -> None:
    """Declare the command and its arguments."""
    command = add_command(
        subparsers,
        "sweep",
        run,
        "train an experiment with many settings side by side, and print a table",
        """\
The sweep section of the file lists values for settings of the experiment. Each combination is
a trial, and trials that can share a compiled program train together. Every trial is a run in
its own folder in DIR/trials/. Prints a table of the trials, best first, and the folder of
the best prompt. Run the same command again to resume a stopped sweep. The exit status is 1 if
a trial failed.

examples:
  softprompt sweep experiments/sentiment-length.yaml --dry-run
  softprompt sweep experiments/sentiment-length.yaml training.steps=60 --folder runs/short
  softprompt sweep experiments/sentiment-length.yaml "sweep.seed=[0]" sweep.at_once=1""",
    )
    add_experiment(command)
    command.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="the sweep folder (default: runs/<name of the file>)",
    )
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="list the trials and estimate their time, without training",
    )
    command.add_argument("--json", action="store_true", help="with --dry-run: print JSON")


def run(options: argparse.Namespace) -> None:
    """Run all trials and print their table, or print the plan."""
    from softprompt.experiment.reading import ExperimentFile
    from softprompt.sweep.plan import plan
    from softprompt.sweep.runner import sweep
    from softprompt.sweep.space import Space

    if options.json and not options.dry_run:
        raise UserError("--json needs --dry-run")
    folder = options.folder or Path("runs") / options.experiment.stem
    space = Space(ExperimentFile(options.experiment, options.words), folder)
    with folder_option("--folder (make: RUN=DIR)"):
        if options.dry_run:
            _print_plan(plan(space, progress=Bar), as_json=options.json)
        else:
            _print_results(space, sweep(space, progress=Bar))


def _print_plan(planned: "Plan", *, as_json: bool) -> None:
    from softprompt.sweep.space import format_parameters

    if as_json:
        print(json.dumps(dataclasses.asdict(planned)))
        return
    for trial in planned.trials:
        parameters = (
            format_parameters(trial.parameters) or "values are chosen when the trial starts"
        )
        print(f"trial {trial.number}: {parameters} (program {trial.group}, {trial.state})")
    for number, group in enumerate(planned.groups):
        where = f" on {group.devices} devices" if group.devices > 1 else ""
        estimate = f"{group.at_once} at once{where}, about {duration(group.seconds)}"
        print(f"program {number}: {group.waiting} trials to run, {group.error or estimate}")
    print(f"total: about {duration(planned.seconds)}")


def _print_results(space: "Space", trials: "Sequence[Trial]") -> None:
    """Print the table and the best prompt.

    Raises:
      UserError: if a trial failed.
    """
    from softprompt.sweep.outcome import Outcome
    from softprompt.sweep.results import ranked, results_rows

    rows = [
        {key: f"{cell:.4f}" if isinstance(cell, float) else cell for key, cell in row.items()}
        for row in results_rows(trials)
    ]
    keep = {"end", *(name for name in rows[0] if name.startswith("validation "))}
    print_table(rows, f"softprompt runs {space.folder} --wide shows all columns", keep=keep)
    outcomes = [(trial, Outcome.read(trial.folder)) for trial in trials]
    running = sum(outcome is None for _, outcome in outcomes)
    if any(outcome and outcome.state == "finished" for _, outcome in outcomes):
        best = "best so far" if running else "best"
        print(f"{best}: {ranked(trials)[0].folder / 'prompt'}", file=sys.stderr)
    if running:
        print(
            f"{running} of {len(trials)} trials are left to other processes; "
            "if these were stopped, run the same command again to resume the trials",
            file=sys.stderr,
        )
    failed = [(trial, end) for trial, end in outcomes if end and end.state == "failed"]
    if failed:
        first, end = failed[0]
        retry = f"; delete its folder ({first.folder}) to retry it"
        raise UserError(
            f"{len(failed)} of {len(trials)} trials failed, the first: {first.name}: {end.error}"
            f"{retry if space.sweep.how != 'tpe' else ''}"
        )
