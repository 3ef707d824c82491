"""Run code that a file from outside controls in a process of its own, with limits.

Chat templates are programs, and a tokenizer can need unlimited time and memory or abort its
process. In a child process, the worst that can happen is that no answer arrives.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from softprompt.errors import UserError
from softprompt.files import confined_child
from softprompt.files.confined_child import OUT_OF_TIME
from softprompt.files.reading import MEBIBYTE

_STARTING = 20  # seconds that the interpreter and its imports may take on a busy machine
_PATIENCE = 4  # seconds to wait for a second of CPU time on a busy machine


class ConfinedProcess:
    """A child process that answers requests one by one, within limits.

    It starts with the first request, and again after a request that went over a limit. Close
    it after use, for example with `contextlib.closing`.

    Args:
      worker: the file of a Python module with a function `answer(request)`. The child does not
        import `softprompt`, so that it starts in a tenth of a second.
      memory: the most bytes of address space. macOS does not always enforce it.
      seconds: the most CPU time for a request. The child may take four times as long by the
        clock, because other processes may keep the machine busy.
    """

    def __init__(self, worker: Path, memory: int, seconds: int):
        self._worker, self._memory, self._seconds = worker, memory, seconds
        self._process: subprocess.Popen[bytes] | None = None

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def ask(self, request: Any, where: str) -> Any:
        """Return the worker's answer to a request.

        Args:
          request: any JSON value.
          where: names the request in error messages.

        Raises:
          UserError: if the worker raises an error, or goes over a limit.
        """
        if self._process is None:
            self._process = self._start()
            failed = f"{where}: the process that runs it does not start"
            if not self._receive(None, _STARTING, failed):
                raise UserError(failed)
        line = json.dumps(request).encode() + b"\n"
        late = f"{where}: takes more than {self._seconds} seconds of CPU time"
        answer = json.loads(self._receive(line, self._seconds * _PATIENCE, late) or b"{}")
        if "value" in answer:
            return answer["value"]
        ended = f"ends its process; it may need more than {self._memory // MEBIBYTE} MiB"
        raise UserError(f"{where}: {answer.get('error', ended)}")

    def _receive(self, request: bytes | None, seconds: int, late: str) -> bytes:
        """Send a request and return a line of the child's output; nothing if the child ended.

        Raises:
          UserError: with the message `late` if the child takes more than this time.
        """
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        deadline = time.monotonic() + seconds
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            if request is not None:
                process.stdin.write(request)
                process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        except BaseException:  # such as Ctrl-C: the next request must not receive this answer
            self.close()
            raise
        finally:
            timer.cancel()
        if line.endswith(b"\n"):
            return line
        status = process.wait()
        self.close()
        if time.monotonic() >= deadline or status == -OUT_OF_TIME:
            raise UserError(late)
        return b""

    def _start(self) -> "subprocess.Popen[bytes]":
        # With -P, neither the current folder nor this one can replace a module of the standard
        # library. A session of its own keeps Ctrl-C from the child. Threads of libraries would
        # reserve address space.
        limits = [str(self._memory), str(self._seconds)]
        return subprocess.Popen(
            [sys.executable, "-P", confined_child.__file__, str(self._worker), *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            start_new_session=True,
        )
