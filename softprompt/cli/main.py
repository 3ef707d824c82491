"""The entry point of the command line, and the list of its commands."""

import argparse
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from softprompt.cli.progress import printed_log
from softprompt.cli.signals import end_on_signals
from softprompt.errors import Stopped, UserError

# The modules of the commands in this package, in the order in which the help lists them.
# Each has `add_to(subparsers)`, which declares its arguments, and `run(options)`.
_COMMANDS = (
    "train",
    "sweep",
    "evaluate",
    "predict",
    "generate",
    "score",
    "inspect",
    "compare",
    "runs",
    "report",
    "export",
    "import_",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
      arguments: the words of the command line. By default the arguments of this process, which
        a signal then ends; see `signals.end_on_signals`.

    Returns:
      The exit status: 0 on success, 1 after a user's mistake, 128 + n after signal n.
    """
    if arguments is None:
        end_on_signals()
    try:
        options = _parse(arguments)
        with printed_log():
            options.command(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.number
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stdout = None  # the reader of the pipe has exited, so nothing can be printed
        return 1
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; overrides and texts may come before and after options."""
    options, rest = _parser().parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or not hasattr(options, "words")]
    if unknown:
        raise UserError(f"unknown argument {unknown[0]!r}; see softprompt {options.name} --help")
    if rest:
        options.words = [*options.words, *rest]
    return options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


class _Version(argparse.Action):
    """Print the version of the installed package and exit."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str):
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> NoReturn:
        print(f"softprompt {importlib.metadata.version('softprompt')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="softprompt",
        description="Train and use soft prompts for frozen language models.",
        epilog="""\
examples:
  softprompt train experiments/sentiment.yaml
  softprompt eval runs/sentiment --split test
  softprompt predict runs/sentiment "A dull, lifeless film."
  softprompt inspect runs/sentiment

Run 'softprompt COMMAND --help' for the arguments and examples of a command.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, help="print the version and exit")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in _COMMANDS:
        importlib.import_module(f"softprompt.cli.{name}").add_to(subparsers)
    return parser
