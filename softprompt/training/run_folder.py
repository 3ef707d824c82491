"""The folder of one run: who may write to it, its config, metrics and summary."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorboardX

from softprompt.config import Experiment, differences, dump_experiment, load_experiment
from softprompt.errors import UserError


@contextlib.contextmanager
def open_run(folder: Path, experiment: Experiment) -> Iterator[None]:
    """Make a run's folder, or find it as this experiment left it, and hold its lock.

    Raises:
      UserError: if the folder belongs to another experiment or to a process still
        running, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder}: another process is training there") from None
        config = folder / "config.yaml"
        if config.exists():
            changed = differences(load_experiment(config), experiment)
            if changed:
                raise UserError(
                    f"{folder}: holds a run with other settings ({'; '.join(changed)}); "
                    "choose another folder with --run-dir (make: RUN=DIR)"
                )
        elif others := [p.name for p in folder.iterdir() if p.name[0] != "."]:
            raise UserError(
                f"{folder}: is no run's folder (it has {others[0]}, but no config.yaml); "
                "choose another folder with --run-dir (make: RUN=DIR)"
            )
        yield


def write_config(folder: Path, experiment: Experiment) -> None:
    """Write the resolved experiment, from which the run can be made again."""
    write_file(folder / "config.yaml", dump_experiment(experiment, folder))


def write_file(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    new = path.with_name(f".{path.name}.new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


class MetricsLog:
    """`metrics.jsonl` and TensorBoard events of a run.

    Args:
      folder: the run's.
      step, evaluated: where the run goes on from, and the last step whose evaluation is
        part of that; records of what will be done again go.
    """

    def __init__(self, folder: Path, step: int, evaluated: int):
        path = folder / "metrics.jsonl"
        last = {"train": step, "validation": evaluated}
        records = [r for r in read_metrics(folder) if r["step"] <= last[r["split"]]]
        kept = [json.dumps(record) + "\n" for record in records]
        write_file(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")
        self._board = tensorboardX.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Append one record."""
        self._file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        self._file.flush()
        for key, value in values.items():
            self._board.add_scalar(f"{split}/{key}", value, step)

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`; a last line cut short by a kill is left out."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
