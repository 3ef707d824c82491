"""Measure an objective on examples, with the base model as its reference or teacher.

Axis letters: N examples, B rows of a batch.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from softprompt.backbones.batch import Batch
from softprompt.data.batches import evaluation_batches
from softprompt.data.examples import Example
from softprompt.data.top_tokens import TopTokens
from softprompt.metrics.scores import Scores, weighted_mean
from softprompt.objectives.model import Model, RowObjective
from softprompt.parallel.mesh import whole
from softprompt.runtime.finite import model_not_finite
from softprompt.runtime.progress import Progress, silent


def measure_objective(
    objective: Any,
    model: Model,
    examples: Sequence[Example],
    batch_size: int,
    label: str,
    progress: Progress = silent,
    teacher: Sequence[Example] | TopTokens | None = None,
) -> dict[str, Scores]:
    """Return the loss of an objective, as `objective_loss`, and its metrics.

    Args:
      objective: a `RowObjective`.
      model: the method, the frozen backbone of the base model, and the teacher if there is one.
      examples: N examples, encoded as for training.
      batch_size: the most examples in a batch.
      label: label of the progress bar.
      progress: shows how many examples are done.
      teacher: see `evaluation_batches`.

    Raises:
      NotFiniteError: if a value is infinite or NaN.
    """
    statistics: dict[str, np.ndarray] = {}
    results = evaluation_batches(
        examples,
        batch_size,
        lambda batch: jax.tree.map(np.asarray, _of_rows(model, batch, objective)),
        separate_targets=model.backbone.separate_targets,
        mesh=model.backbone.mesh,
        teacher=teacher,
    )
    with progress(label, len(examples), "examples") as bar:
        for numbers, (values, weights) in results:
            rows = slice(len(numbers))
            for name, value in values.items():
                if not np.isfinite(value[rows]).all():
                    raise model_not_finite("scores")
                of_all = statistics.setdefault(name, np.zeros((len(examples), 2)))
                of_all[numbers] = np.stack([value[rows], weights[rows]], axis=1)
            bar.advance(len(numbers))
    statistics = {"objective_loss": statistics.pop("loss"), **statistics}
    return {name: Scores(array, weighted_mean(name)) for name, array in statistics.items()}


@partial(jax.jit, static_argnames="objective")
def _of_rows(model: Model, batch: Batch, objective: RowObjective):
    return whole(objective.of_rows(model, batch, None), model.backbone.mesh)
