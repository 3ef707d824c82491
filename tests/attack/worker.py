"""A process that runs commands one after the other, and a client that watches it."""

import contextlib
import dataclasses
import json
import os
import re
import resource
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

GIBIBYTE = 2**30
LIMIT_SECONDS = 20.0
LIMIT_BYTES = 4 * GIBIBYTE
SERVER = "from attack.worker import serve; serve()"
_CALLS = 300  # compiled programs add up, so the process is replaced after this number of calls


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one command did.

    Attributes:
      status: the exit status; None if it did not end, or took its process down.
      output: standard output.
      errors: standard error without log messages.
      seconds: how long it ran.
      peak: peak memory of the process in bytes.
      failure: `hang` or `abort` if there is no exit status.
    """

    status: int | None
    output: str = ""
    errors: str = ""
    seconds: float = 0.0
    peak: int = 0
    failure: str | None = None


class Worker:
    """Runs commands of `softprompt` in a process of its own, which it restarts when necessary."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._calls = 0

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def run(self, arguments: Sequence[str], folder: Path) -> Outcome:
        """Run a command in a folder, and wait for it no longer than `LIMIT_SECONDS`."""
        if self._process is None or self._calls >= _CALLS:
            self._start()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        self._calls += 1
        process.stdin.write(json.dumps([list(arguments), str(folder)]) + "\n")
        process.stdin.flush()
        start = time.monotonic()
        ready, _, _ = select.select([process.stdout], [], [], LIMIT_SECONDS + 10)
        line = process.stdout.readline() if ready else ""
        if line:
            return Outcome(**json.loads(line))
        failure = "abort" if ready else "hang"
        self._stop()
        return Outcome(None, seconds=time.monotonic() - start, failure=failure)

    def _start(self) -> None:
        self._stop()
        tests = Path(__file__).parent.parent
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            cwd=tests,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"},
        )
        self._calls = 0
        assert self._process.stdout is not None
        self._process.stdout.readline()  # the process is ready

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def serve() -> None:
    """Read commands from standard input, run them, and write outcomes to standard output."""
    from compilation import compile_quickly

    import softprompt.cli.main
    import softprompt.training.loop

    compile_quickly()
    # Log messages are not errors. Without them, standard error holds the error alone.
    softprompt.cli.main.printed_log = contextlib.nullcontext
    resource.setrlimit(resource.RLIMIT_AS, (24 * GIBIBYTE, resource.RLIM_INFINITY))
    # The commands get an empty standard input of their own.
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in requests:
        arguments, folder = json.loads(line)
        outcome = _call(softprompt.cli.main.main, arguments, folder)
        print(json.dumps(outcome), file=answers, flush=True)


def _call(main: Any, arguments: list[str], folder: str) -> dict[str, Any]:
    """Run one command, and return the fields of an `Outcome`."""
    os.chdir(folder)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    start = time.monotonic()
    with _captured(1) as output, _captured(2) as errors:
        try:
            status = main(arguments)
        except SystemExit as end:  # --help and --version
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # a command without a reader has closed its output
                stream.flush()
    os.chdir("/")
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return {
        "status": status,
        "output": _text(output),
        "errors": _text(errors),
        "seconds": time.monotonic() - start,
        "peak": int(peak[1]) * 1024 if peak else 0,
    }


@contextlib.contextmanager
def _captured(descriptor: int) -> Iterator[Any]:
    """Redirect a file descriptor to a file, also for libraries that are not written in Python."""
    before = os.dup(descriptor)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), descriptor)
        stream = {1: "stdout", 2: "stderr"}[descriptor]
        old = getattr(sys, stream)
        setattr(sys, stream, open(descriptor, "w", encoding="utf-8", closefd=False))  # noqa: SIM115
        found = bytearray()
        try:
            yield found
        finally:
            setattr(sys, stream, old)
            os.dup2(before, descriptor)
            os.close(before)
            file.seek(0)
            found += file.read(100_000)


def _text(content: bytearray) -> str:
    return content.decode("utf-8", "replace")
