"""`softprompt show`: show the examples of an experiment as the model reads them."""

import argparse
import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

from softprompt.cli.arguments import add_command, add_experiment, positive_integer
from softprompt.cli.progress import Bar, print_line
from softprompt.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from softprompt.data.examples import Example
    from softprompt.data.records import Record
    from softprompt.data.task import Task
    from softprompt.experiment.schema import Experiment


def add_to(subparsers: Any) -> None:
    """Declare the command and its arguments."""
    command = add_command(
        subparsers,
        "show",
        run,
        "show examples exactly as the model reads them in training",
        """\
Prints the first examples of a split. Special tokens, spaces and line breaks are visible, and the
tokens that carry loss are in brackets. Nothing is trained. Targets that a teacher will write are
not known yet.

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
    from softprompt.data.showing import LEGEND, UNKNOWN, counts_of, shown_example
    from softprompt.experiment.reading import load_experiment
    from softprompt.training.preparation import Preparation
    from softprompt.training.written_targets import SPLITS

    experiment = load_experiment(options.experiment, options.words)
    task, splits = Preparation(Bar).task(experiment)
    if options.split not in splits:
        raise UserError(
            f"{options.experiment}: has no data.{options.split}; choose another --split "
            f"({', '.join(splits)})"
        )
    task = _limited(task, experiment, splits)
    records = splits[options.split][: options.number]
    teacher = experiment.objective.teacher
    written = teacher is not None and teacher.writes_targets and options.split in SPLITS
    examples = _without_targets(task, records) if written else task.examples(records)
    shown = list(itertools.islice(examples, options.number))
    print(LEGEND)
    if written:
        print(f"the teacher will write the targets ⟦{UNKNOWN}⟧ before training")
    for example in shown:
        print(f"\n{example.record.where} ({counts_of(task, example)}):")
        print(shown_example(task, example))
    for mistake in template_mistakes(task, shown):
        print_line(f"likely mistake: {mistake}")


def _limited(
    task: "Task", experiment: "Experiment", splits: "Mapping[str, Sequence[Record]]"
) -> "Task":
    """Return the task with the teacher's token limit, if there is a teacher that can be loaded."""
    from softprompt.training.teachers import prepare_teacher

    if experiment.objective.teacher is None:
        return task
    try:
        return prepare_teacher(experiment, task.base, splits["train"], task).limited(task)
    except UserError as error:
        print_line(f"the token limit of the teacher is not known: {error}")
        return task


def _without_targets(task: "Task", records: "Sequence[Record]") -> "Iterator[Example]":
    """Yield the examples of records whose last targets are not known."""
    from softprompt.data.showing import UNKNOWN

    for example in task.examples([task.with_target(record, UNKNOWN) for record in records]):
        yield dataclasses.replace(example, candidates=[], answer=None)
