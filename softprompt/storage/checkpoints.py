"""The checkpoints of a run, written in the background."""

import shutil
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from softprompt.files.writing import write_errors
from softprompt.parallel.hosts import is_main
from softprompt.storage.arrays import DamagedError, load_arrays, load_description, save_arrays


class Checkpoints:
    """The checkpoints of a run: one folder per step, written by a background thread.

    Args:
      folder: the folder of all checkpoints; it is created if necessary.
      keep: number of newest checkpoints to keep. The best one is always kept.

    In a run of several processes, all of them call `save` and `load` together.
    """

    _FILE = "checkpoint.json"

    def __init__(self, folder: Path, keep: int):
        self._folder, self._keep = folder, keep
        self._pending: Future[None] | None = None
        if is_main():
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".*"):
                shutil.rmtree(leftover, ignore_errors=True)

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in ascending order."""
        return sorted(int(p.name) for p in self._folder.iterdir() if p.name.isdecimal())

    def path(self, step: int) -> Path:
        """The folder of the checkpoint of a step."""
        return self._folder / str(step)

    def save(self, step: int, arrays: Any, description: Mapping[str, Any], best: int) -> None:
        """Copy the arrays to the host, and write them in the background.

        Several processes write them before they go on, because Orbax then needs all of them.

        Args:
          step: the step of the checkpoint.
          arrays: a pytree of arrays.
          description: values for the JSON file of the checkpoint.
          best: a step whose checkpoint must not be deleted.
        """
        self.wait()
        if jax.process_count() > 1:
            self._write(step, arrays, dict(description), best)
            return
        host = jax.tree.map(np.array, nnx.as_pure(arrays))
        pending: Future[None] = Future()

        def write() -> None:
            try:
                self._write(step, host, dict(description), best)
            except BaseException as error:  # `wait` raises it
                pending.set_exception(error)
            else:
                pending.set_result(None)

        self._pending = pending
        # A daemon thread, so that an exit without `wait`, as after a second Ctrl-C, does not block:
        # Orbax could not finish, because an interpreter that exits starts no new threads.
        threading.Thread(target=write, name="checkpoint", daemon=True).start()

    def wait(self) -> None:
        """Wait until the last `save` is on disk, and raise its error if it failed."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def read_descriptions(self) -> Iterator[tuple[int, dict[str, Any] | DamagedError]]:
        """Yield each step, newest first, with its description or, if damaged, with the error."""
        for step in reversed(self.steps):
            try:
                yield step, load_description(self.path(step), self._FILE)
            except DamagedError as error:
                yield step, error

    def load(self, step: int, like: Any) -> Any:
        """Load the arrays of a step whose description was read; see `load_arrays`."""
        return load_arrays(self.path(step), like)

    def _write(self, step: int, arrays: Any, description: dict[str, Any], best: int) -> None:
        with write_errors(self.path(step)):
            save_arrays(self.path(step), arrays, description, self._FILE)
        if not is_main():
            return
        # Later checkpoints are leftovers: the run has since resumed at an earlier step.
        kept = {*[s for s in self.steps if s <= step][-self._keep :], best}
        for other in self.steps:
            if other not in kept:
                shutil.rmtree(self.path(other))
