"""Compare several methods on one task: the quality that each reaches, and what it costs."""

import dataclasses
import logging
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from softprompt.errors import FolderError, UserError
from softprompt.experiment.methods import METHODS, method_class
from softprompt.experiment.reading import differences, load_experiment
from softprompt.experiment.schema import Experiment
from softprompt.files.folders import require_usable
from softprompt.storage.run_folder import read_summary

_log = logging.getLogger(__name__)

FEW_SHOT = "few-shot"  # the base model alone, with solved examples before every input
_SHOTS = 4  # solved examples of `FEW_SHOT` if the experiment sets none
_MAX_RUNS = 1000  # in one comparison; more are a mistake

Train = Callable[[Path, Sequence[str], Path], None]
"""Trains an experiment file with overrides in a run folder."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One method, over its seeds. Without a finished run, all numbers are missing.

    Attributes:
      method: name of the method.
      metric: name of the metric in `quality`, with the split that it was measured on.
      quality: value of the metric for each seed whose run is finished.
      forgetting: the forgetting of each of these runs where it was measured.
      trainable_parameters: number of trained parameters.
      saved_bytes: size of the saved prompt.
      train_seconds: time of the training steps alone; the median over seeds.
      examples_per_second: throughput of the training steps; the median over seeds.
      peak_memory_bytes: peak memory of the whole process; the maximum over seeds.
      error: why runs failed; None if none failed.
    """

    method: str
    metric: str
    quality: Sequence[float] = ()
    forgetting: Sequence[float] = ()
    trainable_parameters: int | None = None
    saved_bytes: int | None = None
    train_seconds: float | None = None
    examples_per_second: float | None = None
    peak_memory_bytes: int | None = None
    error: str | None = None


@dataclasses.dataclass
class _Run:
    """A run of the comparison: its folder, the overrides that select it, and how it stands."""

    seed: int
    folder: Path
    overrides: Sequence[str]
    finished: bool = False
    error: str | None = None


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
    (`none`) is evaluated once, unless the seed chooses the data that it is evaluated on. A run
    that fails does not stop the others; its error is in the row of its method.

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
      UserError: before any training, if the experiment, a method or a seed is invalid, or there
        are too many runs.
      FolderError: before any training, if a finished run has other settings, or the folder
        cannot be written.
    """
    _require_distinct("method", methods)
    _require_distinct("seed", seeds)
    known = sorted([*METHODS, FEW_SHOT], key=lambda name: _is_trained(name))
    if unknown := [method for method in methods if method not in known]:
        raise UserError(f"method {unknown[0]!r} is not one of {', '.join(known)}")
    if len(methods) * len(seeds) > _MAX_RUNS:
        raise UserError(
            f"{len(methods)} methods with {len(seeds)} seeds: "
            f"a comparison has at most {_MAX_RUNS} runs"
        )
    own = load_experiment(file, [*overrides, f"seed={max(seeds)}"])
    require_usable(folder)
    planned = {
        method: [_plan(file, method, seed, own, overrides, folder) for seed in of_method]
        for method in methods
        for of_method in [seeds if _depends_on_seed(method, own) else seeds[:1]]
    }
    rows = []
    for method, runs in planned.items():
        for run in runs:
            if not run.finished and not run.error:
                _log.info(f"{run.folder}: training")
                try:
                    train(file, run.overrides, run.folder)
                    run.finished = True
                except UserError as error:
                    run.error = _on_one_line(error)
            if run.error:
                _log.info(f"{run.folder}: failed: {run.error}")
        rows.append(_row(method, own, runs))
    return rows


def _require_distinct(what: str, values: Sequence[str | int]) -> None:
    """Require at least one value, and each only once."""
    if not values:
        raise UserError(f"give at least one {what}")
    value, count = Counter(values).most_common(1)[0]
    if count > 1:
        raise UserError(f"{what} {value} is given {count} times; give it once")


def _plan(
    file: Path, method: str, seed: int, own: Experiment, given: Sequence[str], folder: Path
) -> _Run:
    """Return a run that has not begun, has finished, or cannot be made for this method.

    Raises:
      FolderError: if its folder holds a finished run with other settings.
    """
    overrides = [*_overrides(method, own, given), f"seed={seed}"]
    run = _Run(seed, folder / method / f"seed-{seed}", overrides)
    try:
        run.finished = _is_finished(file, overrides, run.folder)
    except FolderError:
        raise
    except UserError as error:
        run.error = _on_one_line(error)
    return run


def _overrides(method: str, own: Experiment, given: Sequence[str]) -> list[str]:
    """The overrides that select a method, together with the given ones."""
    if method == FEW_SHOT:
        return [*given, "method=none", f"shots={own.shots or _SHOTS}"]
    if not _is_trained(method):
        return [*given, f"method={method}", "shots=0"]
    rate = [] if method == own.method else ["optimizer.learning_rate=null"]
    return [*rate, *given, f"method={method}"]


def _depends_on_seed(method: str, own: Experiment) -> bool:
    return method == FEW_SHOT or _is_trained(method) or bool(own.data.shares)


def _is_trained(method: str) -> bool:
    return method != FEW_SHOT and method_class(method).trainable is not False


def _is_finished(file: Path, overrides: Sequence[str], run: Path) -> bool:
    """Whether the folder holds this run, finished.

    Raises:
      UserError: if the experiment or the folder's summary is invalid.
      FolderError: if it holds a finished run with other settings.
    """
    config = run / "config.yaml"
    experiment = load_experiment(file, overrides)
    if not (read_summary(run) and config.exists()):
        return False
    changed = differences(load_experiment(config).model_dump(), experiment.model_dump())
    if changed:
        raise FolderError(
            f"{run}: holds a run with other settings ({'; '.join(changed)}); choose another folder"
        )
    return True


def _row(method: str, own: Experiment, runs: Sequence[_Run]) -> Row:
    split = "test" if own.data.test else "validation"
    metric = own.evaluation.metric
    done = [run for run in runs if run.finished]
    summaries = [summary for run in done if (summary := read_summary(run.folder))]
    error = _errors(runs)
    if not summaries:
        return Row(method, f"{split} {metric}", error=error)

    def median(key: str) -> float:
        return statistics.median(summary[key] for summary in summaries)

    saved = (done[0].folder / "prompt").rglob("*")
    return Row(
        method,
        f"{split} {metric}",
        [summary[split][metric] for summary in summaries],
        [summary["forgetting"] for summary in summaries if summary.get("forgetting") is not None],
        summaries[0]["trainable_parameters"],
        sum(path.stat().st_size for path in saved if path.is_file()),
        median("train_seconds"),
        median("examples_per_second"),
        max(summary["peak_memory_bytes"] for summary in summaries),
        error,
    )


def _errors(runs: Sequence[_Run]) -> str | None:
    """The first error of a method's runs, and how many failed if the method has several."""
    failed = [run for run in runs if run.error]
    if not failed:
        return None
    if len(runs) == 1:
        return failed[0].error
    return f"{len(failed)} of {len(runs)} seeds failed, seed {failed[0].seed}: {failed[0].error}"


def _on_one_line(error: UserError) -> str:
    return "; ".join(str(error).splitlines())
