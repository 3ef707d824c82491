"""`softprompt study`: write questions and answers about a document."""

import argparse
from pathlib import Path
from typing import Any

from softprompt.cli.arguments import add_command, positive_integer
from softprompt.cli.progress import Bar

_BASE = "smollm2-135m-instruct"


def add_to(subparsers: Any) -> None:
    """Declare the command and its arguments."""
    command = add_command(
        subparsers,
        "study",
        run,
        "write training questions and answers about a document",
        """\
The base model reads the document in chunks and writes questions about each chunk: requests for
lists or summaries, questions about facts, practical questions and creative tasks. Then it reads
the whole document and answers the questions greedily. Each line of the output has a question, its
answer, the kind of question and the number of the chunk. If the command is interrupted, run it
again to continue.

With --experiment, the base model, the template and the section `compute` come from an experiment
with `objective: distill`. If its teacher is the same base model and reads the same document, the
teacher would give the same answers.

examples:
  softprompt study manual.txt
  softprompt study manual.txt --questions 64 --seed 1 --output held-out.jsonl
  softprompt study manual.txt --experiment compress-manual.yaml --output train.jsonl""",
    )
    _add_options(command)


def _add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("document", type=Path, metavar="DOCUMENT", help="a text file")
    command.add_argument(
        "--experiment",
        type=Path,
        metavar="FILE",
        help="take the base model, the template and `compute` from this experiment",
    )
    command.add_argument(
        "--base",
        metavar="NAME",
        help=f"base model (default: from the experiment, otherwise {_BASE})",
    )
    command.add_argument(
        "--questions",
        type=positive_integer,
        default=256,
        metavar="N",
        help="number of questions (default: 256)",
    )
    command.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="output file, .jsonl (default: DOCUMENT with the ending .questions.jsonl)",
    )
    command.add_argument(
        "--max-new-tokens",
        type=positive_integer,
        default=128,
        metavar="N",
        help="maximum number of tokens in an answer (default: 128)",
    )
    command.add_argument(
        "--batch-size",
        type=positive_integer,
        default=16,
        metavar="N",
        help="number of questions to write and answer together (default: 16)",
    )
    command.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="random seed for the questions (default: 0)",
    )


def run(options: argparse.Namespace) -> None:
    """Write the questions, and print the path of the file."""
    from softprompt.backbones.loading import load_base
    from softprompt.data.teacher import read_context
    from softprompt.experiment.reading import load_experiment
    from softprompt.inference.study import Study, StudySettings
    from softprompt.inference.study_file import write_study
    from softprompt.training.preparation import mesh_of

    document = read_context(options.document)
    template, mesh, compute, name = None, None, {}, options.base or _BASE
    if options.experiment:
        experiment = load_experiment(options.experiment)
        template = experiment.template
        mesh, compute = mesh_of(experiment), experiment.compute.model_dump(exclude={"mesh"})
        name = options.base or experiment.base
    settings = StudySettings(
        options.questions, options.seed, options.max_new_tokens, options.batch_size
    )
    study = Study(document, load_base(name, **compute, mesh=mesh), template, settings)
    path = options.output or options.document.with_suffix(".questions.jsonl")
    write_study(study, path, Bar)
    print(path)
