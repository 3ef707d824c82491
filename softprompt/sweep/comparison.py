"""Several methods on one task: what each is worth, and what it costs."""

import csv
import dataclasses
import io
import logging
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from softprompt.errors import UserError
from softprompt.experiment.methods import METHODS, method_class
from softprompt.experiment.reading import differences, load_experiment
from softprompt.experiment.schema import Experiment
from softprompt.report import tables
from softprompt.storage.run_folder import read_summary

_log = logging.getLogger(__name__)

FEW_SHOT = "few-shot"  # the base model alone, with solved examples in front of every input
_SHOTS = 4  # of `FEW_SHOT`, if the experiment has no `shots`


@dataclasses.dataclass(frozen=True)
class Row:
    """One method, over its seeds.

    Attributes:
      method: its name.
      metric: what `quality` is, with the split that it was measured on.
      quality: by seed.
      trainable_parameters: how many numbers are learned.
      saved_bytes: of what is kept for use.
      train_seconds: of the training steps alone, the median over seeds.
      examples_per_second: in these, the median over seeds.
      peak_memory_bytes: of the whole process, the largest over seeds.
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
    file: Path, methods: Sequence[str], seeds: Sequence[int], overrides: Sequence[str], folder: Path
) -> list[Row]:
    """Train what is missing, each run in a process of its own, and sum up.

    An experiment's learning rate is that of its own method; every other method has its
    default. A run is in `folder/<method>/seed-<seed>`, and one that is finished is not
    run again. The base model alone (`none`) is measured once, since it has no seed.

    Args:
      file: the experiment.
      methods: names of methods, or `FEW_SHOT`.
      seeds: of what is random: initial values, order of the data, examples shown.
      overrides: `key=value`, for all methods.
      folder: where the runs are.

    Raises:
      UserError: if a method is unknown, or one of its runs fails.
    """
    known = sorted([*METHODS, FEW_SHOT], key=lambda name: _is_trained(name))
    if unknown := [method for method in methods if method not in known]:
        raise UserError(f"method {unknown[0]!r} is none of {', '.join(known)}")
    own = load_experiment(file, overrides)
    rows = []
    for method in dict.fromkeys(methods):
        of_method = _overrides(method, own, overrides)
        runs = []
        for seed in seeds if method == FEW_SHOT or _is_trained(method) else seeds[:1]:
            run = folder / method / f"seed-{seed}"
            _train(file, [*of_method, f"seed={seed}"], run)
            runs.append(run)
        rows.append(_row(method, own, runs))
    return rows


def table(rows: Sequence[Row], form: str) -> str:
    """The rows as `text`, `markdown` or `csv`."""
    columns: dict[str, Callable[[Row], str]] = {
        "method": lambda row: row.method,
        rows[0].metric: lambda row: f"{statistics.mean(row.quality):.3f}",
        "lowest to highest": lambda row: (
            f"{min(row.quality):.3f} to {max(row.quality):.3f}" if len(row.quality) > 1 else "-"
        ),
        "learned parameters": lambda row: f"{row.trainable_parameters:,}",
        "kept": lambda row: _bytes(row.saved_bytes),
        "training": lambda row: f"{row.train_seconds:,.0f} s" if row.train_seconds else "-",
        "examples/s": lambda row: (
            f"{row.examples_per_second:.1f}" if row.examples_per_second else "-"
        ),
        "peak memory": lambda row: _bytes(row.peak_memory_bytes),
    }
    if form == "csv":
        written = io.StringIO()
        names = [field.name for field in dataclasses.fields(Row)]
        writer = csv.DictWriter(written, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            quality = " ".join(map(str, row.quality))
            writer.writerow(dataclasses.asdict(row) | {"quality": quality})
        return written.getvalue().rstrip("\n")
    return tables.table([{name: of(row) for name, of in columns.items()} for row in rows], form)


def _overrides(method: str, own: Experiment, given: Sequence[str]) -> list[str]:
    """The given overrides and those that make the experiment one of the method."""
    if method == FEW_SHOT:
        return [*given, "method=none", f"shots={own.shots or _SHOTS}"]
    if not _is_trained(method):
        return [*given, f"method={method}", "shots=0"]
    rate = [] if method == own.method else ["optimizer.learning_rate=null"]
    return [*rate, *given, f"method={method}"]


def _is_trained(method: str) -> bool:
    return method != FEW_SHOT and method_class(method).trainable is not False


def _train(file: Path, overrides: Sequence[str], run: Path) -> None:
    """Run an experiment in a process of its own, unless it is finished."""
    config = run / "config.yaml"
    if read_summary(run) and config.exists():
        changed = differences(
            load_experiment(config).model_dump(), load_experiment(file, overrides).model_dump()
        )
        if not changed:
            return
        raise UserError(
            f"{run}: holds a run with other settings ({'; '.join(changed)}); choose another "
            "folder with --folder"
        )
    _log.info(f"{run}: training")
    command = [sys.executable, "-m", "softprompt", "train", str(file), *overrides]
    done = subprocess.run([*command, "--run-dir", str(run)], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise UserError(f"{run}: failed, see above; the same command goes on from there")


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


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
