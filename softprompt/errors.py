"""Exceptions for mistakes of a user and for work that a signal stopped, and their messages."""

from typing import Any


def printable(text: str) -> str:
    """Return a text on one line: characters that a terminal would not print are escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shown(text: str, limit: int = 100) -> str:
    """Return a text for an error message: one line, and only the beginning of a long text."""
    return printable(text if len(text) <= limit else f"{text[: limit - 3]}...")


def shortened(value: Any, limit: int = 60) -> str:
    """Return the representation of a value for an error message, cut to `limit` characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of too many digits, or deep nesting
        return f"a {type(value).__name__} that is too long to show"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def reason_of(error: BaseException) -> str:
    """Return the first line of an error's message for another message, or the error's type."""
    lines = str(error).strip().splitlines()
    return shown(lines[0], 300) if lines else type(error).__name__


class UserError(Exception):
    """A user's mistake in a file, a command or an argument.

    The message is one line that says what is wrong, where, and what to do.

    Examples:
      >>> try:
      ...     load_experiment("experiments/sentiment.yaml", ["prompt.lenght=10"])
      ... except UserError as error:
      ...     print(error)
      override prompt.lenght=10: prompt.lenght: unknown key; did you mean 'length'?
    """


class FolderError(UserError):
    """A folder has other content, so that another folder must be chosen.

    The message ends with "choose another folder", so that a caller can add how to do so.
    """


class Stopped(Exception):
    """A signal stopped the work. The message says what was saved.

    Args:
      number: number of the signal.
      message: one line.
    """

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number
