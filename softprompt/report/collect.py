"""Runs as their folders tell of them."""

import dataclasses
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from softprompt.errors import UserError
from softprompt.experiment.reading import flattened, load_experiment
from softprompt.metrics.named import merit
from softprompt.storage.run_folder import read_metrics, read_summary
from softprompt.sweep.outcome import Outcome

_log = logging.getLogger(__name__)

_APART = ("name", "seed")  # keys that say nothing of what is compared


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
      folder: where it is.
      settings: of its experiment, by keys with dots.
      state: `finished`, `pruned`, `failed`, or `unfinished`.
      step: the last one known of.
      validation: metrics of the best prompt, or of an unfinished run the last ones.
      test: metrics on the test data, if there are any.
      records: of `metrics.jsonl`.
      seconds: of its training steps, as far as they were logged.
      peak_memory_bytes: of its process, if it is finished.
      error: why it failed.
      split: `test` if all finished runs beside it have test metrics, else `validation`.
    """

    folder: Path
    settings: Mapping[str, Any]
    state: str
    step: int
    validation: Mapping[str, float]
    test: Mapping[str, float]
    records: Sequence[Mapping[str, Any]]
    seconds: float | None
    peak_memory_bytes: int | None
    error: str | None
    split: str = "validation"

    @property
    def metric(self) -> str:
        """The one that decides."""
        return self.settings["evaluation.metric"]

    @property
    def quality(self) -> float | None:
        """That metric, of `split`."""
        return (self.test if self.split == "test" else self.validation).get(self.metric)


def collect(paths: Iterable[Path]) -> list[RunRecord]:
    """The runs in folders: of a run, of a sweep, or with any of them below.

    One that cannot be read is left out, which is said.

    Raises:
      UserError: if there is none.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        found = [path] if (path / "config.yaml").is_file() else []
        found += sorted(config.parent for config in path.glob("*/**/config.yaml"))
        if not found:
            raise UserError(f"{path}: no run there")
        for folder in found:
            folders.setdefault(folder.resolve(), folder)
    records = []
    for folder in folders.values():
        try:
            records.append(_read(folder))
        except (UserError, OSError) as error:
            _log.info(f"{folder}: left out ({str(error).splitlines()[0]})")
    if not records:
        raise UserError("no run can be read")
    finished = [record for record in records if record.state == "finished"]
    if finished and all(record.metric in record.test for record in finished):
        return [dataclasses.replace(record, split="test") for record in records]
    return records


def varied(records: Sequence[RunRecord], asked: Sequence[str | None] = ()) -> list[str]:
    """The settings in which runs of one experiment differ; and `name`, if there are several.

    Args:
      records: of the runs.
      asked: keys, or ends of keys, that are among them in any case.
    """
    names = dict.fromkeys(record.settings["name"] for record in records)
    found = {"name": None} if len(names) > 1 else {}
    for name in names:
        group = [record.settings for record in records if record.settings["name"] == name]
        for key in dict.fromkeys(key for settings in group for key in settings):
            values = {json.dumps(settings.get(key)) for settings in group}
            if key not in _APART and len(values) > 1:
                found[key] = None
    for name in asked:
        keys = [key for key in [*found, *records[0].settings] if name in (key, key.split(".")[-1])]
        found |= dict.fromkeys(keys[:1])
    return list(found)


def best(records: Sequence[RunRecord]) -> RunRecord | None:
    """The finished run that is best on the validation data."""
    finished = [r for r in records if r.state == "finished" and r.metric in r.validation]
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
        records,
        summary.get("train_seconds", seconds[-1] if seconds else None),
        summary.get("peak_memory_bytes"),
        outcome.error if outcome else None,
    )
