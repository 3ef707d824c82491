"""A sweep, from its space of trials to the outcome of every trial."""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence

from softprompt.errors import FolderError, Stopped, UserError
from softprompt.experiment.reading import differences, dump_experiment
from softprompt.experiment.yaml_values import InvalidYAML, dump_yaml, parse_yaml
from softprompt.files.reading import read_text
from softprompt.files.writing import write_file
from softprompt.metrics.named import merit
from softprompt.runtime.bars import bars_in_notebooks
from softprompt.runtime.progress import Bar, Progress
from softprompt.runtime.signals import StopSignals
from softprompt.storage.locks import file_lock, locked_folder
from softprompt.sweep.outcome import Outcome, validation_at
from softprompt.sweep.program import shared_settings
from softprompt.sweep.scheduler import OpenedTrial, Scheduler
from softprompt.sweep.space import HalvingSettings, Space, Trial
from softprompt.training.preparation import mesh_of

_log = logging.getLogger(__name__)

_FILE = "sweep.yaml"


def sweep(space: Space, *, progress: Progress = bars_in_notebooks) -> list[Trial]:
    """Run all trials of a sweep, or resume it, and return the trials.

    Args:
      space: the trials.
      progress: shows progress; by default with bars in a notebook, and not at all elsewhere.

    Raises:
      UserError: if the folder belongs to another sweep, another process works on it, or there are
        too few devices.
      Stopped: on Ctrl-C, SIGTERM or SIGHUP, after every trial is saved. A second signal has its
        usual effect.
    """
    settings = space.sweep
    require_devices(space)
    with open_sweep(space), StopSignals() as stop:
        if settings.how == "tpe":
            from softprompt.sweep.study import Study

            study = Study(space)
            count = settings.trials or 0
            total = count * space.file.experiment().training.steps
            with progress("sweep", total, "steps", done=study.steps_done()) as bar:
                Scheduler(space, stop, bar, progress).train(study, count)
            trials = study.trials()
        else:
            trials = space.trials()
            waiting = [trial for trial in trials if Outcome.read(trial.folder) is None]
            total = sum(trial.experiment.training.steps for trial in waiting)
            with progress("sweep", total, "steps") as bar:
                _run_listed(space, trials, stop, bar, Scheduler(space, stop, bar, progress))
        if stop.requested:
            raise Stopped(stop.requested, "stopped, all saved; start it again to resume")
    return trials


def require_devices(space: Space) -> None:
    """Check that there are enough devices for all trials, before anything is loaded.

    Raises:
      UserError: if there are too few, or they do not divide the rows of a batch.
    """
    for trial in space.trials() if space.sweep.how != "tpe" else [space.trial(0, {})]:
        mesh_of(trial.experiment, space.sweep.devices)


def program_groups(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Group trials that can share a compiled program.

    Within a group, trials that read the data in the same order are neighbors.
    """
    found: dict[str, list[Trial]] = {}
    for trial in trials:
        found.setdefault(shared_settings(trial.experiment), []).append(trial)

    def order(trial: Trial) -> tuple[int, int]:
        return trial.experiment.seed, trial.experiment.prompt.length

    return [sorted(group, key=order) for group in found.values()]


def _run_listed(
    space: Space, trials: Sequence[Trial], stop: StopSignals, bar: Bar, scheduler: Scheduler
) -> None:
    """Run a list of trials, rung by rung if there is successive halving."""
    halving = space.sweep.halving
    for until in [*(halving.rungs if halving else ()), None]:
        for group in program_groups(trials):
            source = _TrialList(group)
            scheduler.train(source, len(source.left), until)
            if stop.requested:
                return
        if halving and until is not None:
            for trial in trials_to_prune(trials, until, halving):
                bar.drop(trial.experiment.training.steps - until)
                Outcome("pruned", until).write(trial.folder)
                _log.info(f"{trial.name}: pruned at step {until}")


def trials_to_prune(trials: Sequence[Trial], rung: int, halving: HalvingSettings) -> list[Trial]:
    """Return the trials that reached a rung and are not among the best there.

    Deciding a rung again gives the same result.
    """
    reached = []
    for trial in trials:
        outcome = Outcome.read(trial.folder)
        measured = validation_at(trial.folder, rung)
        if measured and (outcome is None or outcome.state != "failed"):
            reached.append((merit(measured, trial.experiment.evaluation.metric), trial))
    reached.sort(key=lambda pair: pair[0], reverse=True)
    kept = max(1, len(reached) // halving.factor)
    return [trial for _, trial in reached[kept:] if Outcome.read(trial.folder) is None]


class _TrialList:
    """A `scheduler.Source` of listed trials. Trials that have ended are left out."""

    def __init__(self, trials: Sequence[Trial]):
        self.left = [trial for trial in reversed(trials) if Outcome.read(trial.folder) is None]

    def next(self) -> OpenedTrial | None:
        """Lock and return the next trial."""
        while self.left:
            if opened := OpenedTrial.lock(self.left.pop()):
                return opened
        return None

    def continues(self, trial: Trial, step: int, measured: Mapping[str, float]) -> bool:
        """Always continue: a rung is decided when all trials have reached it."""
        return True

    def ended(self, trial: Trial, outcome: Outcome) -> None:
        """Do nothing: the outcome is already in the trial's folder."""


@contextlib.contextmanager
def open_sweep(space: Space) -> Iterator[None]:
    """Create the folder of a sweep, or reopen it if it holds the same sweep, and lock it.

    Processes that take trials from one Optuna study share the lock.
    """
    folder, shared = space.folder, space.sweep.how == "tpe"
    with locked_folder(folder, _FILE, "sweep", "running a sweep", shared=shared):
        with file_lock(folder / ".sweep.lock"):
            require_same(space)
            write_file(folder / _FILE, _describe(space))
        yield


def require_same(space: Space) -> None:
    """Reject a folder in which another sweep has begun.

    Raises:
      FolderError: if the folder belongs to another sweep.
    """
    folder, path = space.folder, space.folder / _FILE
    try:
        now = parse_yaml(_describe(space))[0]
    except InvalidYAML as error:
        raise UserError(f"{space.file.path}: the sweep is too large ({error})") from None
    begun = path.is_file() and any(p.name[0] != "." and p != path for p in folder.iterdir())
    if not begun:
        return
    changed = f"{path} is damaged"
    with contextlib.suppress(UserError, InvalidYAML):
        old, _ = parse_yaml(read_text(path))
        if isinstance(old, dict) and "sweep" in old:
            changed = "; ".join(differences(old, now))
    if not changed:
        return
    raise FolderError(f"{folder}: holds another sweep ({changed}); choose another folder")


def _describe(space: Space) -> str:
    """The settings that identify a sweep, without those that may change when it resumes."""
    free = {"at_once", "devices", "trials"}
    settings = space.sweep.model_dump(exclude=free, exclude_none=True)
    experiment = dump_experiment(space.file.experiment(), space.folder)
    return experiment + dump_yaml({"sweep": settings})
