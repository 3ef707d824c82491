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
from softprompt.files.json_files import checked, read_json
from softprompt.files.json_lines import parse_json_lines
from softprompt.files.reading import MEBIBYTE, read_bytes
from softprompt.files.writing import write_file
from softprompt.storage.events import Events
from softprompt.storage.locks import locked_folder

_log = logging.getLogger(__name__)

_METRICS = "metrics.jsonl"
_SUMMARY = "summary.json"
_LOG_LIMIT = 512 * MEBIBYTE  # of a file with a line per record


@contextlib.contextmanager
def open_run(folder: Path, experiment: Experiment) -> Iterator[Experiment]:
    """Create the folder of a run or open the folder of a stopped one, and hold its lock.

    Args:
      folder: the run folder.
      experiment: the experiment to run there.

    Yields:
      The experiment; a stopped run keeps its metric if the experiment names none.

    Raises:
      FolderError: if the folder has other content, or a run with other settings.
      UserError: if another process is training there, or the folder cannot be written.
    """
    config = folder / "config.yaml"
    with locked_folder(folder, config.name, "run", "training"):
        if any(folder.glob("checkpoints/*")):  # without checkpoints, nothing can be mixed up
            stopped = load_experiment(config)
            experiment = experiment.continuing(stopped)
            free = {"compute": {"mesh"}}  # a run may resume on other devices
            changed = differences(
                stopped.model_dump(exclude=free), experiment.model_dump(exclude=free)
            )
            if changed:
                raise FolderError(
                    f"{folder}: holds a run with other settings ({'; '.join(changed)}); "
                    "choose another folder"
                )
        yield experiment


def write_config(folder: Path, experiment: Experiment) -> None:
    """Write the resolved experiment as `config.yaml`, from which the run can be repeated."""
    write_file(folder / "config.yaml", dump_experiment(experiment, folder))


class _Summary(pydantic.BaseModel):
    """What readers of `summary.json` rely on; it has other keys too."""

    model_config = pydantic.ConfigDict(strict=True, allow_inf_nan=False)

    steps: int = pydantic.Field(ge=0, lt=2**63)
    trainable_parameters: int = pydantic.Field(ge=0, lt=2**63)
    train_seconds: float = pydantic.Field(ge=0)
    examples_per_second: float = pydantic.Field(ge=0)
    peak_memory_bytes: int = pydantic.Field(ge=0, lt=2**63)
    validation: Mapping[str, float]
    test: Mapping[str, float]
    forgetting: float | None = None


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
        summary = read_json(path)
        checked(_Summary, summary, str(path))
    except UserError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise UserError(
            f"{path}: damaged ({reason}); delete it (and trial.json) and train again to recreate it"
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
        lines = read_bytes(path, _LOG_LIMIT).decode(errors="replace").split("\n")
        kept = [sample for _, sample in parse_json_lines(lines, str(path))]
        kept = [sample for sample in kept if _step(sample, step) < step]
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
    *lines, _ = read_bytes(path, _LOG_LIMIT).decode(errors="replace").split("\n")
    records = []
    for where, record in parse_json_lines(lines, str(path)):
        numbers = [value for key, value in record.items() if key not in ("step", "split")]
        if not (
            _step(record) >= 0
            and isinstance(record.get("split"), str)
            and all(_is_number(value) for value in numbers)
        ):
            raise UserError(f"{where}: not a record of metrics; move the file away")
        records.append(record)
    return records


def _step(record: Mapping[str, Any], default: int = -1) -> int:
    """Return the step of a record; the default if it has no valid one."""
    step = record.get("step")
    return step if type(step) is int and 0 <= step < 2**63 else default


def _is_number(value: Any) -> bool:
    """Whether a value is a number in the range of float64."""
    return type(value) is float or (type(value) is int and abs(value) < 2**1000)
