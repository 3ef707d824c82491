"""The checkpoints of a run, written in the background."""

import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from softprompt.errors import UserError
from softprompt.storage.arrays import DamagedError, load_arrays, load_description, save_arrays


class Checkpoints:
    """The checkpoints of a run, one folder a step, written in the background.

    Args:
      folder: where they are.
      keep: how many of the newest to keep; the best one is kept besides.
    """

    _FILE = "checkpoint.json"

    def __init__(self, folder: Path, keep: int):
        self._folder, self._keep = folder, keep
        self._worker = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*"):
            shutil.rmtree(leftover, ignore_errors=True)

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, rising."""
        return sorted(int(p.name) for p in self._folder.iterdir() if p.name.isdecimal())

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self._folder / str(step)

    def save(self, step: int, arrays: Any, description: Mapping[str, Any], best: int) -> None:
        """Copy the arrays to the host and write them in the background.

        Args:
          step: names the checkpoint.
          arrays, description: what to save.
          best: the step whose checkpoint must not be deleted.
        """
        self.wait()
        host = jax.tree.map(np.array, nnx.as_pure(arrays))
        self._pending = self._worker.submit(self._write, step, host, dict(description), best)

    def wait(self) -> None:
        """Until what `save` began is on disk; raises what went wrong there."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def read_descriptions(self) -> Iterator[tuple[int, dict[str, Any] | DamagedError]]:
        """Steps from the newest on, each with its description or with what is damaged."""
        for step in reversed(self.steps):
            try:
                yield step, load_description(self.path(step), self._FILE)
            except DamagedError as error:
                yield step, error

    def load(self, step: int, like: Any) -> Any:
        """The arrays of a step whose description has been read."""
        return load_arrays(self.path(step), like)

    def _write(self, step: int, arrays: Any, description: dict[str, Any], best: int) -> None:
        try:
            save_arrays(self.path(step), arrays, description, self._FILE)
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"{self.path(step)}: cannot be written ({reason})") from error
        # Later steps are left from before the run went back to this one.
        kept = {*[s for s in self.steps if s <= step][-self._keep :], best}
        for other in self.steps:
            if other not in kept:
                shutil.rmtree(self.path(other))
