"""What a sweep will be, before it is run."""

import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from softprompt.errors import UserError
from softprompt.evaluation.scoring import prepare_model, score
from softprompt.runtime.memory import peak_memory
from softprompt.runtime.progress import Progress, silent
from softprompt.runtime.signals import StopSignals
from softprompt.sweep.outcome import Outcome
from softprompt.sweep.program import step_group, trials_that_fit
from softprompt.sweep.runner import groups, require_same
from softprompt.sweep.space import Space, Trial
from softprompt.training.preparation import Preparation, Prepared
from softprompt.training.run import Run

_SAMPLE = 32  # batches that are taken for all


@dataclasses.dataclass(frozen=True)
class Planned:
    """A trial to come.

    Attributes:
      number, parameters: see `Trial`; of `how: tpe` there are none yet.
      group: the number of the group that it is in.
      state: of its outcome, or `waiting`.
    """

    number: int
    parameters: Mapping[str, Any]
    group: int
    state: str


@dataclasses.dataclass(frozen=True)
class Group:
    """Trials that share a program, which is compiled for every length of batches.

    Attributes:
      waiting: how many of them have not ended.
      at_once: how many of them train side by side.
      seconds: that they will take.
      error: why none of this is known, if so.
    """

    waiting: int
    at_once: int
    seconds: float
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """A sweep to come.

    Attributes:
      trials: in order.
      groups: of them, by number.
      seconds: that all will take, as a few timed steps and evaluations of each group tell;
        trials that leave early take less.
    """

    trials: Sequence[Planned]
    groups: Sequence[Group]
    seconds: float


def plan(space: Space, progress: Progress = silent) -> Plan:
    """Plan the sweep of a space.

    What `how: tpe` will choose is not known: the file's own values stand for it.

    Raises:
      UserError: if the folder is another sweep's.
    """
    require_same(space)
    if space.sweep.how == "tpe":
        trials = [space.trial(number, {}) for number in range(space.sweep.trials or 0)]
    else:
        trials = space.trials()
    preparation = Preparation(progress)
    planned, found = [], []
    for number, group in enumerate(groups(trials)):
        outcomes = [Outcome.read(trial.folder) for trial in group]
        for trial, outcome in zip(group, outcomes, strict=True):
            state = outcome.state if outcome else "waiting"
            planned.append(Planned(trial.number, trial.parameters, number, state))
        waiting = [each for each, end in zip(group, outcomes, strict=True) if end is None]
        try:
            found.append(_group(space, waiting, preparation) if waiting else Group(0, 0, 0.0))
        except UserError as error:
            found.append(Group(len(waiting), 0, 0.0, str(error)))
    seconds = round(sum(group.seconds for group in found), 1)
    return Plan(sorted(planned, key=lambda each: each.number), found, seconds)


def _group(space: Space, trials: Sequence[Trial], preparation: Preparation) -> Group:
    """What trials of one program take, one after another."""
    experiment = trials[0].experiment
    prepared = preparation.prepare(experiment)
    seconds, step, at_once = prepared.seconds, 0.0, 1
    with tempfile.TemporaryDirectory() as folder:
        run = Run(
            experiment,
            Path(folder),
            StopSignals(),
            prepared,
            room=space.longest(experiment, prepared.base.backbone.arch.context_length),
        )
        if run.steps:
            at_once = min(
                space.sweep.at_once or trials_that_fit(run, len(trials), peak_memory()), len(trials)
            )
            sample = [run.batches[number] for number in range(min(run.steps, _SAMPLE))]
            sample.sort(key=lambda batch: batch.tokens.size)
            inputs = [(sample[len(sample) // 2], run.key)] * at_once
            first, again = _seconds(lambda: step_group([run] * at_once, inputs))
            seconds += (first - again) * len({batch.tokens.shape for batch in sample})
            step = again / at_once
        run.close()
    row = _seconds_of_a_row(prepared, experiment.evaluation.batch_size)
    for trial in trials:
        training, evaluation = trial.experiment.training, trial.experiment.evaluation
        steps = training.steps if run.steps else 0
        evaluations = max(1, -(-steps // evaluation.every))
        rows = len(prepared.examples["validation"][: evaluation.examples]) * evaluations
        rows += len(prepared.examples.get("test", ()))
        seconds += steps * step + rows * row
    return Group(len(trials), at_once, round(seconds, 1))


def _seconds_of_a_row(prepared: Prepared, batch_size: int) -> float:
    by_length = sorted(prepared.examples["validation"], key=lambda example: len(example.input))
    first = max(0, (len(by_length) - batch_size) // 2)
    examples = by_length[first : first + batch_size]
    model = prepare_model(prepared.method, prepared.base.backbone)
    _, again = _seconds(lambda: list(score(*model, examples, batch_size)))
    return again / len(examples)


def _seconds(work: Any) -> tuple[float, float]:
    """The first time, with compiling, and the median of three more."""
    taken = []
    for _ in range(4):
        began = time.monotonic()
        jax.block_until_ready(work())
        taken.append(time.monotonic() - began)
    return taken[0], sorted(taken[1:])[1]
