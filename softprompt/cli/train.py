"""`softprompt train`: train the prompt of an experiment, or resume a stopped run."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from softprompt.cli.arguments import add_command, add_experiment, folder_option
from softprompt.cli.cluster import cluster
from softprompt.cli.progress import Bar
from softprompt.runtime.progress import silent


def add_to(subparsers: Any) -> None:
    """Declare the command and its arguments."""
    command = add_command(
        subparsers,
        "train",
        run,
        "train a prompt, or resume a stopped run",
        """\
Trains what the experiment file describes and prints a summary as JSON: steps, training time,
and the metrics on the validation and test data. The run folder receives prompt/ (load this
one), checkpoints/, config.yaml, metrics.jsonl, summary.json and curves.png. Run the same
command again to resume a stopped run.

examples:
  softprompt train experiments/sentiment.yaml
  softprompt train experiments/sentiment.yaml prompt.length=50 seed=1 --run-dir runs/long
  softprompt train experiments/sentiment.yaml base=path/to/model optimizer.learning_rate=3e-3""",
    )
    add_experiment(command)
    command.add_argument(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="the run folder (default: runs/<name of the experiment>)",
    )


def run(options: argparse.Namespace) -> None:
    """Train, and print the summary."""
    from softprompt.experiment.reading import load_experiment
    from softprompt.training.loop import train

    with cluster() as shows:
        experiment = load_experiment(options.experiment, options.words)
        folder = options.run_dir or Path("runs") / experiment.name
        with folder_option("--run-dir (make: RUN=DIR)"):
            summary = train(experiment, folder, progress=Bar if shows else silent)
    if shows:
        print(json.dumps(summary, indent=2))
        print(f"prompt: {folder / 'prompt'}", file=sys.stderr)
