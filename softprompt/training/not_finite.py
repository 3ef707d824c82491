"""The error about a step with infinite or NaN values, with advice."""

import math
from collections.abc import Mapping

from softprompt.experiment.schema import Experiment
from softprompt.runtime.finite import NotFiniteError
from softprompt.storage.checkpoints import Checkpoints


def wrong_values(values: Mapping[str, float], kind: str = "") -> str:
    """Describe the values that are infinite or NaN; empty if there are none.

    Args:
      values: values by name.
      kind: put before their names.
    """
    return " and ".join(
        f"the {kind}{name.replace('_', ' ')} is {value}"
        for name, value in values.items()
        if not math.isfinite(value)
    )


def step_not_finite(
    experiment: Experiment, step: int, what: str, checkpoints: Checkpoints, *, alone: bool
) -> NotFiniteError:
    """Return the error about a value after a step, with advice.

    Args:
      experiment: the experiment.
      step: the step.
      what: the problem.
      checkpoints: the checkpoints of the run. Pending ones are completed first.
      alone: whether this is a single run, and not a trial of a sweep.
    """
    checkpoints.wait()
    newest = checkpoints.steps[-1:]
    kept = f"checkpoint {checkpoints.path(newest[0])} is kept" if newest else ""
    where = " and train in another folder" if alone else ""
    optimizer = experiment.optimizer
    advice = f"lower optimizer.learning_rate (now {optimizer.learning_rate:g})"
    if optimizer.name == "custom":
        advice = "lower the learning rate of the optimizer, or clip the gradient"
    elif optimizer.clip_norm is None:
        advice += " or set optimizer.clip_norm"
    if step <= 1:  # measured before the first update
        advice = f"change the settings of method {experiment.method}, or {advice}"
    return NotFiniteError(
        f"step {step}: {what}; {advice}{where}; {kept or 'there is no checkpoint yet'}"
    )
