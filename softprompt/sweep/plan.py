"""What a sweep will be, before it is run."""

import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from softprompt.errors import UserError
from softprompt.evaluation.scoring import make_prefix, score
from softprompt.sweep.outcome import Outcome
from softprompt.sweep.program import step_together
from softprompt.sweep.space import Space, Trial
from softprompt.sweep.sweep import groups
from softprompt.training.preparation import Preparation, Prepared
from softprompt.training.run import Run
from softprompt.training.stop import StopSignals


@dataclasses.dataclass(frozen=True)
class Planned:
    """A trial to come.

    Attributes:
      number, parameters: see `Trial`.
      group: the number of the compiled program that it is in.
      state: of its outcome, or `waiting`.
    """

    number: int
    parameters: Mapping[str, Any]
    group: int
    state: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """A sweep to come.

    Attributes:
      trials: in order.
      groups: how many programs there are; each is compiled for every length of batches.
      seconds: that the trials which have not ended will take, as a few timed steps and
        evaluations of each group tell; trials that leave early take less.
    """

    trials: Sequence[Planned]
    groups: int
    seconds: float


def plan(space: Space) -> Plan:
    """Plan the sweep of a space.

    Raises:
      UserError: if a trial's data or base model will not do, or Optuna is to choose them.
    """
    if space.sweep.how == "tpe":
        raise UserError("--dry-run: the trials of how: tpe are chosen one after another")
    preparation, planned, seconds = Preparation(), [], 0.0
    found = groups(space.trials())
    for number, group in enumerate(found):
        waiting = []
        for trial in group:
            outcome = Outcome.read(trial.folder)
            if outcome is None:
                waiting.append(trial)
            state = outcome.state if outcome else "waiting"
            planned.append(Planned(trial.number, trial.parameters, number, state))
        if waiting:
            seconds += _seconds(space, waiting, preparation)
    return Plan(sorted(planned, key=lambda each: each.number), len(found), round(seconds, 1))


def _seconds(space: Space, trials: Sequence[Trial], preparation: Preparation) -> float:
    """What trials of one group take, one after another."""
    experiment = trials[0].experiment
    prepared = preparation.prepare(experiment)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(
            experiment,
            Path(folder),
            StopSignals(),
            prepared,
            room=space.longest(experiment),
        )
        shapes = len(run.batches.shapes)
        step = _median_seconds(lambda: step_together([run])) if run.steps else 0.0
        run.close()
    compiling = (time.monotonic() - began) * shapes / 2
    row = _seconds_of_a_row(prepared, experiment.evaluation.batch_size)
    seconds = compiling
    for trial in trials:
        training, evaluation = trial.experiment.training, trial.experiment.evaluation
        steps = training.steps if run.steps else 0
        evaluations = max(1, -(-steps // evaluation.every))
        rows = len(prepared.examples["validation"][: evaluation.examples]) * evaluations
        rows += len(prepared.examples.get("test", ()))
        seconds += steps * step + rows * row
    return seconds


def _seconds_of_a_row(prepared: Prepared, batch_size: int) -> float:
    examples = prepared.examples["validation"][:batch_size]
    method = prepared.method
    adapted = method.adapt(prepared.base.backbone)
    prefix = make_prefix(method, adapted)
    return _median_seconds(lambda: list(score(adapted, prefix, examples, batch_size))) / len(
        examples
    )


def _median_seconds(work: Any) -> float:
    """Of three times, once it is compiled."""
    taken = []
    for _ in range(4):
        began = time.monotonic()
        jax.block_until_ready(work())
        taken.append(time.monotonic() - began)
    return sorted(taken[1:])[1]
