"""The folder of one run: who may write to it, its config, metrics and summary."""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import tensorboardX

from softprompt.errors import UserError
from softprompt.experiment.reading import differences, dump_experiment, load_experiment
from softprompt.experiment.schema import Experiment
from softprompt.storage.files import write_file
from softprompt.storage.json_lines import parse_json_lines
from softprompt.storage.locks import locked_folder

_log = logging.getLogger(__name__)

_METRICS = "metrics.jsonl"
_SUMMARY = "summary.json"


@contextlib.contextmanager
def open_run(folder: Path, experiment: Experiment, option: str = "--run-dir") -> Iterator[None]:
    """Make a run's folder, or find it as this experiment left it, and hold its lock.

    Args:
      folder: where.
      experiment: what is to be run there.
      option: how another folder is chosen.

    Raises:
      UserError: if the folder belongs to another experiment or to a process still
        running, or cannot be written.
    """
    config = folder / "config.yaml"
    with locked_folder(folder, config.name, "run", "training", option):
        if any(folder.glob("checkpoints/*")):  # else there is nothing to mix up
            changed = differences(load_experiment(config).model_dump(), experiment.model_dump())
            if changed:
                raise UserError(
                    f"{folder}: holds a run with other settings ({'; '.join(changed)}); "
                    f"choose another folder with {option} (make: RUN=DIR)"
                )
        yield


def write_config(folder: Path, experiment: Experiment) -> None:
    """Write the resolved experiment, from which the run can be made again."""
    write_file(folder / "config.yaml", dump_experiment(experiment, folder))


class _Summary(pydantic.BaseModel):
    steps: int
    train_seconds: float
    peak_memory_bytes: int
    validation: Mapping[str, float]
    test: Mapping[str, float]


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json`, with which a run is finished."""
    write_file(folder / _SUMMARY, json.dumps(summary, indent=2) + "\n")


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a run, or None if it is not finished.

    Raises:
      UserError: if it is damaged.
    """
    path = folder / _SUMMARY
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        _Summary.model_validate(summary, strict=True)
    except (OSError, ValueError):
        raise UserError(
            f"{path}: damaged; without it and trial.json the run is finished again"
        ) from None
    return summary


def write_samples(folder: Path, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
    """Add what was written at a step to `samples.jsonl`; later steps, to be done again, go."""
    path = folder / "samples.jsonl"
    kept = []
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        kept = [sample for _, sample in parse_json_lines(lines, str(path))]
        kept = [sample for sample in kept if sample.get("step", step) < step]
    write_predictions(path, [*kept, *({"step": step, **sample} for sample in samples)])


def write_predictions(path: Path, samples: Sequence[Mapping[str, Any]]) -> None:
    """Write a JSON object a line, as `softprompt score` reads it."""
    lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    write_file(path, "".join(lines))


class MetricsLog:
    """`metrics.jsonl` and TensorBoard events of a run.

    Args:
      folder: the run's.
      step, records: where the run goes on from, and the number of records up to there; the
        ones behind, of work that will be done again, go.
    """

    def __init__(self, folder: Path, step: int, records: int):
        kept = read_metrics(folder)[:records]
        if len(kept) < records:
            _log.warning(
                f"{folder / _METRICS}: {records - len(kept)} of {records} records are missing"
            )
        write_file(folder / _METRICS, "".join(json.dumps(record) + "\n" for record in kept))
        self.records = records
        self._file = (folder / _METRICS).open("a", encoding="utf-8")
        self._board = tensorboardX.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Append one record."""
        self._file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        self._file.flush()
        self.records += 1
        for key, value in values.items():
            self._board.add_scalar(f"{split}/{key}", value, step)

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`; a last line cut short by a kill is left out.

    Raises:
      UserError: with file and line, if another line is damaged.
    """
    path = folder / _METRICS
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = [record for _, record in parse_json_lines(lines, str(path))]
    for number, record in enumerate(records, 1):
        numbers = [value for key, value in record.items() if key != "split"]
        of_numbers = all(isinstance(value, int | float) for value in numbers)
        if not ({"step", "split"} <= record.keys() and of_numbers):
            raise UserError(f"{path}:{number}: not a record of metrics; move the file away")
    return records
