"""Exceptions that end a command with one line instead of a traceback."""


class UserError(Exception):
    """A user's mistake in a file, a command or an argument.

    The message is one line that says what is wrong, where, and what to do. The command
    line prints it and exits with status 1.

    Examples:
      >>> try:
      ...     load_experiment("experiments/sentiment.yaml", ["prompt.lenght=10"])
      ... except UserError as error:
      ...     print(error)
      override prompt.lenght=10: prompt.lenght: unknown key; did you mean 'length'?
    """


class FolderError(UserError):
    """A folder holds something else, so that another one is needed.

    The message ends with "choose another folder". The command line completes it with the
    name of the option that sets the folder.
    """


class Stopped(Exception):
    """A signal stopped the work. The message says what was saved.

    The command line prints it and exits with status 128 + `number`.

    Args:
      number: number of the signal.
      message: one line.
    """

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number
