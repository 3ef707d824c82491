"""Signals on the command line: they end the process with one line."""

import os
import signal
from types import FrameType
from typing import NoReturn

from softprompt.runtime.signals import handled_signals

_STDERR = 2  # the descriptor. `sys.stderr` may be an object without one.


def end_on_signals() -> None:
    """From now on, let SIGINT, SIGTERM and SIGHUP end the process at once.

    The exit status is 128 plus the number of the signal. `train` and `sweep` replace these
    handlers while they have something to save, and their second signal arrives here again.
    """
    for number in handled_signals():
        signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """Print a line and leave without any cleanup, which could wait for another thread.

    Nothing needs the cleanup: whatever this process has written is complete on disk, or has a
    temporary name.
    """
    clear_line = "\r\x1b[K" if os.isatty(_STDERR) else ""
    os.write(_STDERR, f"{clear_line}stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)
