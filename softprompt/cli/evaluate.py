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
from softprompt.cli.progress import Bar, print_line
from softprompt.cli.tables import print_table
from softprompt.errors import UserError

if TYPE_CHECKING:
    from softprompt.experiment.schema import Experiment
    from softprompt.inference.prompt import TrainedPrompt
    from softprompt.metrics.scores import Scores
    from softprompt.training.inputs import Inputs
    from softprompt.training.teachers import PreparedTeacher


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
    command.add_argument(
        "--forgetting",
        action="store_true",
        help="also measure how much the prompt raises the loss on plain text (default: "
        "evaluation.forgetting of the run)",
    )
    add_scoring(command)


def run(options: argparse.Namespace) -> None:
    """Evaluate one prompt, or several together."""
    first, *others = options.runs
    config = first / "config.yaml"
    if not os.path.isfile(config):
        raise UserError(f"{first}: not a run folder (it has no config.yaml)")
    single = "metrics", "output", "normalize", "calibrate", "forgetting"
    if others and any(getattr(options, name) for name in single):
        names = ", ".join(f"--{name}" for name in single[:-1])
        raise UserError(f"{names} and --{single[-1]} need a single run")
    experiment = _load_experiment(config, options)
    splits = experiment.data.model_dump(exclude_none=True)
    if options.split not in splits:
        raise UserError(
            f"{config}: has no data.{options.split}; choose another --split ({', '.join(splits)}), "
            f"or train with data.{options.split}=FILE"
        )
    teacher = experiment.objective.teacher
    if others and teacher and teacher.writes_targets and options.split != "test":
        raise UserError(
            f"{config}: the teacher of each run wrote its own targets; evaluate one run at a "
            "time, or all with --split test"
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
    if options.forgetting:
        overrides.append("evaluation.forgetting=true")
    return load_experiment(config, overrides)


def _evaluate_one(options: argparse.Namespace, experiment: "Experiment") -> None:
    from softprompt.evaluation.forgetting import forgetting, require_causal
    from softprompt.evaluation.predictions import require_output
    from softprompt.experiment.metric_names import MODEL_METRICS
    from softprompt.files.writing import write_errors
    from softprompt.inference.prompt import load_prompt
    from softprompt.objectives.choice import objective_of
    from softprompt.objectives.model import Model
    from softprompt.storage.run_folder import write_predictions
    from softprompt.training.measurement import measure

    if options.output:
        require_output(options.output)
    mesh = requested_mesh(options)
    prompt = with_scoring(load_prompt(options.runs[0], options.base, mesh=mesh), options)
    if experiment.evaluation.forgetting:
        require_causal(prompt.base)
    inputs = _read(options, experiment, prompt)
    examples, taught = inputs.examples[options.split], inputs.taught.get(options.split)
    objective = None
    if experiment.objective.custom:
        print_line("the custom objective is not measured, because it exists only in Python code")
    elif experiment.objective.teacher is None or inputs.teacher_digest:
        objective = objective_of(experiment.objective, inputs.task.opening)
    needs_predictions = options.output or set(experiment.evaluation.metrics) - {*MODEL_METRICS}
    model = Model(prompt.method, prompt.base.backbone, inputs.teacher)
    measured = measure(
        experiment.model_copy(update={"scoring": prompt.scoring}),
        inputs.task,
        examples,
        objective,
        (model, prompt.backbone, prompt.prefix),
        options.split,
        Bar,
        max_generated=None if needs_predictions else 0,
        taught=taught,
    )
    scores = dict(measured.scores)
    if experiment.evaluation.forgetting:
        scores["forgetting"] = forgetting(
            prompt.method, prompt.backbone, prompt.base, batch_size=options.batch_size, progress=Bar
        )
    _print_result({"split": options.split, "examples": len(examples)}, scores)
    if options.output:
        with write_errors(options.output):
            write_predictions(options.output, measured.samples)


def _read(
    options: argparse.Namespace, experiment: "Experiment", prompt: "TrainedPrompt"
) -> "Inputs":
    """Read the examples of a split as the run read them, and prepare its teacher."""
    from softprompt.data.splits import read_split
    from softprompt.training.inputs import InputReader
    from softprompt.training.written_targets import SPLITS, read_targets

    split, settings = options.split, experiment.objective
    records, teacher = read_split(experiment, split, Bar), _teacher(experiment, prompt)
    if settings.teacher and settings.teacher.writes_targets and split in SPLITS:
        written = read_targets(prompt.task, records, split, options.runs[0])
        records = written.records
        if teacher is not None and teacher.digest != written.header["teacher"]:
            _say_not_measured("the teacher has changed since it wrote the targets")
            teacher = None
    splits = {split: records}
    return InputReader(Bar).read(experiment, prompt.task, splits, teacher, trains=False)


def _teacher(experiment: "Experiment", prompt: "TrainedPrompt") -> "PreparedTeacher | None":
    """Prepare the teacher of a run, if it has one. If it is no longer there, say so."""
    from softprompt.data.splits import read_split
    from softprompt.training.teachers import prepare_teacher

    settings = experiment.objective.teacher
    if settings is None:
        return None
    try:
        shown = read_split(experiment, "train") if settings.shots else []
        return prepare_teacher(experiment, prompt.base, shown, prompt.task)
    except UserError as error:
        _say_not_measured(str(error))
        return None


def _say_not_measured(reason: str) -> None:
    print_line(f"objective_loss and agreement are not measured: {reason}")


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
    records = read_split(experiment, options.split, Bar)
    examples = make_examples(shared_task(prompts), records, options.split, Bar)
    results = evaluate_ensemble(prompts, examples, options.batch_size, options.split, Bar)
    for name, metrics in zip([*options.runs, "vote", "mean"], results.values(), strict=True):
        about = {"run": str(name), "split": options.split, "examples": len(examples)}
        print(json.dumps({**about, **metrics}))
