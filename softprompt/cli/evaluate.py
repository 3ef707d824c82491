"""`softprompt eval`: evaluate trained prompts on a split of their data."""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt.cli.arguments import add_base, add_batch_size, add_command, add_scoring
from softprompt.cli.inputs import requested_mesh, with_scoring
from softprompt.cli.progress import Bar
from softprompt.cli.tables import print_table
from softprompt.errors import UserError

if TYPE_CHECKING:
    from softprompt.experiment.schema import Experiment
    from softprompt.metrics.scores import Scores


def add_to(subparsers: Any) -> None:
    """Declare the command and its arguments."""
    command = add_command(
        subparsers,
        "eval",
        run,
        "evaluate one or several trained prompts on a split of their data",
        """\
Prints one line of JSON: the split, its number of examples, the loss (nats per target token),
the accuracy if the task has labels, and the metrics of the experiment or of --metrics. Several
prompts of one task are evaluated in one pass: each gets a line, and two more lines are for
the ensemble, by majority vote and by mean probability. On a terminal, the metric confusion is
a table after that line: a row per reference, a column per prediction.

examples:
  softprompt eval runs/sentiment
  softprompt eval runs/sentiment --split validation --metrics macro_f1,matthews
  softprompt eval runs/summarize --output predictions.jsonl       (read by softprompt score)
  softprompt eval runs/seed-0 runs/seed-1 runs/seed-2""",
    )
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run folder")
    add_base(command)
    add_batch_size(command)
    command.add_argument(
        "--split",
        choices=("train", "validation", "test"),
        default="test",
        help="the data to evaluate on (default: test)",
    )
    command.add_argument(
        "--metrics",
        metavar="A,B",
        help="metrics, separated by commas (default: those of the experiment)",
    )
    command.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="write inputs, references and predictions to a .jsonl file; earlier predictions in "
        "it are replaced, but no other file is",
    )
    add_scoring(command)


def run(options: argparse.Namespace) -> None:
    """Evaluate one prompt, or several together."""
    first, *others = options.runs
    config = first / "config.yaml"
    if not os.path.isfile(config):
        raise UserError(f"{first}: not a run folder (it has no config.yaml)")
    if others and (options.metrics or options.output or options.calibrate or options.normalize):
        raise UserError("--metrics, --output, --normalize and --calibrate need a single run")
    experiment = _load_experiment(config, options)
    splits = experiment.data.model_dump(exclude_none=True)
    if options.split not in splits:
        raise UserError(
            f"{config}: has no data.{options.split}; choose another --split ({', '.join(splits)}), "
            f"or train with data.{options.split}=FILE"
        )
    if others:
        _evaluate_several(options, experiment)
    else:
        _evaluate_one(options, experiment)


def _load_experiment(config: Path, options: argparse.Namespace) -> "Experiment":
    from softprompt.experiment.reading import load_experiment

    overrides = [f"evaluation.batch_size={options.batch_size}"]
    if options.metrics:
        overrides += [f"evaluation.metrics=[{options.metrics}]", "evaluation.metric=loss"]
    return load_experiment(config, overrides)


def _evaluate_one(options: argparse.Namespace, experiment: "Experiment") -> None:
    from softprompt.data.datasets import make_examples
    from softprompt.data.preferences import preference_examples
    from softprompt.data.splits import read_split
    from softprompt.evaluation.evaluate import evaluate
    from softprompt.evaluation.objective import measure_objective
    from softprompt.evaluation.predictions import require_output
    from softprompt.experiment.metric_names import MODEL_METRICS
    from softprompt.files.writing import write_errors
    from softprompt.inference.prompt import load_prompt
    from softprompt.objectives.choice import objective_of
    from softprompt.objectives.model import Model
    from softprompt.storage.run_folder import write_predictions

    if options.output:
        require_output(options.output)
    mesh = requested_mesh(options)
    prompt = with_scoring(load_prompt(options.runs[0], options.base, mesh=mesh), options)
    pairs = experiment.objective.name == "preference"
    encode = preference_examples if pairs else make_examples
    examples = encode(prompt.task, read_split(experiment, options.split), options.split, Bar)
    needs_predictions = options.output or set(experiment.evaluation.metrics) - {*MODEL_METRICS}
    measured = evaluate(
        prompt.backbone,
        prompt.prefix,
        prompt.task,
        examples,
        experiment.model_copy(update={"scoring": prompt.scoring}),
        options.split,
        max_generated=None if needs_predictions else 0,
        progress=Bar,
    )
    scores = dict(measured.scores)
    if pairs:
        scores |= measure_objective(
            objective_of(experiment.objective, prompt.task.opening),
            Model(prompt.method, prompt.base.backbone),
            examples,
            options.batch_size,
            f"{options.split}: preference",
            Bar,
        )
    _print_result({"split": options.split, "examples": len(examples)}, scores)
    if options.output:
        with write_errors(options.output):
            write_predictions(options.output, measured.samples)


def _print_result(about: Mapping[str, Any], scores: "Mapping[str, Scores]") -> None:
    """Print one line of JSON. On a terminal, a confusion matrix is printed as a table after it."""
    from softprompt.metrics.labels import confusion_rows
    from softprompt.metrics.scores import all_values

    in_line = dict(scores)
    confusion = in_line.pop("confusion", None) if sys.stdout.isatty() else None
    print(json.dumps({**about, **all_values(in_line)}))
    if confusion:
        rows = confusion_rows(confusion.values())
        print_table(rows, "a pipe or a file gets all values as JSON")


def _evaluate_several(options: argparse.Namespace, experiment: "Experiment") -> None:
    from softprompt.data.datasets import make_examples
    from softprompt.data.splits import read_split
    from softprompt.inference.ensemble import evaluate_ensemble, shared_task
    from softprompt.inference.prompt import load_prompt

    first = load_prompt(options.runs[0], options.base, mesh=requested_mesh(options))
    prompts = [first, *(load_prompt(run, first.base) for run in options.runs[1:])]
    records = read_split(experiment, options.split)
    examples = make_examples(shared_task(prompts), records, options.split, Bar)
    results = evaluate_ensemble(prompts, examples, options.batch_size, options.split, Bar)
    for name, metrics in zip([*options.runs, "vote", "mean"], results.values(), strict=True):
        about = {"run": str(name), "split": options.split, "examples": len(examples)}
        print(json.dumps({**about, **metrics}))
