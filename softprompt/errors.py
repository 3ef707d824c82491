"""What ends a command without a traceback: a person's mistake, or a signal."""


class UserError(Exception):
    """A mistake in a file, a command or an argument.

    The message is one line: what is wrong, where, and what to do. The command line
    prints it and exits with status 1.
    """


class Stopped(Exception):
    """Work was stopped by a signal; the message says where it stands.

    The command line prints it and exits with status 128 + `number`.
    """

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number
