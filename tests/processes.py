"""Processes that tests stop or kill, forked from one that has imported the package.

Importing JAX and the package takes three seconds, which each process would pay otherwise. The
process that is forked has not computed anything, so it has no threads.
"""

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from compilation import compile_quickly

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        *("softprompt.cli.main", "softprompt.cli.train", "softprompt.cli.sweep"),
        *("softprompt.training.loop", "softprompt.methods.soft_prompt"),
        *("optuna", "matplotlib.figure", "matplotlib.backends.backend_agg"),
    ]
)


class ForkedProcess:
    """A process that runs Python code, with the part of `subprocess.Popen` that tests use.

    Args:
      code: run as a main program.
      arguments: `sys.argv[1:]` of the program.
    """

    def __init__(self, code: str, arguments: Sequence[str]):
        descriptor, errors = tempfile.mkstemp(".stderr")
        os.close(descriptor)
        self._errors = Path(errors)
        self._process = _CONTEXT.Process(target=_run, args=(code, arguments, errors))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """The exit status, negative after a signal; None while the process runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return `returncode`."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        assert self._process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()

    def communicate(self) -> tuple[None, str]:
        """Wait for the end, and return what was written to standard error."""
        self._process.join()
        errors = self._errors.read_text()
        self._errors.unlink()
        return None, errors


def _run(code: str, arguments: Sequence[str], errors: str) -> None:
    descriptor = os.open(errors, os.O_WRONLY)
    os.dup2(descriptor, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    sys.argv[1:] = arguments
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for `command &`
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and `nohup` ignores this
    compile_quickly()
    try:
        exec(compile(code, "<test>", "exec"), {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()  # `multiprocessing` ends a process without them
