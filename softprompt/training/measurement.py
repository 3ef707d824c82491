"""Measuring a model on examples: its predictions, and the objective that it was trained with."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from softprompt.data.examples import Example
from softprompt.data.task import Task
from softprompt.data.top_tokens import TopTokens
from softprompt.evaluation.evaluate import EvaluationResult, evaluate
from softprompt.evaluation.objective import measure_objective
from softprompt.experiment.schema import Experiment
from softprompt.objectives.model import Model, RowObjective
from softprompt.runtime.progress import Progress


def measure(
    experiment: Experiment,
    task: Task,
    examples: Sequence[Example],
    objective: Any,
    model: tuple[Model, Any, Any],
    label: str,
    progress: Progress,
    *,
    max_generated: int | None = None,
    taught: Sequence[Example] | TopTokens | None = None,
) -> EvaluationResult:
    """Evaluate a model, and measure an objective if it can tell rows apart.

    Args:
      experiment, task, label, progress, max_generated: see `evaluate`.
      examples: N examples.
      objective: it is measured if it is a `RowObjective`.
      model: the model, and the adapted backbone and the prefix to run.
      taught: see `Inputs`; it may be longer than the examples.

    Raises:
      NotFiniteError: if a score is infinite or NaN.
    """
    whole, backbone, prefix = model
    result = evaluate(
        backbone,
        prefix,
        task,
        examples,
        experiment,
        label,
        max_generated=max_generated,
        progress=progress,
    )
    if not isinstance(objective, RowObjective):
        return result
    size, label = experiment.evaluation.batch_size, f"{label}: objective"
    scores = measure_objective(objective, whole, examples, size, label, progress, taught)
    return dataclasses.replace(result, scores={**result.scores, **scores})
