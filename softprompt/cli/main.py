"""The entry point of the command line, and the list of its commands."""

import argparse
import gc
import importlib
import importlib.metadata
import io
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from softprompt.cli.progress import printed_log
from softprompt.cli.signals import end_on_signals
from softprompt.errors import Stopped, UserError, printable, shown
from softprompt.runtime.platforms import ignore_compilers

# The modules of the commands in this package, in the order in which the help lists them.
# Each has `add_to(subparsers)`, which declares its arguments, and `run(options)`.
_COMMANDS = (
    "init",
    "study",
    "train",
    "show",
    "sweep",
    "plan",
    "evaluate",
    "predict",
    "generate",
    "score",
    "serve",
    "inspect",
    "compare",
    "runs",
    "report",
    "export",
    "import_",
)

# The imports and the tracing of programs make hundreds of thousands of objects that stay. With
# Python's default of 700 new objects, searching them for garbage takes a sixth of a short command.
_NEW_OBJECTS = 20_000  # before a search for garbage

_LONGEST_LINE = 2000  # characters of an error message


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
      arguments: the words of the command line. By default the arguments of this process, which
        a signal then ends; see `signals.end_on_signals`.

    Returns:
      The exit status: 0 on success, 1 after a user's mistake, 128 + n after signal n.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Otherwise a name that is not UTF-8, or a terminal without Unicode, would raise an error.
        sys.stdout.reconfigure(errors="backslashreplace")
    if arguments is None:
        end_on_signals()
        gc.set_threshold(_NEW_OBJECTS)
    ignore_compilers()
    try:
        options = _parse(arguments)
        with printed_log():
            options.command(options)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, an error can still be reported
    except UserError as error:
        _print_error(str(error))
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
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _print_error(f"{where}cannot be read or written ({error.strerror or error})")
        if not where:
            sys.stdout = None  # it is what cannot be written
        return 1
    return 0


def _print_error(message: str) -> None:
    """Print the lines of a message. A long line, such as one with a long path, is shortened."""
    half = _LONGEST_LINE // 2
    for line in message.splitlines():
        if len(line) > _LONGEST_LINE:
            line = f"{line[:half]} ... {line[-half:]}"
        print(printable(line), file=sys.stderr)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; overrides and texts may come before and after options."""
    words = sys.argv[1:] if arguments is None else arguments
    for word in words:
        if "\0" in word or not _is_unicode(word):
            raise UserError(f"argument '{shown(word)}': not valid text")
    options, rest = _parser().parse_known_args(words)
    unknown = [word for word in rest if word.startswith("-") or not hasattr(options, "words")]
    if unknown:
        name = shown(unknown[0])
        raise UserError(f"unknown argument '{name}'; see softprompt {options.name} --help")
    if rest:
        options.words = [*options.words, *rest]
    return options


def _is_unicode(word: str) -> bool:
    """Whether a word can be written as UTF-8. Python reads other bytes as half surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in word)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{shown(message, 300)}; see {self.prog} --help")


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
  softprompt init tickets.csv
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
