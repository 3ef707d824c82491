"""A custom objective and optimizer from Python code, and what a run records about them.

A run never stores the objects themselves.
"""

import hashlib
import re
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from softprompt.errors import UserError
from softprompt.experiment.metric_names import OBJECTIVE_METRICS
from softprompt.experiment.optimizer_settings import OptimizerSettings
from softprompt.experiment.schema import Experiment
from softprompt.objectives.model import Objective, RowObjective


class Custom(NamedTuple):
    """An objective and an optimizer that replace parts of an experiment.

    Attributes:
      objective: replaces the loss of the section `objective`; None to keep it.
      optimizer: replaces the section `optimizer`; None to keep it.
    """

    objective: Objective | None = None
    optimizer: optax.GradientTransformation | None = None

    def marked(self, experiment: Experiment) -> Experiment:
        """Return the experiment as the run records it, with the custom parts marked.

        With a `RowObjective`, `objective_loss` selects the best step, unless the experiment names
        another metric or has a verbalizer.

        Raises:
          UserError: if the objective or the optimizer cannot be used.
        """
        changes: dict[str, Any] = {}
        if self.objective is not None:
            _require_objective(self.objective)
            changes["objective"] = experiment.objective.model_copy(update={"custom": True})
        if self.optimizer is not None:
            if not isinstance(self.optimizer, optax.GradientTransformation):
                raise UserError("optimizer: must be an Optax optimizer, such as optax.adamw(1e-2)")
            changes["optimizer"] = OptimizerSettings(name="custom")
        experiment = experiment.model_copy(update=changes)
        if self.objective is None:
            return experiment
        measured, metric = isinstance(self.objective, RowObjective), experiment.evaluation.metric
        if "metric" not in experiment.evaluation.model_fields_set and not experiment.verbalizer:
            metric = "objective_loss" if measured else "loss"
        of_objectives = {name for names in OBJECTIVE_METRICS.values() for name in names}
        if metric in of_objectives and not (measured and metric == "objective_loss"):
            raise UserError(
                f"evaluation.metric: {metric} is not measured with this objective; use "
                "objective_loss for a RowObjective, or loss for another function"
            )
        return experiment.with_metric(metric)


AS_WRITTEN = Custom()
"""The experiment as it is written."""


def _require_objective(objective: Any) -> None:
    if not callable(objective):
        raise UserError(
            "objective: must be a function (model, batch, key) -> (sum, weight, metrics)"
        )
    try:
        hash(objective)
    except TypeError:
        raise UserError(
            f"objective: {type(objective).__name__} has no hash; make it a frozen dataclass"
        ) from None


def optimizer_record(optimizer: Any, trainable: Any) -> dict[str, str]:
    """Return what a checkpoint records about a custom optimizer.

    Args:
      optimizer: the Optax optimizer; None for the optimizer of the experiment.
      trainable: the trainable state.

    Returns:
      Nothing for the optimizer of the experiment, whose settings are in `config.yaml`. Otherwise
      two digests. `state` is the digest of the names and shapes of its state. `computation` is the
      digest of its program, with learning rates and schedules. It also changes with the versions
      of Optax and JAX.

    Raises:
      UserError: if its state cannot be saved.
    """
    if optimizer is None:
        return {}
    shapes = jax.eval_shape(lambda x: x, trainable)
    state = jax.eval_shape(optimizer.init, shapes)
    parts = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise UserError(
                f"optimizer: {name} in its state is a random key, which a checkpoint cannot hold; "
                "choose an optimizer without randomness"
            )
        parts.append(f"{name} {leaf.dtype}{leaf.shape}")
    program = jax.make_jaxpr(optimizer.update)(shapes, state, shapes)
    text = re.sub("0x[0-9a-f]+", "", str(program))  # addresses of functions
    constants = [np.asarray(constant).tobytes() for constant in program.consts]
    return {
        "state": _digest("\n".join(parts).encode()),
        "computation": _digest(text.encode(), *constants),
    }


def _digest(*contents: bytes) -> str:
    return hashlib.sha256(b"\0".join(contents)).hexdigest()
