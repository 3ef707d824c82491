"""Compare several methods on one task: the quality that each reaches, and what it costs."""

import dataclasses
import logging
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from softprompt.errors import FolderError, UserError
from softprompt.experiment.methods import METHODS, method_class
from softprompt.experiment.reading import differences, load_experiment
from softprompt.experiment.schema import Experiment
from softprompt.storage.run_folder import read_summary

_log = logging.getLogger(__name__)

FEW_SHOT = "few-shot"  # the base model alone, with solved examples before every input
_SHOTS = 4  # solved examples of `FEW_SHOT` if the experiment sets none

Train = Callable[[Path, Sequence[str], Path], None]
"""Trains an experiment file with overrides in a run folder."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One method, over its seeds.

    Attributes:
      method: name of the method.
      metric: name of the metric in `quality`, with the split that it was measured on.
      quality: value of the metric for each seed.
      trainable_parameters: number of trained parameters.
      saved_bytes: size of the saved prompt.
      train_seconds: time of the training steps alone; the median over seeds.
      examples_per_second: throughput of the training steps; the median over seeds.
      peak_memory_bytes: peak memory of the whole process; the maximum over seeds.
    """

    method: str
    metric: str
    quality: Sequence[float]
    trainable_parameters: int
    saved_bytes: int
    train_seconds: float
    examples_per_second: float
    peak_memory_bytes: int


def compare(
    file: Path,
    methods: Sequence[str],
    seeds: Sequence[int],
    overrides: Sequence[str],
    folder: Path,
    train: Train,
) -> list[Row]:
    """Train the runs that are not finished, and summarize all of them.

    The experiment's own method keeps the learning rate of the file; every other method uses
    its default. The folder of a run is `folder/<method>/seed-<seed>`. The base model alone
    (`none`) does not depend on the seed and is evaluated once.

    Args:
      file: the experiment.
      methods: names of methods, or `FEW_SHOT`.
      seeds: random seeds for initial values, data order and solved examples.
      overrides: `key=value`, for all methods.
      folder: the folder of all runs.
      train: trains one run. It should start a process of its own, because the peak memory of
        a run is measured for its whole process.

    Returns:
      One row per method, in the given order.

    Raises:
      UserError: if a method is unknown or a run fails.
      FolderError: if a finished run has other settings.
    """
    known = sorted([*METHODS, FEW_SHOT], key=lambda name: _is_trained(name))
    if unknown := [method for method in methods if method not in known]:
        raise UserError(f"method {unknown[0]!r} is not one of {', '.join(known)}")
    own = load_experiment(file, overrides)
    rows = []
    for method in dict.fromkeys(methods):
        of_method = _overrides(method, own, overrides)
        runs = []
        for seed in seeds if method == FEW_SHOT or _is_trained(method) else seeds[:1]:
            run = folder / method / f"seed-{seed}"
            of_run = [*of_method, f"seed={seed}"]
            if not _is_finished(file, of_run, run):
                _log.info(f"{run}: training")
                train(file, of_run, run)
            runs.append(run)
        rows.append(_row(method, own, runs))
    return rows


def _overrides(method: str, own: Experiment, given: Sequence[str]) -> list[str]:
    """The overrides that select a method, together with the given ones."""
    if method == FEW_SHOT:
        return [*given, "method=none", f"shots={own.shots or _SHOTS}"]
    if not _is_trained(method):
        return [*given, f"method={method}", "shots=0"]
    rate = [] if method == own.method else ["optimizer.learning_rate=null"]
    return [*rate, *given, f"method={method}"]


def _is_trained(method: str) -> bool:
    return method != FEW_SHOT and method_class(method).trainable is not False


def _is_finished(file: Path, overrides: Sequence[str], run: Path) -> bool:
    """Whether the folder holds this run, finished.

    Raises:
      FolderError: if it holds a finished run with other settings.
    """
    config = run / "config.yaml"
    if not (read_summary(run) and config.exists()):
        return False
    changed = differences(
        load_experiment(config).model_dump(), load_experiment(file, overrides).model_dump()
    )
    if changed:
        raise FolderError(
            f"{run}: holds a run with other settings ({'; '.join(changed)}); choose another folder"
        )
    return True


def _row(method: str, own: Experiment, runs: Sequence[Path]) -> Row:
    summaries = [summary for run in runs if (summary := read_summary(run))]
    split = "test" if summaries[0]["test"] else "validation"
    metric = own.evaluation.metric

    def median(key: str) -> float:
        return statistics.median(summary[key] for summary in summaries)

    return Row(
        method,
        f"{split} {metric}",
        [summary[split][metric] for summary in summaries],
        summaries[0]["trainable_parameters"],
        sum(path.stat().st_size for path in (runs[0] / "prompt").rglob("*") if path.is_file()),
        median("train_seconds"),
        median("examples_per_second"),
        max(summary["peak_memory_bytes"] for summary in summaries),
    )
