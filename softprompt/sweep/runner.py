"""A sweep, from its file to the outcome of every trial."""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence

import yaml

from softprompt.errors import FolderError, Stopped
from softprompt.experiment.reading import differences, dump_experiment
from softprompt.metrics.named import merit
from softprompt.runtime.progress import Bar, Progress, silent
from softprompt.runtime.signals import StopSignals
from softprompt.storage.files import write_file
from softprompt.storage.locks import file_lock, locked_folder
from softprompt.sweep.outcome import Outcome, validation_at
from softprompt.sweep.program import shared
from softprompt.sweep.scheduler import Opened, Scheduler
from softprompt.sweep.space import Halving, Space, Trial

_log = logging.getLogger(__name__)

_FILE = "sweep.yaml"


def sweep(space: Space, progress: Progress = silent) -> list[Trial]:
    """Run all trials of a sweep, or go on with it, and return them.

    Raises:
      UserError: if the folder is not this sweep's, or another process works on it.
      Stopped: on SIGTERM or Ctrl-C, once everything is saved.
    """
    settings = space.sweep
    with StopSignals() as stop, stop.deferred(), open_sweep(space):
        if settings.how == "tpe":
            from softprompt.sweep.study import Study

            study = Study(space)
            first = space.file.experiment()
            total = (settings.trials or 0) * first.training.steps
            with progress("sweep", total, "steps", done=study.steps_done()) as bar:
                Scheduler(stop, bar, space, progress).train(study, settings.trials or 0)
            trials = study.trials()
        else:
            trials = space.trials()
            todo = [each for each in trials if Outcome.read(each.folder) is None]
            with progress(
                "sweep", sum(each.experiment.training.steps for each in todo), "steps"
            ) as bar:
                _run_listed(space, trials, stop, bar, progress)
        if stop.requested:
            raise Stopped(stop.requested, "stopped, all saved; the same command goes on from there")
    return trials


def groups(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Trials that can share a compiled program, those of like data order next to each other."""
    found: dict[str, list[Trial]] = {}
    for trial in trials:
        found.setdefault(shared(trial.experiment), []).append(trial)

    def place(trial: Trial) -> tuple[int, int]:
        return trial.experiment.seed, trial.experiment.prompt.length

    return [sorted(group, key=place) for group in found.values()]


def _run_listed(
    space: Space, trials: Sequence[Trial], stop: StopSignals, bar: Bar, progress: Progress
) -> None:
    halving, places = space.sweep.halving, Scheduler(stop, bar, space, progress)
    for until in [*(halving.rungs if halving else ()), None]:
        for group in groups(trials):
            source = _Listed(group)
            places.train(source, len(source.left), until)
            if stop.requested:
                return
        if halving and until is not None:
            for trial in losers(trials, until, halving):
                bar.drop(trial.experiment.training.steps - until)
                Outcome("pruned", until).write(trial.folder)
                _log.info(f"{trial.name}: left at step {until}")


def losers(trials: Sequence[Trial], rung: int, halving: Halving) -> list[Trial]:
    """The trials that do not go on from a rung: all but the best of those that came there.

    A rung at which this was decided before is decided in the same way again.
    """
    there = []
    for trial in trials:
        outcome = Outcome.read(trial.folder)
        measured = validation_at(trial.folder, rung)
        if measured and (outcome is None or outcome.state != "failed"):
            there.append((merit(measured, trial.experiment.evaluation.metric), trial))
    there.sort(key=lambda pair: pair[0], reverse=True)
    kept = max(1, len(there) // halving.factor)
    return [trial for _, trial in there[kept:] if Outcome.read(trial.folder) is None]


class _Listed:
    """Trials of a list, of which those that have ended are left out."""

    def __init__(self, trials: Sequence[Trial]):
        self.left = [each for each in reversed(trials) if Outcome.read(each.folder) is None]

    def next(self) -> Opened | None:
        """See `places.Source`."""
        while self.left:
            if opened := Opened.of(self.left.pop()):
                return opened
        return None

    def goes_on(self, trial: Trial, step: int, measured: Mapping[str, float]) -> bool:
        """Losers of a rung are told when all have come there."""
        return True

    def ended(self, trial: Trial, outcome: Outcome) -> None:
        """It is written in the trial's folder."""


@contextlib.contextmanager
def open_sweep(space: Space) -> Iterator[None]:
    """Make a sweep's folder, or find it as this sweep left it.

    Its lock is shared by processes that take trials from one study.
    """
    folder, of_study = space.folder, space.sweep.how == "tpe"
    with locked_folder(folder, _FILE, "sweep", "sweeping", shared=of_study):
        with file_lock(folder / ".sweep.lock"):
            require_same(space)
            write_file(folder / _FILE, _described(space))
        yield


def require_same(space: Space) -> None:
    """Require that the folder does not hold another sweep that has begun.

    Raises:
      FolderError: if it does.
    """
    folder, now = space.folder, _described(space)
    path = folder / _FILE
    begun = path.is_file() and any(p.name[0] != "." and p != path for p in folder.iterdir())
    was = path.read_text(encoding="utf-8", errors="replace") if begun else now
    if was != now:
        changed = f"{path} is damaged"
        with contextlib.suppress(yaml.YAMLError):
            old = yaml.safe_load(was)
            if isinstance(old, dict) and "sweep" in old:
                changed = "; ".join(differences(old, yaml.safe_load(now)))
        raise FolderError(f"{folder}: holds another sweep ({changed}); choose another folder")


def _described(space: Space) -> str:
    """What makes a sweep what it is; how many trials, and at once, may change."""
    settings = space.sweep.model_dump(exclude={"at_once", "trials"}, exclude_none=True)
    experiment = dump_experiment(space.file.experiment(), space.folder)
    return experiment + yaml.safe_dump({"sweep": settings}, sort_keys=False, allow_unicode=True)
