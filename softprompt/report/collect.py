"""Read what runs left in their folders."""

import dataclasses
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from softprompt.errors import UserError, reason_of
from softprompt.experiment.reading import flattened, load_experiment
from softprompt.metrics.named import merit
from softprompt.storage.run_folder import read_metrics, read_summary
from softprompt.sweep.outcome import Outcome

_log = logging.getLogger(__name__)

_IGNORED = ("name", "seed")  # settings that are not compared between runs


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
      folder: the run folder.
      settings: the settings of its experiment, by dotted key such as `prompt.length`.
      state: `finished`, `pruned`, `failed`, or `unfinished`.
      step: the last recorded step.
      validation: validation metrics of the best prompt; the latest ones if the run is not
        finished.
      test: metrics on the test data, if any.
      forgetting: the forgetting of the best prompt; None if it was not measured.
      records: the records of `metrics.jsonl`.
      seconds: logged time of the training steps; None if nothing was logged.
      peak_memory_bytes: peak memory of the process; None if the run is not finished.
      error: why the run failed, or None.
      split: the split of `quality`: `test` if all finished runs that were collected together
        have test metrics, otherwise `validation`.
    """

    folder: Path
    settings: Mapping[str, Any]
    state: str
    step: int
    validation: Mapping[str, float]
    test: Mapping[str, float]
    forgetting: float | None
    records: Sequence[Mapping[str, Any]]
    seconds: float | None
    peak_memory_bytes: int | None
    error: str | None
    split: str = "validation"

    @property
    def metric(self) -> str:
        """The metric that selects the best prompt."""
        return self.settings["evaluation.metric"]

    @property
    def quality(self) -> float | None:
        """The value of the metric on `split`; None if it was not measured."""
        return (self.test if self.split == "test" else self.validation).get(self.metric)


def collect(paths: Iterable[Path]) -> list[RunRecord]:
    """Collect the runs in folders, including their subfolders.

    A run that cannot be read is skipped with a warning that names the damaged file. The others are
    returned, and the commands that show them exit with status 0.

    Args:
      paths: folders of runs, of sweeps, or folders that contain such folders.

    Raises:
      UserError: if a folder contains no runs, or no run can be read.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        found = [path] if os.path.isfile(path / "config.yaml") else []
        found += sorted(config.parent for config in path.glob("*/**/config.yaml"))
        if not found:
            raise UserError(f"{path}: contains no runs")
        for folder in found:
            folders.setdefault(folder.resolve(), folder)
    records = []
    for folder in folders.values():
        try:
            records.append(_read(folder))
        except (UserError, OSError) as error:
            _log.warning(f"{folder}: skipped ({reason_of(error)})")
    if not records:
        raise UserError("none of the runs can be read")
    finished = [record for record in records if record.state == "finished"]
    if finished and all(record.metric in record.test for record in finished):
        return [dataclasses.replace(record, split="test") for record in records]
    return records


def varied(records: Sequence[RunRecord], asked: Sequence[str | None] = ()) -> list[str]:
    """The settings that differ between runs of one experiment.

    Args:
      records: the runs.
      asked: keys, or last parts of keys, to include in any case.

    Returns:
      The dotted keys, led by `name` if the runs belong to several experiments.
    """
    names = dict.fromkeys(record.settings["name"] for record in records)
    found = {"name": None} if len(names) > 1 else {}
    for name in names:
        group = [record.settings for record in records if record.settings["name"] == name]
        for key in dict.fromkeys(key for settings in group for key in settings):
            values = {json.dumps(settings.get(key)) for settings in group}
            if key not in _IGNORED and len(values) > 1:
                found[key] = None
    for name in asked:
        keys = [key for key in [*found, *records[0].settings] if name in (key, key.split(".")[-1])]
        found |= dict.fromkeys(keys[:1])
    return list(found)


def best(records: Sequence[RunRecord]) -> RunRecord | None:
    """The finished run with the best validation metric, or None."""
    finished = [
        r
        for r in records
        if r.state == "finished" and math.isfinite(r.validation.get(r.metric, math.nan))
    ]
    return max(finished, key=lambda r: merit(r.validation, r.metric), default=None)


def _read(folder: Path) -> RunRecord:
    settings = flattened(load_experiment(folder / "config.yaml").model_dump())
    outcome, records = Outcome.read(folder), read_metrics(folder)
    summary = read_summary(folder) or {}
    steps = [record["step"] for record in records] + [outcome.step or 0 if outcome else 0]
    seconds = [record["seconds"] for record in records if "seconds" in record]
    measured = [record for record in records if record["split"] == "validation"]
    last = {k: v for k, v in measured[-1].items() if k not in ("step", "split")} if measured else {}
    return RunRecord(
        folder,
        settings,
        outcome.state if outcome else "finished" if summary else "unfinished",
        summary.get("steps", max(steps, default=0)),
        summary.get("validation", last),
        summary.get("test", {}),
        summary.get("forgetting"),
        records,
        summary.get("train_seconds", seconds[-1] if seconds else None),
        summary.get("peak_memory_bytes"),
        outcome.error if outcome else None,
    )
