"""The scheduler of a sweep: it trains trials side by side, each in a slot.

When a trial ends, its slot takes the next trial.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Protocol

import jax

from softprompt.errors import UserError
from softprompt.runtime.memory import is_out_of_memory
from softprompt.runtime.progress import Bar, Progress, silent
from softprompt.runtime.signals import StopSignals
from softprompt.storage.locks import InUseError
from softprompt.storage.run_folder import open_run, write_config
from softprompt.sweep.outcome import Outcome, validation_at
from softprompt.sweep.program import (
    MAX_GROUP,
    device_count,
    step_group,
    step_groups,
    trial_devices,
    trials_that_fit,
)
from softprompt.sweep.space import Space, Trial
from softprompt.training.loop import finished_summary
from softprompt.training.preparation import Preparation
from softprompt.training.reporting import log_data
from softprompt.training.session import Session

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class OpenedTrial:
    """A trial whose run folder this process has locked, unless there is an error.

    Attributes:
      trial: the trial.
      close: unlocks the folder.
      error: why the folder cannot be used; None if it can.
    """

    trial: Trial
    close: Callable[[], None]
    error: UserError | None = None

    @classmethod
    def lock(cls, trial: Trial) -> "OpenedTrial | None":
        """Lock the run folder of a trial. Return None if another process has locked it."""
        stack = contextlib.ExitStack()
        try:
            experiment = stack.enter_context(open_run(trial.folder, trial.experiment))
            write_config(trial.folder, experiment)  # also for a trial that fails at once
            trial = dataclasses.replace(trial, experiment=experiment)
        except InUseError:
            return None
        except UserError as error:
            return cls(trial, stack.close, error)
        return cls(trial, stack.close)


class Source(Protocol):
    """A source of trials, which also decides whether they continue."""

    def next(self) -> OpenedTrial | None:
        """Return the next trial, or None if there is none at the moment."""

    def continues(self, trial: Trial, step: int, measured: Mapping[str, float]) -> bool:
        """Return whether a trial continues after an evaluation with these metrics."""

    def ended(self, trial: Trial, outcome: Outcome) -> None:
        """Handle the end of a trial. Its outcome is already in its folder."""


@dataclasses.dataclass
class _Slot:
    opened: OpenedTrial
    session: Session
    bar: Bar
    judged: int = -1  # the last step at which the source was asked whether to continue
    error: UserError | None = None


class Scheduler:
    """Trains trials side by side.

    Args:
      space: the sweep. Its `at_once` is the number of slots, by default what `trials_that_fit`
        returns.
      stop: stops the work after the current step.
      bar: counts the steps of all trials.
      progress: shows each trial in a bar of its own.
    """

    def __init__(self, space: Space, stop: StopSignals, bar: Bar, progress: Progress = silent):
        self._space, self._stop, self._bar, self._progress = space, stop, bar, progress
        self._preparation = Preparation(progress, space.sweep.devices)
        self._max_group = MAX_GROUP
        self._logged: set[str] = set()  # the digests of the training data that was logged
        self._counted: set[int] = set()  # trials whose earlier steps were dropped from the bar

    def train(self, source: Source, count: int, until: int | None = None) -> None:
        """Train trials until there are no more. On a signal, save all of them and return.

        Args:
          source: gives the next trial when a slot is free.
          count: the maximum number of trials.
          until: stop each trial at this step, which must be one with an evaluation. By
            default trials train to their end.
        """
        slots: list[_Slot] = []
        width = self._space.sweep.at_once or 0
        try:
            while True:
                stopping = self._stop.requested
                slots = [slot for slot in slots if self._continues(slot, source, until)]
                if stopping:  # every slot has saved its trial
                    return
                while not self._stop.requested and len(slots) < max(width, 1):
                    opened = source.next()
                    if opened is None:
                        break
                    slot = self._start(opened, source)
                    if slot is None or not self._continues(slot, source, until):
                        continue
                    slots.append(slot)
                    if not width:
                        width = trials_that_fit(slot.session, count)
                        devices = device_count(slot.session)
                        where = f" on {devices} devices" if devices > 1 else ""
                        _log.info(f"{width} of {count} trials at once{where}")
                if not slots:
                    return
                if not self._stop.requested:
                    self._step(slots)
        except OSError:  # writing a file of one trial failed; save the other trials
            for slot in slots:
                with contextlib.suppress(OSError, UserError):
                    slot.session.save()
            raise
        finally:
            for slot in slots:
                self._release(slot)

    def _start(self, opened: OpenedTrial, source: Source) -> _Slot | None:
        """Put a trial into a slot, or return None if it ends before its first step."""
        trial = opened.trial
        steps = trial.experiment.training.steps
        try:
            if opened.error is not None:
                raise opened.error
            if summary := finished_summary(trial.folder):  # stopped before `_end` wrote it
                self._bar.drop(steps)
                self._end(opened, source, Outcome("finished", summary["steps"]))
                return None
            prepared = self._preparation.prepare(trial.experiment, folder=trial.folder)
            if (data := prepared.examples["train"].digest) not in self._logged:
                self._logged.add(data)
                log_data(prepared)
            context = prepared.base.backbone.arch.context_length
            session = Session(
                trial.experiment,
                trial.folder,
                prepared,
                self._stop,
                padded_length=self._space.longest(trial.experiment, context),
                name=trial.name,
                progress=self._progress,
            )
        except UserError as error:
            self._bar.drop(steps)
            self._end(opened, source, Outcome("failed", None, str(error)))
            return None
        done = session.run.step
        if trial.number not in self._counted:
            self._counted.add(trial.number)
            self._bar.drop(done)
        bar = self._progress(trial.name, session.steps, "steps", done=done, part=True)
        return _Slot(opened, session, bar)

    def _continues(self, slot: _Slot, source: Source, until: int | None) -> bool:
        """Do what is due for a trial. Return False if the trial has left its slot."""
        session, trial = slot.session, slot.opened.trial
        step = session.run.step
        outcome = None
        try:
            if slot.error is not None:
                raise slot.error
            has_next_step = session.run_due_work()
            if self._stop.requested:
                session.save()
                return True
            if not has_next_step:
                session.close()
                session.finish()
                outcome = Outcome("finished", step)
            elif session.run.evaluated == step and step not in (slot.judged, until):
                slot.judged = step
                measured = validation_at(trial.folder, step)
                if measured and not source.continues(trial, step, measured):
                    outcome = Outcome("pruned", step)
        except UserError as error:
            outcome = Outcome("failed", step, str(error))
        if outcome is None and (until is None or step < until):
            return True
        self._release(slot, close=outcome is None)
        if outcome is not None:
            self._bar.drop(trial.experiment.training.steps - step)
            self._end(slot.opened, source, outcome)
        return False

    def _step(self, slots: list[_Slot]) -> None:
        """Make one step of every trial, in groups that share a program."""
        inputs = {id(slot.session): slot.session.next_inputs() for slot in slots}
        slot_of = {id(slot.session): slot for slot in slots}
        waiting = [slot.session for slot in slots]
        while waiting:
            group = step_groups(waiting, self._max_group)[0]
            try:
                results = step_group(group, [inputs[id(session)] for session in group])
            except jax.errors.JaxRuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._halve_groups(len(group), trial_devices(group[0]))
                continue
            waiting = [session for session in waiting if session not in group]
            for session, result in zip(group, results, strict=True):
                slot, (batch, _) = slot_of[id(session)], inputs[id(session)]
                try:
                    session.accept(*result, padding=batch.padding, parallel_runs=len(slots))
                except UserError as error:
                    slot.error = error
                slot.bar.advance(note=session.reporter.quality or session.reporter.note)
                self._bar.advance(note=f"{len(slots)} at once")

    def _halve_groups(self, count: int, devices: int) -> None:
        """Allow groups of half as many trials, because `count` do not fit into memory."""
        if count <= devices:
            raise UserError(
                "the device runs out of memory with a single trial; set a smaller "
                "training.batch_size, and raise training.accumulate to keep the number of "
                "examples per step; everything done so far is kept"
            )
        self._max_group = max(count // 2, devices)
        _log.warning(f"out of memory: trying {self._max_group} instead of {count} trials at once")

    def _release(self, slot: _Slot, *, close: bool = True) -> None:
        slot.session.close()
        slot.bar.close()
        if close:
            slot.opened.close()

    def _end(self, opened: OpenedTrial, source: Source, outcome: Outcome) -> None:
        outcome.write(opened.trial.folder)
        source.ended(opened.trial, outcome)
        opened.close()
        if outcome.error:
            _log.warning(f"{opened.trial.name}: failed: {outcome.error}")
        elif outcome.state == "pruned":
            _log.info(f"{opened.trial.name}: pruned at step {outcome.step}")
