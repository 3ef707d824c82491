"""`softprompt export`: write a trained prompt in another program's format."""

import argparse
from pathlib import Path
from typing import Any

from softprompt.cli.arguments import add_command, add_prompt
from softprompt.cli.inputs import load_prompt
from softprompt.errors import UserError


def add_to(subparsers: Any) -> None:
    """Declare the command and its arguments."""
    command = add_command(
        subparsers,
        "export",
        run,
        "write a trained prompt in another program's format",
        """\
Writes a new folder with a model card (README.md), and prints its path. Formats:
  peft         a peft adapter: a soft prompt as PROMPT_TUNING, prefix tuning as PREFIX_TUNING,
               LoRA as LORA
  peft-prefix  a peft adapter of type PREFIX_TUNING: the keys and values of everything that
               comes before every input
  merged       a model directory for inference engines without support for prompts: the virtual
               tokens become new tokens of the vocabulary; weights of LoRA and of fine-tuning
               are merged into the model
  gguf         the merged model in one file, for llama.cpp and Ollama
  embeds       the embeddings that every input begins with, for vLLM's enable_prompt_embeds

examples:
  softprompt export runs/sentiment adapters/sentiment
  softprompt export runs/sentiment models/sentiment --format merged
  softprompt export runs/sentiment models/sentiment-gguf --format gguf --dtype q8_0
  softprompt export runs/sentiment adapters/sentiment --push me/sentiment""",
    )
    add_prompt(command)
    command.add_argument("folder", type=Path, metavar="DIR", help="a new folder")
    command.add_argument(
        "--format",
        choices=("peft", "peft-prefix", "merged", "gguf", "embeds"),
        default="peft",
        help="the format (default: peft)",
    )
    command.add_argument(
        "--dtype",
        choices=("f32", "f16", "q8_0"),
        help="how a GGUF file stores matrices (default: f16)",
    )
    command.add_argument(
        "--push", metavar="OWNER/NAME", help="also upload the folder to the Hugging Face Hub"
    )


def run(options: argparse.Namespace) -> None:
    """Export the prompt, and upload it if asked to."""
    from softprompt.interop.export import export, push

    if options.dtype and options.format != "gguf":
        raise UserError("--dtype needs --format gguf")
    export(load_prompt(options), options.folder, options.format, options.dtype or "f16")
    print(options.folder)
    if options.push:
        print(push(options.folder, options.push))
