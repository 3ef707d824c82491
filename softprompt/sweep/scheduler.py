"""The places in which trials train side by side.

A trial that ends leaves its place to the next one.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Protocol

import jax

from softprompt.errors import UserError
from softprompt.runtime.memory import is_out_of_memory, peak_memory
from softprompt.runtime.progress import Bar, Progress, silent
from softprompt.runtime.signals import StopSignals
from softprompt.storage.locks import InUseError
from softprompt.storage.run_folder import open_run, write_config
from softprompt.sweep.outcome import Outcome, validation_at
from softprompt.sweep.program import MAX_GROUP, parts, step_group, trials_that_fit
from softprompt.sweep.space import Space, Trial
from softprompt.training.loop import finished
from softprompt.training.preparation import Preparation
from softprompt.training.run import Run

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A trial whose folder this process has locked; `close` gives it back.

    Attributes:
      error: why its folder will not do, if so.
    """

    trial: Trial
    close: Callable[[], None]
    error: UserError | None = None

    @classmethod
    def of(cls, trial: Trial) -> "Opened | None":
        """Lock a trial's folder; None if another process has it."""
        stack = contextlib.ExitStack()
        try:
            stack.enter_context(open_run(trial.folder, trial.experiment))
            write_config(trial.folder, trial.experiment)  # also of one that fails at its start
        except InUseError:
            return None
        except UserError as error:
            return cls(trial, stack.close, error)
        return cls(trial, stack.close)


class Source(Protocol):
    """Where trials come from."""

    def next(self) -> Opened | None:
        """The next one, or None if there are no more for now."""

    def goes_on(self, trial: Trial, step: int, measured: Mapping[str, float]) -> bool:
        """Whether a trial goes on after an evaluation, given what it measured."""

    def ended(self, trial: Trial, outcome: Outcome) -> None:
        """A trial has ended, and that is written to its folder."""


@dataclasses.dataclass
class _Slot:
    opened: Opened
    run: Run
    bar: Bar
    judged: int = -1
    error: UserError | None = None


class Scheduler:
    """Runs trials, as many side by side as there are places.

    Args:
      stop: ends the work where it does no harm.
      bar: of all steps of all trials.
      space: of the trials; it says how many places there are, if not as many as there is
        memory for.
    """

    def __init__(self, stop: StopSignals, bar: Bar, space: Space, progress: Progress = silent):
        self._progress = progress
        self._stop, self._bar, self._space = stop, bar, space
        self._preparation = Preparation(progress)
        self._taken = 0.0  # bytes of memory before the first trial's first step
        self._widest = MAX_GROUP  # trials that make a step together
        self._seen: set[int] = set()  # trials whose earlier steps are off the bar

    def train(self, source: Source, count: int, until: int | None = None) -> None:
        """Run trials until there are no more, or a signal has come and all is saved.

        Args:
          source: of trials; the next one is asked for when a place is free.
          count: how many they are at most.
          until: the step to stop each at, one with an evaluation; None: their end.
        """
        places: list[_Slot] = []
        at_once = self._space.sweep.at_once or 0
        try:
            while True:
                stopping = self._stop.requested
                places = [each for each in places if self._goes_on(each, source, until)]
                if stopping:  # and every place has seen it, and saved
                    return
                while not self._stop.requested and len(places) < max(at_once, 1):
                    opened = source.next()
                    if opened is None:
                        break
                    place = self._start(opened, source)
                    if place is None or not self._goes_on(place, source, until):
                        continue
                    places.append(place)
                    if not at_once:
                        self._taken = self._taken or peak_memory()
                        at_once = trials_that_fit(place.run, count, self._taken)
                        _log.info(f"{at_once} of {count} trials at once")
                if not places:
                    return
                if not self._stop.requested:
                    self._step(places)
        except OSError:  # of one trial's files; the others lose nothing
            for place in places:
                with contextlib.suppress(OSError, UserError):
                    place.run.save()
            raise
        finally:
            for place in places:
                self._leave(place)

    def _start(self, opened: Opened, source: Source) -> _Slot | None:
        trial = opened.trial
        steps = trial.experiment.training.steps
        try:
            if opened.error is not None:
                raise opened.error
            if summary := finished(trial.folder):  # and stopped before it could say so
                self._bar.drop(steps)
                self._end(opened, source, Outcome("finished", summary["steps"]))
                return None
            prepared = self._preparation.prepare(trial.experiment)
            context = prepared.base.backbone.arch.context_length
            run = Run(
                trial.experiment,
                trial.folder,
                self._stop,
                prepared,
                room=self._space.longest(trial.experiment, context),
                name=trial.name,
                progress=self._progress,
            )
        except UserError as error:
            self._bar.drop(steps)
            self._end(opened, source, Outcome("failed", None, str(error)))
            return None
        if trial.number not in self._seen:
            self._seen.add(trial.number)
            self._bar.drop(run.progress.step)
        bar = self._progress(trial.name, run.steps, "steps", done=run.progress.step, part=True)
        return _Slot(opened, run, bar)

    def _goes_on(self, place: _Slot, source: Source, until: int | None) -> bool:
        """Do what is due in a place, if work stops save it; False if its trial left it."""
        run, trial = place.run, place.opened.trial
        step = run.progress.step
        outcome = None
        try:
            if place.error is not None:
                raise place.error
            another = run.run_due_work()
            if self._stop.requested:
                run.save()
                return True
            if not another:
                run.close()
                run.finish()
                outcome = Outcome("finished", step)
            elif run.progress.evaluated == step and step not in (place.judged, until):
                place.judged = step
                measured = validation_at(trial.folder, step)
                if measured and not source.goes_on(trial, step, measured):
                    outcome = Outcome("pruned", step)
        except UserError as error:
            outcome = Outcome("failed", step, str(error))
        if outcome is None and (until is None or step < until):
            return True
        self._leave(place, close=outcome is None)
        if outcome is not None:
            self._bar.drop(trial.experiment.training.steps - step)
            self._end(place.opened, source, outcome)
        return False

    def _step(self, places: list[_Slot]) -> None:
        inputs = {id(place.run): place.run.inputs() for place in places}
        by_run = {id(place.run): place for place in places}
        left = [place.run for place in places]
        while left:
            runs = parts(left, self._widest)[0]
            try:
                results = step_group(runs, [inputs[id(run)] for run in runs])
            except jax.errors.JaxRuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._narrow(len(runs))
                continue
            left = [run for run in left if run not in runs]
            for run, result in zip(runs, results, strict=True):
                place, (batch, _) = by_run[id(run)], inputs[id(run)]
                try:
                    run.take(*result, padding=batch.padding, beside=len(places))
                except UserError as error:
                    place.error = error
                place.bar.advance(note=run.quality or run.note)
                self._bar.advance(note=f"{len(places)} at once")

    def _narrow(self, count: int) -> None:
        """So many trials have no memory for a step together: from now on half of them."""
        if count == 1:
            raise UserError(
                "the device has no memory for a single trial; set a smaller training.batch_size, "
                "with training.accumulate for as many examples a step: what was done is kept"
            )
        self._widest = count // 2
        _log.info(f"no memory for a step of {count} trials at once: trying {self._widest}")

    def _leave(self, place: _Slot, *, close: bool = True) -> None:
        place.run.close()
        place.bar.close()
        if close:
            place.opened.close()

    def _end(self, opened: Opened, source: Source, outcome: Outcome) -> None:
        outcome.write(opened.trial.folder)
        source.ended(opened.trial, outcome)
        opened.close()
        if outcome.state != "finished":
            what = f"failed: {outcome.error}" if outcome.error else f"left at step {outcome.step}"
            _log.info(f"{opened.trial.name}: {what}")
