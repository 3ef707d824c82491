"""The one exception for a person's mistake."""


class UserError(Exception):
    """A mistake in a file, a command or an argument.

    The message is one line: what is wrong, where, and what to do. The command
    line prints it without a traceback and exits with status 1.
    """
