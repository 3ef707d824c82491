"""`softprompt generate`: generate text with a trained prompt."""

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from softprompt.cli.arguments import (
    add_batch_size,
    add_command,
    add_generation,
    add_inputs,
    add_prompt,
)
from softprompt.cli.inputs import load_prompt_and_inputs
from softprompt.cli.progress import Bar

if TYPE_CHECKING:
    from softprompt.inference.prompt import TrainedPrompt


def add_to(subparsers: Any) -> None:
    """Declare the command and its arguments."""
    command = add_command(
        subparsers,
        "generate",
        run,
        "generate text with a trained prompt",
        """\
Prints the text that the model generates for each input. On a terminal, the text for a single
input appears as it is generated. Options that are not given keep the settings of the
experiment, which default to greedy decoding. In float32 on a CPU, the output is the same
as with transformers and the virtual tokens prepended.

examples:
  softprompt generate runs/summarize "A tool that shows the manual of a command."
  softprompt generate runs/summarize --input texts.txt --json
  softprompt generate runs/summarize --temperature 0.8 --top-p 0.9 --samples 3 --seed 1 "..."
  softprompt generate runs/summarize --beams 4 --length-penalty 0.8 --input texts.txt""",
    )
    add_prompt(command)
    add_batch_size(command)
    add_inputs(command)
    command.add_argument("--json", action="store_true", help="print one line of JSON per input")
    add_generation(command)


def run(options: argparse.Namespace) -> None:
    """Generate, and print the texts."""
    given = {name: getattr(options, name) for name in options.settings}
    settings = {name: value for name, value in given.items() if value is not None}
    prompt, records = load_prompt_and_inputs(options)
    if len(records) == 1 and not options.json and _can_stream(prompt, settings):
        for piece in prompt.stream(records[0], **settings):
            print(piece, end="", flush=True)
        print()
        return
    outputs = prompt.generate(records, options.batch_size, progress=Bar, **settings)
    for record, generated in zip(records, outputs, strict=True):
        if options.json:
            line = {"input": record.fields, **dataclasses.asdict(generated)}
            print(json.dumps(line, ensure_ascii=False))
        else:
            print("\n".join(generated.texts))


def _can_stream(prompt: "TrainedPrompt", settings: dict[str, Any]) -> bool:
    from softprompt.inference.prompt import changed

    generation = changed(prompt.generation, settings)
    return sys.stdout.isatty() and generation.beams == generation.samples == 1
