"""The folder of one run: its lock, configuration, metrics, samples and summary."""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic

from softprompt.errors import FolderError, UserError
from softprompt.experiment.reading import differences, dump_experiment, load_experiment
from softprompt.experiment.schema import Experiment
from softprompt.files.json_lines import parse_json_lines
from softprompt.files.writing import write_file
from softprompt.storage.events import Events
from softprompt.storage.locks import locked_folder

_log = logging.getLogger(__name__)

_METRICS = "metrics.jsonl"
_SUMMARY = "summary.json"


@contextlib.contextmanager
def open_run(folder: Path, experiment: Experiment) -> Iterator[None]:
    """Create the folder of a run or open the folder of a stopped one, and hold its lock.

    Args:
      folder: the run folder.
      experiment: the experiment to run there.

    Raises:
      FolderError: if the folder has other content, or a run with other settings.
      UserError: if another process is training there, or the folder cannot be written.
    """
    config = folder / "config.yaml"
    with locked_folder(folder, config.name, "run", "training"):
        if any(folder.glob("checkpoints/*")):  # without checkpoints, nothing can be mixed up
            changed = differences(load_experiment(config).model_dump(), experiment.model_dump())
            if changed:
                raise FolderError(
                    f"{folder}: holds a run with other settings ({'; '.join(changed)}); "
                    "choose another folder"
                )
        yield


def write_config(folder: Path, experiment: Experiment) -> None:
    """Write the resolved experiment as `config.yaml`, from which the run can be repeated."""
    write_file(folder / "config.yaml", dump_experiment(experiment, folder))


class _Summary(pydantic.BaseModel):
    steps: int
    train_seconds: float
    peak_memory_bytes: int
    validation: Mapping[str, float]
    test: Mapping[str, float]


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json`, which marks the run as finished."""
    write_file(folder / _SUMMARY, json.dumps(summary, indent=2) + "\n")


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Read the summary of a run; None if the run is not finished.

    Raises:
      UserError: if the file is damaged.
    """
    path = folder / _SUMMARY
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        _Summary.model_validate(summary, strict=True)
    except (OSError, ValueError):
        raise UserError(
            f"{path}: damaged; delete it (and trial.json) and train again to recreate it"
        ) from None
    return summary


def write_samples(folder: Path, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
    """Append the predictions at a step to `samples.jsonl`.

    Samples of this and later steps are removed first: a run that resumed at an earlier step
    makes them again.

    Args:
      folder: the run folder.
      step: the training step.
      samples: one JSON object per example.
    """
    path = folder / "samples.jsonl"
    kept = []
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        kept = [sample for _, sample in parse_json_lines(lines, str(path))]
        kept = [sample for sample in kept if sample.get("step", step) < step]
    write_predictions(path, [*kept, *({"step": step, **sample} for sample in samples)])


def write_predictions(path: Path, samples: Sequence[Mapping[str, Any]]) -> None:
    """Write one JSON object per line."""
    lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    write_file(path, "".join(lines))


class MetricsLog:
    """The metrics of a run: `metrics.jsonl` and TensorBoard events.

    Args:
      folder: the run folder.
      step: the step at which the run resumes; 0 for a new run.
      records: number of records up to that step. Later records are removed, because the run
        makes them again.
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
        self._events = Events(folder / "tensorboard", step + 1)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Append one record: the values measured on a split at a step."""
        self._file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        self._file.flush()
        self.records += 1
        self._events.write(step, {f"{split}/{key}": value for key, value in values.items()})

    def close(self) -> None:
        """Close both files."""
        try:
            self._file.close()
        finally:
            self._events.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the records of `metrics.jsonl`.

    An incomplete last line, left by a killed process, is ignored.

    Raises:
      UserError: if another line is damaged, with its file and line.
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
