"""Exceptions for mistakes of a user, and for work that a signal stopped."""


class UserError(Exception):
    """A user's mistake in a file, a command or an argument.

    The message is one line that says what is wrong, where, and what to do.
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
