"""Measuring a model of a run on a split: its predictions and its objective."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from softprompt.data.examples import Example
from softprompt.evaluation.evaluate import EvaluationResult, evaluate
from softprompt.evaluation.objective import measure_objective
from softprompt.experiment.schema import Experiment
from softprompt.objectives.model import Model, RowObjective
from softprompt.runtime.progress import Progress
from softprompt.training.preparation import Prepared


def measure(
    experiment: Experiment,
    prepared: Prepared,
    objective: Any,
    model: tuple[Model, Any, Any],
    split: str,
    name: str,
    progress: Progress,
) -> EvaluationResult:
    """Evaluate a model on the validation or the test data of a run.

    Args:
      experiment: its section `evaluation` says how much is measured.
      prepared: the task and the examples.
      objective: the objective of the run.
      model: the model, the adapted backbone to run, and its prefix.
      split: `validation` or `test`.
      name: text before the label of the progress bar; empty for none.
      progress: shows the evaluation.

    Raises:
      NotFiniteError: if a score is infinite or NaN.
    """
    settings = experiment.evaluation
    label = f"{name}: {split}" if name else split
    examples: Sequence[Example] = prepared.examples[split]
    generated: int | None = settings.samples
    if split == "validation":
        examples = examples[: settings.examples]
    elif settings.samples:
        generated = None
    whole, backbone, prefix = model
    result = evaluate(
        backbone,
        prefix,
        prepared.task,
        examples,
        experiment,
        label,
        max_generated=generated,
        progress=progress,
    )
    if not isinstance(objective, RowObjective):
        return result
    size, label = settings.batch_size, f"{label}: objective"
    as_taught = prepared.teacher_examples.get(split)
    rows = None if as_taught is None else as_taught[: len(examples)]
    scores = measure_objective(objective, whole, examples, size, label, progress, rows)
    return dataclasses.replace(result, scores={**result.scores, **scores})
