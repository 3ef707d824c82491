"""The trained prompt and the input texts that commands work with."""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from softprompt.errors import UserError
from softprompt.files.reading import MEBIBYTE

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from softprompt.data.records import Record
    from softprompt.inference.prompt import TrainedPrompt

_LARGEST_INPUT = 512 * MEBIBYTE


def load_prompt(options: argparse.Namespace) -> "TrainedPrompt":
    """Load the prompt that `add_prompt` declares."""
    from softprompt.inference.prompt import load_prompt

    return load_prompt(options.run, options.base, mesh=requested_mesh(options))


def requested_mesh(options: argparse.Namespace) -> "Mesh | None":
    """Return the mesh that `add_base` declares; None for one device."""
    from softprompt.parallel.mesh import make_mesh

    return None if options.mesh is None else make_mesh(options.mesh)


def load_prompt_and_inputs(
    options: argparse.Namespace,
) -> "tuple[TrainedPrompt, list[Record]]":
    """Load the prompt, and the inputs that `add_inputs` declares.

    Raises:
      UserError: if there are no inputs, or both texts and a file.
    """
    if bool(options.words) == bool(options.input):
        raise UserError("give either texts or --input FILE")
    if options.jsonl and options.input != "-":
        raise UserError(
            "--jsonl is for standard input (--input -); the format of a file is in its name"
        )
    prompt = load_prompt(options)
    if options.input:
        return prompt, list(_read_inputs(prompt, options.input, options.jsonl))
    return prompt, [prompt.record(text, f"text {i}") for i, text in enumerate(options.words, 1)]


def with_scoring(prompt: "TrainedPrompt", options: argparse.Namespace) -> "TrainedPrompt":
    """Return the prompt with the settings that `add_scoring` declares.

    Raises:
      UserError: if the prompt has no labels to score.
    """
    given: dict[str, Any] = {}
    if options.normalize:
        given["normalize"] = True
    if options.calibrate is not None:
        given["calibrate"] = options.calibrate
    if given and not prompt.task.labels:
        raise UserError("--normalize and --calibrate need a prompt with labels")
    return dataclasses.replace(prompt, scoring=prompt.scoring.model_copy(update=given))


def _read_inputs(prompt: "TrainedPrompt", name: str, jsonl: bool) -> "Iterator[Record]":
    from softprompt.data.records import parse_jsonl, read_records

    if name.endswith((".jsonl", ".csv", ".parquet")):
        yield from read_records(name)
        return
    where = "standard input" if name == "-" else name
    try:
        # Unlike other files, inputs may come from a pipe.
        with contextlib.nullcontext(sys.stdin.buffer) if name == "-" else open(name, "rb") as file:
            content = file.read(_LARGEST_INPUT + 1)
        if len(content) > _LARGEST_INPUT:
            raise UserError(f"{where}: larger than {_LARGEST_INPUT // MEBIBYTE} MiB; split it")
        lines = content.decode("utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8 text") from None
    except ValueError as error:  # a NUL in the name
        raise UserError(f"{where!r}: cannot be read ({error})") from None
    if jsonl:
        yield from parse_jsonl(lines, where)
    else:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield prompt.record(line.removesuffix("\r"), f"{where}:{number}")
