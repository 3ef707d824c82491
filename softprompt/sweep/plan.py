"""A forecast of a sweep: its trials and how long they will take."""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from softprompt.backbones.batch import Batch
from softprompt.errors import UserError
from softprompt.evaluation.scoring import prepare_model, score
from softprompt.runtime.progress import Progress, silent
from softprompt.runtime.signals import StopSignals
from softprompt.sweep.outcome import Outcome
from softprompt.sweep.program import (
    MAX_GROUP,
    device_count,
    step_group,
    step_groups,
    trials_that_fit,
)
from softprompt.sweep.runner import program_groups, require_devices, require_same
from softprompt.sweep.space import Space, Trial
from softprompt.training.preparation import Preparation, Prepared
from softprompt.training.session import Session

_SAMPLE = 32  # number of batches from which the time of a step is estimated


@dataclasses.dataclass(frozen=True)
class PlannedTrial:
    """A trial of the forecast; it may have ended already.

    Attributes:
      number, parameters: see `Trial`. With `how: tpe` there are no parameters yet.
      group: number of the group that it belongs to.
      state: the state of its outcome, or `waiting`.
    """

    number: int
    parameters: Mapping[str, Any]
    group: int
    state: str


@dataclasses.dataclass(frozen=True)
class PlannedGroup:
    """Trials that share a program, which is compiled once for every batch length.

    Attributes:
      waiting: number of trials that have not ended.
      at_once: number of trials that train side by side.
      devices: number of devices that they use.
      seconds: estimated duration.
      error: why there is no estimate; None if there is one.
    """

    waiting: int
    at_once: int
    devices: int
    seconds: float
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The forecast.

    Attributes:
      trials: in order.
      groups: by number.
      seconds: estimated duration of all trials, from a few timed steps and evaluations of
        each group. Trials that are pruned take less.
    """

    trials: Sequence[PlannedTrial]
    groups: Sequence[PlannedGroup]
    seconds: float


def plan(space: Space, *, progress: Progress = silent) -> Plan:
    """Forecast a sweep.

    The parameters that `how: tpe` will choose are unknown, so the values of the file are used
    in their place.

    Args:
      space: the trials.
      progress: shows progress; silent by default.

    Raises:
      UserError: if the folder belongs to another sweep, or there are too few devices.
    """
    require_same(space)
    require_devices(space)
    if space.sweep.how == "tpe":
        trials = [space.trial(number, {}) for number in range(space.sweep.trials or 0)]
    else:
        trials = space.trials()
    preparation = Preparation(progress, space.sweep.devices)
    planned, groups = [], []
    for number, members in enumerate(program_groups(trials)):
        outcomes = [Outcome.read(trial.folder) for trial in members]
        for trial, outcome in zip(members, outcomes, strict=True):
            state = outcome.state if outcome else "waiting"
            planned.append(PlannedTrial(trial.number, trial.parameters, number, state))
        waiting = [trial for trial, end in zip(members, outcomes, strict=True) if end is None]
        group = PlannedGroup(0, 0, 0, 0.0)
        try:
            if waiting:
                group = _plan_group(space, waiting, preparation)
        except UserError as error:
            group = PlannedGroup(len(waiting), 0, 0, 0.0, str(error))
        groups.append(group)
    seconds = round(sum(group.seconds for group in groups), 1)
    return Plan(sorted(planned, key=lambda trial: trial.number), groups, seconds)


def _plan_group(space: Space, trials: Sequence[Trial], preparation: Preparation) -> PlannedGroup:
    """Estimate how long the trials of one program take."""
    experiment = trials[0].experiment
    prepared = preparation.prepare(experiment)
    padded_length = space.longest(experiment, prepared.base.backbone.arch.context_length)
    seconds, step_seconds, at_once = prepared.seconds, 0.0, 1
    with (
        tempfile.TemporaryDirectory() as folder,
        Session(
            experiment, Path(folder), prepared, StopSignals(), padded_length=padded_length
        ) as session,
    ):
        steps = session.steps
        if steps:
            at_once = space.sweep.at_once or trials_that_fit(session, len(trials))
            at_once = min(at_once, len(trials))
            sample = [session.batches[number] for number in range(min(steps, _SAMPLE))]
            sample.sort(key=lambda batch: batch.tokens.size)
            group = step_groups([session] * at_once, MAX_GROUP)[0]
            first, again = _time(lambda: _step(group, sample[len(sample) // 2]))
            seconds += (first - again) * len({batch.tokens.shape for batch in sample})
            step_seconds = again / len(group)
    row_seconds = _seconds_per_row(prepared, experiment.evaluation.batch_size)
    for trial in trials:
        evaluation = trial.experiment.evaluation
        trial_steps = trial.experiment.training.steps if steps else 0
        evaluations = max(1, -(-trial_steps // evaluation.every))
        rows = len(prepared.examples["validation"][: evaluation.examples]) * evaluations
        rows += len(prepared.examples.get("test", ()))
        seconds += trial_steps * step_seconds + rows * row_seconds
    return PlannedGroup(len(trials), at_once, device_count(session), round(seconds, 1))


def _step(group: Sequence[Session], batch: Batch) -> Any:
    """Make a step of a group that consists of one session, several times."""
    state = group[0].state
    results = step_group(group, [(batch, state.key)] * len(group))
    state.trainable, state.opt_state, measured = results[0]
    return measured


def _seconds_per_row(prepared: Prepared, batch_size: int) -> float:
    """Time a batch of validation examples of medium length."""
    dataset = prepared.examples["validation"]
    first = max(0, (len(dataset) - batch_size) // 2)
    by_length = dataset.lengths.input.argsort(kind="stable")
    examples = [dataset[int(i)] for i in by_length[first : first + batch_size]]
    model = prepare_model(prepared.method, prepared.base.backbone)
    _, again = _time(lambda: list(score(*model, examples, batch_size)))
    return again / len(examples)


def _time(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the first call, which compiles, and the median of three more calls."""
    seconds = []
    for _ in range(4):
        began = time.monotonic()
        jax.block_until_ready(work())
        seconds.append(time.monotonic() - began)
    return seconds[0], sorted(seconds[1:])[1]
