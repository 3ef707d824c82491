"""Worker processes: each answers a line of JSON for every line of JSON that it reads.

The parent and both workers use this file, so it needs only the standard library.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

# On a machine that does other work, wall time says little.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Worker:
    """A worker process, as its parent sees it. A call runs one command and returns its answer.

    Args:
      python: the interpreter.
      script: the worker's script. It calls `serve`.
      folder: what `prepare.py` wrote.
      case: what to measure.
      log: the file for what the worker prints.
    """

    def __init__(self, python, script, folder, case, log):
        self._script, self._log = Path(script).name, Path(log)
        words = [python, script, folder, json.dumps(case)]
        settings = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled"}
        if case["clock"] == "cpu":  # threads of PyTorch that wait must not use CPU time
            settings["OMP_WAIT_POLICY"] = "PASSIVE"
        self.began = time.perf_counter()
        with self._log.open("w") as errors:
            self._process = subprocess.Popen(
                list(map(str, words)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | settings,
            )

    def __call__(self, command, **arguments):
        line = ""
        if self._process.poll() is None:
            print(json.dumps([command, arguments]), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._script}: {command} failed\n{self._log.read_text()[-4000:]}")
        return json.loads(line)

    def close(self):
        """End the process."""
        self._process.stdin.close()
        self._process.wait()


def serve(worker_class):
    """Answer commands, which are methods of the class, until the parent closes the pipe."""
    # Libraries that print must not disturb the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = worker_class(Path(sys.argv[1]), json.loads(sys.argv[2]))
    for line in sys.stdin:
        command, arguments = json.loads(line)
        print(json.dumps(getattr(worker, command)(**arguments)), file=answers, flush=True)


def peak_memory():
    """Return the peak memory of this process in bytes."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
