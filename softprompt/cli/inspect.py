"""`softprompt inspect`: show what the virtual tokens of a prompt are similar to."""

import argparse
import json
from typing import Any

from softprompt.cli.arguments import add_command, add_prompt, positive_integer
from softprompt.cli.inputs import load_prompt


def add_to(subparsers: Any) -> None:
    """Declare the command and its arguments."""
    command = add_command(
        subparsers,
        "inspect",
        run,
        "show each virtual token's norm and nearest vocabulary tokens",
        """\
Prints a table with one row per virtual token: its Euclidean norm, and the vocabulary tokens
whose embeddings have the highest cosine similarity to it.

examples:
  softprompt inspect runs/sentiment
  softprompt inspect runs/sentiment --nearest 10""",
    )
    add_prompt(command)
    command.add_argument(
        "--nearest",
        type=positive_integer,
        default=5,
        metavar="N",
        help="number of vocabulary tokens per virtual token (default: 5)",
    )


def run(options: argparse.Namespace) -> None:
    """Print the table."""
    from softprompt.inference.inspect import nearest_tokens
    from softprompt.report.tables import table

    prompt = load_prompt(options)
    tokens = nearest_tokens(prompt, options.nearest)
    about = {key: prompt.description[key] for key in ("experiment", "step", "validation")}
    nearest = "nearest tokens (cosine similarity)"
    rows = [
        {
            "token": number,
            "norm": f"{token.norm:.3f}",
            nearest: "  ".join(f"{text!r} {similarity:.2f}" for text, similarity in token.nearest),
        }
        for number, token in enumerate(tokens)
    ]
    print(f"{len(tokens)} virtual tokens on {prompt.base.name}, {json.dumps(about)}")
    print(table(rows, "text", left={nearest}, width=None))
