"""`softprompt import`: convert another program's prompt or adapter."""

import argparse
from pathlib import Path
from typing import Any

from softprompt.cli.arguments import add_command
from softprompt.errors import UserError


def add_to(subparsers: Any) -> None:
    """Declare the command and its arguments."""
    command = add_command(
        subparsers,
        "import",
        run,
        "convert another program's prompt or adapter",
        """\
Reads the folder of a peft adapter (PROMPT_TUNING, P_TUNING, PREFIX_TUNING or LORA, stored as
safetensors), or a [k, d] array (.npy) of google-research/prompt-tuning, and prints the new
folder. Template and verbalizer come from the experiment file; without one, the input is the
text alone.

examples:
  softprompt import adapters/theirs prompts/theirs --base smollm2-135m-instruct
  softprompt import prompt.npy prompts/lester --experiment experiments/sentiment.yaml""",
    )
    command.add_argument("source", type=Path, metavar="SOURCE", help="a folder, or a .npy file")
    command.add_argument("folder", type=Path, metavar="DIR", help="a new folder")
    command.add_argument(
        "--base",
        metavar="NAME",
        help="the base model of the prompt or adapter (default: the one that the experiment names)",
    )
    command.add_argument(
        "--experiment",
        type=Path,
        metavar="FILE",
        help="a YAML file with the template and the verbalizer",
    )


def run(options: argparse.Namespace) -> None:
    """Convert the prompt or adapter."""
    from softprompt.backbones.loading import load_base
    from softprompt.experiment.reading import load_experiment
    from softprompt.interop.importing import import_prompt

    experiment = load_experiment(options.experiment) if options.experiment else None
    name = options.base or (experiment.base if experiment else None)
    if name is None:
        raise UserError("give the base model with --base, or an experiment that names it")
    base = load_base(
        name, **(experiment.compute.model_dump(exclude={"mesh"}) if experiment else {})
    )
    import_prompt(options.source, options.folder, base, experiment)
    print(options.folder)
