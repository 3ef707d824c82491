"""A model measured on examples: what it gives the right targets, and what it answers.

Axis letters: N examples, C candidates.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from softprompt.data.examples import Example
from softprompt.data.task import Task
from softprompt.evaluation.scoring import calibrated_scores, score
from softprompt.experiment.metric_names import MODEL_METRICS
from softprompt.experiment.schema import Experiment
from softprompt.generation.engine import Engine, requests_of
from softprompt.metrics.named import measure
from softprompt.metrics.scores import Scores, all_intervals, all_values
from softprompt.runtime.progress import Progress, silent


@dataclasses.dataclass(frozen=True)
class Measured:
    """What `evaluate` found.

    Attributes:
      scores: by the metrics' names, `loss` first.
      samples: of every example that was answered `input` (its fields by name), `reference`
        and `prediction`.
    """

    scores: Mapping[str, Scores]
    samples: Sequence[Mapping[str, Any]]

    def values(self) -> dict[str, float]:
        """All values of the metrics."""
        return all_values(self.scores)

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Their bootstrap intervals."""
        return all_intervals(self.scores)


def evaluate(
    backbone,
    prefix,
    task: Task,
    examples: Sequence[Example],
    experiment: Experiment,
    label: str,
    *,
    written: int | None = None,
    progress: Progress = silent,
) -> Measured:
    """Score examples and answer them, under progress bars.

    Args:
      backbone, prefix: the model, and what `make_prefix` gives.
      task: what the examples were made by.
      examples: N, with their answers.
      experiment: whose metrics, scoring and settings of generation to use.
      label: what stands in front of the bars.
      written: behind how many of them to write, if they are of free text; None: all.
      progress: shows how many examples are done.

    Returns:
      `loss`, the mean negative log-likelihood per token of the right targets in nats; of
      labels `accuracy`; and the experiment's metrics, of free text those of what is written.
    """
    settings = experiment.evaluation
    scores = np.empty((len(examples), len(examples[0].candidates)), np.float32)
    with progress(label, len(examples), "examples") as bar:
        for numbers, part in score(backbone, prefix, examples, settings.batch_size):
            scores[numbers] = part
            bar.advance(len(numbers))
    of_model = dict.fromkeys(["loss", *(n for n in settings.metrics if n in MODEL_METRICS)])
    measured = {name: likelihood(name, examples, scores) for name in of_model}
    names = [name for name in settings.metrics if name not in MODEL_METRICS]
    if task.labels:
        answered = examples
        names = list(dict.fromkeys(["accuracy", *names]))
        chosen = calibrated_scores(scores, examples, backbone, prefix, task, experiment.scoring)
        predictions = [task.labels[i] for i in chosen.argmax(axis=1)]
        references = [task.labels[example.answer or 0] for example in examples]
    else:
        answered, how = examples[:written], experiment.generation
        requests = []
        if answered:  # else there need not be room to write anything
            requests = requests_of([e.record for e in answered], task, prefix, how)
        engine = Engine(backbone, task.base.tokenizer, how)
        generated = engine.generate(requests, settings.batch_size, f"{label}: write", progress)
        predictions = [each.text.strip() for each in generated]
        references = [task.reference(example.record) for example in answered]
    if answered:
        measured |= measure(names, predictions, references, stem=settings.stem)
    samples = [
        {"input": task.input_fields(e.record), "reference": reference, "prediction": prediction}
        for e, reference, prediction in zip(answered, references, predictions, strict=True)
    ]
    return Measured(measured, samples)


def likelihood(name: str, examples: Sequence[Example], scores: np.ndarray) -> Scores:
    """How likely the right targets are.

    Args:
      name: `loss`, the mean negative log-likelihood per token in nats, or `perplexity`, e to
        the power of it.
      examples: N, with their answers.
      scores: `[N, C]` log-probabilities.
    """
    answers = [example.answer or 0 for example in examples]
    right = scores[np.arange(len(examples)), answers].astype(np.float64)
    tokens = [len(e.candidates[answer]) for e, answer in zip(examples, answers, strict=True)]

    def combine(total: np.ndarray, count: int) -> dict[str, float]:
        loss = float(total[0] / total[1])
        return {name: loss if name == "loss" else math.exp(min(loss, 700))}

    return Scores(np.stack([-right, tokens], axis=1), combine)
