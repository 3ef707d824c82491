"""Arguments that several commands share, and the parsing of their values."""

import argparse
import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from softprompt.errors import FolderError, UserError

_MAX_DIGITS = 18  # of a whole number that an option takes
_MESH_AXIS = r"(?:data|fsdp|model)=(?:[1-9]\d{0,5}|-1)"


def add_command(
    subparsers: Any,
    name: str,
    run: Callable[[argparse.Namespace], None],
    summary: str,
    text: str,
) -> argparse.ArgumentParser:
    """Add a command.

    Args:
      subparsers: of the main parser.
      name: what the user types.
      run: does the command's work.
      summary: one line for the list of commands.
      text: the rest of the command's own help, with examples.
    """
    command = subparsers.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.\n\n{text}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(command=run, name=name)
    return command


def add_experiment(command: argparse.ArgumentParser) -> None:
    """Add an experiment file and overrides of its settings."""
    command.add_argument("experiment", type=Path, metavar="EXPERIMENT", help="a YAML file")
    command.add_argument(
        "words",
        nargs="*",
        default=[],
        metavar="key=value",
        help="override a setting of the file, such as prompt.length=50",
    )


def add_prompt(command: argparse.ArgumentParser) -> None:
    """Add a trained prompt and the base model to load it on."""
    command.add_argument("run", type=Path, metavar="RUN", help="a run folder, or its prompt/")
    add_base(command)


def add_base(command: argparse.ArgumentParser) -> None:
    """Add the base model of a trained prompt, and the devices to load it on."""
    command.add_argument(
        "--base", metavar="NAME", help="base model (default: the one recorded in the prompt)"
    )
    command.add_argument(
        "--mesh",
        type=mesh_sizes,
        metavar="AXIS=N,...",
        help="the devices to use, such as data=4,model=2; the axes are data, fsdp and model, and "
        "-1 is all remaining devices (default: one device, whatever mesh the prompt was trained "
        "on)",
    )


def add_batch_size(command: argparse.ArgumentParser) -> None:
    """Add the batch size."""
    command.add_argument(
        "--batch-size",
        type=positive_integer,
        default=32,
        metavar="N",
        help="number of texts per forward pass (default: 32)",
    )


def add_inputs(command: argparse.ArgumentParser) -> None:
    """Add input texts, or a file of inputs."""
    command.add_argument("words", nargs="*", default=[], metavar="TEXT", help="an input text")
    command.add_argument(
        "--input",
        metavar="FILE",
        help="read inputs from a file (.jsonl, .csv and .parquet: fields by name; others: one "
        "text per line), or from standard input if FILE is -",
    )
    command.add_argument(
        "--jsonl", action="store_true", help="standard input has one JSON object per line"
    )


def add_scoring(command: argparse.ArgumentParser) -> None:
    """Add the settings of label scoring."""
    command.add_argument(
        "--normalize",
        action="store_true",
        help="divide the log-probability of each label by the number of tokens in its text",
    )
    command.add_argument(
        "--calibrate",
        metavar="TEXT",
        help="calibrate: subtract from each label's score its score for a text without "
        'content, such as "N/A"',
    )


def add_generation(command: argparse.ArgumentParser) -> None:
    """Add the settings of generation; a setting that is not given stays as trained."""
    settings: dict[str, tuple[Any, str, str]] = {
        "max_new_tokens": (positive_integer, "N", "maximum number of tokens to generate"),
        "temperature": (
            float,
            "X",
            "sampling temperature: higher values give more random text; 0: greedy decoding",
        ),
        "top_k": (positive_integer, "N", "top-k sampling: keep the N most probable tokens"),
        "top_p": (
            float,
            "X",
            "nucleus sampling: keep the smallest set of tokens whose probabilities sum to at "
            "least X",
        ),
        "min_p": (
            float,
            "X",
            "min-p sampling: keep tokens with at least X times the probability of the most "
            "probable token",
        ),
        "repetition_penalty": (
            float,
            "X",
            "penalize tokens that occur earlier in the text: values above 1 make repetition rarer",
        ),
        "beams": (positive_integer, "N", "beam search with N beams"),
        "length_penalty": (
            float,
            "X",
            "beam search divides the log-probability of a text by its length to the power of X; "
            "higher values favor longer texts",
        ),
        "samples": (positive_integer, "N", "number of texts per input"),
        "seed": (int, "N", "random seed of sampling"),
    }
    for name, (kind, metavar, help) in settings.items():
        command.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=help)
    command.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="end the output before this text; may be given several times",
    )
    command.set_defaults(settings=[*settings, "stop"])


@contextlib.contextmanager
def folder_option(option: str) -> Iterator[None]:
    """End each `FolderError` raised in the context with the option that chooses the folder."""
    try:
        yield
    except FolderError as error:
        raise UserError(f"{error} with {option}") from None


def integers(text: str) -> list[int]:
    """Parse whole numbers separated by commas."""
    parts = text.split(",")
    if not all(part.isdecimal() and len(part) <= _MAX_DIGITS for part in parts):
        raise argparse.ArgumentTypeError("must be whole numbers separated by commas")
    return [int(part) for part in parts]


def names(text: str) -> list[str]:
    """Parse names separated by commas."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise argparse.ArgumentTypeError("must be names separated by commas")
    return parts


def mesh_sizes(text: str) -> dict[str, int]:
    """Parse the sizes of a mesh by axis, such as `data=4,model=2`."""
    parts = re.fullmatch(rf"{_MESH_AXIS}(?:,{_MESH_AXIS})*", text) and text.split(",")
    sizes = {axis: int(size) for axis, size in (part.split("=") for part in parts or ())}
    if not parts or len(sizes) < len(parts):
        raise argparse.ArgumentTypeError(
            "must be sizes by axis, such as data=4,model=2 (axes: data, fsdp and model, each once; "
            "sizes: 1 or more, or -1)"
        )
    return sizes


def positive_integer(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdecimal() or len(text) > _MAX_DIGITS or int(text) < 1:
        raise argparse.ArgumentTypeError("must be a whole number, 1 or more")
    return int(text)
