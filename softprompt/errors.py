"""Exceptions that end a command without a traceback: a user's mistake, or a signal."""


class UserError(Exception):
    """A mistake in a file, a command or an argument.

    The message is one line: what is wrong, where, and what to do. The command line
    prints it and exits with status 1.
    """


class FolderError(UserError):
    """A folder holds something else, so that another one is needed.

    The message ends with "choose another folder". The command line completes it with the
    name of the option that sets the folder.
    """


class Stopped(Exception):
    """A signal stopped the work; the message says what was saved.

    The command line prints it and exits with status 128 + `number`.
    """

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number
