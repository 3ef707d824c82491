"""Arguments that several commands of the command line take."""

import argparse
from pathlib import Path
from typing import Any


def add_command(
    chosen: Any, name: str, run: Any, summary: str, text: str
) -> argparse.ArgumentParser:
    command = chosen.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.\n\n{text}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(command=run, name=name)
    return command


def add_run(command: argparse.ArgumentParser, help: str) -> None:
    command.add_argument("run", type=Path, metavar="RUN", help=help)
    add_base(command)


def add_base(command: argparse.ArgumentParser) -> None:
    command.add_argument("--base", metavar="NAME", help="default: the base the prompt names")


def add_batch_size(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--batch-size", type=count, default=32, metavar="N", help="texts a pass (default: 32)"
    )


def add_inputs(command: argparse.ArgumentParser) -> None:
    command.add_argument("words", nargs="*", default=[], metavar="TEXT")
    command.add_argument(
        "--input", metavar="FILE", help="a file of inputs, or - for standard input"
    )
    command.add_argument(
        "--jsonl", action="store_true", help="standard input has a JSON object a line"
    )


def add_scoring(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--normalize", action="store_true", help="divide a label's log-probability by its tokens"
    )
    command.add_argument(
        "--calibrate", metavar="TEXT", help="subtract what a text without content gives a label"
    )


def add_generation(command: argparse.ArgumentParser) -> None:
    kinds: dict[str, tuple[Any, str, str]] = {
        "max_new_tokens": (count, "N", "where to stop at the latest"),
        "temperature": (float, "X", "draw tokens, more evenly the higher it is; 0: the likeliest"),
        "top_k": (count, "N", "draw from so many tokens"),
        "top_p": (float, "X", "draw from the likeliest tokens that have this share"),
        "min_p": (float, "X", "draw from tokens with this share of the likeliest's"),
        "repetition_penalty": (float, "X", "above 1: fewer tokens that were there before"),
        "beams": (count, "N", "beam search"),
        "length_penalty": (float, "X", "of beam search; above 1: longer texts"),
        "samples": (count, "N", "texts for each input"),
        "seed": (int, "N", "of the draws"),
    }
    for name, (kind, metavar, help) in kinds.items():
        command.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=help)
    command.add_argument("--stop", action="append", metavar="TEXT", help="ends a text, left out")
    command.set_defaults(settings=[*kinds, "stop"])


def numbers(text: str) -> list[int]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError("must be whole numbers with commas between them")
    return [int(part) for part in text.split(",")]


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be a whole number, 1 or more")
    return int(text)
