"""The child of a `ConfinedProcess`: set the limits, then answer requests.

This file runs as a program of its own. It imports nothing but the standard library.
"""

import json
import resource
import runpy
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

LONGEST_ANSWER = 16 * 2**20
"""The most characters of an answer, written as JSON."""

OUT_OF_TIME = signal.SIGXCPU
"""The signal that ends a process after its CPU time."""


def main(worker: str, memory: int, seconds: int) -> None:
    """Answer the requests on standard input, one JSON value per line, until it is closed.

    Args:
      worker: the file of a module with a function `answer(request)`.
      memory: the most bytes of address space.
      seconds: the most CPU time per request. This also stops a child whose parent has died.
    """
    answer = runpy.run_path(worker)["answer"]
    _limit(resource.RLIMIT_AS, memory)
    _limit(resource.RLIMIT_CORE, 0)
    _write({})  # the parent starts its clock
    for line in sys.stdin.buffer:
        _limit(resource.RLIMIT_CPU, int(time.process_time()) + seconds + 1)
        _write(_outcome(answer, json.loads(line)))


def _write(value: dict[str, Any]) -> None:
    line = json.dumps(value)
    if len(line) > LONGEST_ANSWER:
        line = json.dumps({"error": "the result is too long"})
    sys.stdout.buffer.write(line.encode() + b"\n")
    sys.stdout.buffer.flush()


def _outcome(answer: Callable[[Any], Any], request: Any) -> dict[str, Any]:
    try:
        return {"value": answer(request)}
    except MemoryError:
        return {"error": "needs too much memory"}
    except RecursionError:
        return {"error": "is nested too deeply"}
    except BaseException as error:  # the file may raise anything; a Rust panic is no `Exception`
        reason = str(error).strip().split("\n")[0][:300]
        return {"error": reason or type(error).__name__}


def _limit(kind: int, value: int) -> None:
    """Set the soft limit of a resource."""
    hard = resource.getrlimit(kind)[1]
    try:
        resource.setrlimit(kind, (value if hard < 0 else min(value, hard), hard))
    except (ValueError, OSError):  # macOS refuses limits below what is in use
        return


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
