"""`softprompt predict`: label texts with a trained prompt."""

import argparse
import dataclasses
import json
from typing import Any

from softprompt.cli.arguments import (
    add_batch_size,
    add_command,
    add_inputs,
    add_prompt,
    add_scoring,
)
from softprompt.cli.inputs import load_prompt_and_inputs, with_scoring


def add_to(subparsers: Any) -> None:
    """Declare the command and its arguments."""
    command = add_command(
        subparsers,
        "predict",
        run,
        "label texts with a trained prompt",
        """\
Prints one line of JSON per text: the input, the most probable label, and the probability of
every label. Blank lines of a file or of standard input are skipped.

examples:
  softprompt predict runs/sentiment "A dull, lifeless film." "A joy."
  softprompt predict runs/sentiment --input reviews.txt         (one text per line)
  softprompt predict runs/sentiment --input reviews.jsonl       (or .csv: fields by name)
  cat reviews.txt | softprompt predict runs/sentiment --input -""",
    )
    add_prompt(command)
    add_batch_size(command)
    add_inputs(command)
    add_scoring(command)


def run(options: argparse.Namespace) -> None:
    """Label the inputs, and print one line of JSON for each."""
    prompt, records = load_prompt_and_inputs(options)
    predictions = with_scoring(prompt, options).classify(records, options.batch_size)
    for record, prediction in zip(records, predictions, strict=True):
        line = {"input": record.fields, **dataclasses.asdict(prediction)}
        print(json.dumps(line, ensure_ascii=False))
