"""`softprompt show`: show the examples of an experiment as the model reads them."""

import argparse
import itertools
from typing import Any

from softprompt.cli.arguments import add_command, add_experiment, positive_integer
from softprompt.cli.progress import Bar, print_line
from softprompt.errors import UserError


def add_to(subparsers: Any) -> None:
    """Declare the command and its arguments."""
    command = add_command(
        subparsers,
        "show",
        run,
        "show examples exactly as the model reads them in training",
        """\
Prints the first examples of a split. Special tokens, spaces and line breaks are visible, and the
tokens that carry loss are in brackets. Nothing is trained.

examples:
  softprompt show experiments/sentiment.yaml
  softprompt show experiments/sentiment.yaml --split validation --number 10
  softprompt show experiments/sentiment.yaml "template.input=Review: {text}\"""",
    )
    add_experiment(command)
    command.add_argument(
        "--split",
        choices=("train", "validation", "test"),
        default="train",
        help="the data to show (default: train)",
    )
    command.add_argument(
        "--number",
        type=positive_integer,
        default=3,
        metavar="N",
        help="number of examples (default: 3)",
    )


def run(options: argparse.Namespace) -> None:
    """Print the examples, and warn of likely mistakes."""
    from softprompt.data.mistakes import template_mistakes
    from softprompt.data.showing import LEGEND, counts_of, shown_example
    from softprompt.experiment.reading import load_experiment
    from softprompt.training.preparation import Preparation

    experiment = load_experiment(options.experiment, options.words)
    task, splits = Preparation(Bar).task(experiment)
    if options.split not in splits:
        raise UserError(
            f"{options.experiment}: has no data.{options.split}; choose another --split "
            f"({', '.join(splits)})"
        )
    records = splits[options.split][: options.number]
    examples = list(itertools.islice(task.examples(records), options.number))
    print(LEGEND)
    for example in examples:
        print(f"\n{example.record.where} ({counts_of(task, example)}):")
        print(shown_example(task, example))
    for mistake in template_mistakes(task, examples):
        print_line(f"likely mistake: {mistake}")
