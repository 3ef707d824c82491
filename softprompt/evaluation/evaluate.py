"""Evaluate a model on examples: the loss of the targets, and the quality of its answers.

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
from softprompt.experiment.methods import method_class
from softprompt.experiment.metric_names import MODEL_METRICS
from softprompt.experiment.schema import Experiment
from softprompt.generation.engine import Engine, requests_of
from softprompt.metrics.named import measure
from softprompt.metrics.scores import Scores, all_intervals, all_values
from softprompt.runtime.progress import Progress, silent


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """The result of `evaluate`.

    Attributes:
      scores: by metric name, `loss` first.
      samples: for every example that the model answered, its `input` (a mapping of
        fields), `reference` and `prediction`.
    """

    scores: Mapping[str, Scores]
    samples: Sequence[Mapping[str, Any]]

    def values(self) -> dict[str, float]:
        """Return all values of the metrics."""
        return all_values(self.scores)

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Return the 95% bootstrap intervals of the values."""
        return all_intervals(self.scores)


def evaluate(
    backbone,
    prefix,
    task: Task,
    examples: Sequence[Example],
    experiment: Experiment,
    label: str,
    *,
    max_generated: int | None = None,
    progress: Progress = silent,
) -> EvaluationResult:
    """Score the targets of examples, predict their answers, and measure the predictions.

    Args:
      backbone: the model to run.
      prefix: the result of `make_prefix`, or None.
      task: the task that made the examples.
      examples: N examples with their answers.
      experiment: gives the metrics, and the settings of scoring and generation.
      label: label of the progress bars.
      max_generated: for free text, the number of examples to generate answers for, counted from
        the first. None: all examples.
      progress: shows how many examples are done.

    Returns:
      `loss`, the mean negative log-likelihood per target token in nats; `perplexity`, for plain
      text; `accuracy`, for labels; and the experiment's metrics of the predicted labels or the
      generated texts.
    """
    settings = experiment.evaluation
    scores = np.empty((len(examples), len(examples[0].candidates)), np.float32)
    with progress(label, len(examples), "examples") as bar:
        for numbers, part in score(backbone, prefix, examples, settings.batch_size):
            scores[numbers] = part
            bar.advance(len(numbers))
    named = MODEL_METRICS if task.template.text else [*settings.metrics, settings.metric]
    of_model = dict.fromkeys(["loss", *(name for name in named if name in MODEL_METRICS)])
    results = {name: likelihood(name, examples, scores) for name in of_model}
    names = [name for name in settings.metrics if name not in MODEL_METRICS]
    if task.template.text:  # there is nothing to answer
        answered, predictions, references = examples[:0], [], []
    elif task.labels:
        answered = examples
        names = list(dict.fromkeys(["accuracy", *names]))
        calibrated = calibrated_scores(scores, examples, backbone, prefix, task, experiment.scoring)
        predictions = [task.labels[i] for i in calibrated.argmax(axis=1)]
        references = [task.labels[example.answer or 0] for example in examples]
    else:
        answered, trained = examples[:max_generated], method_class(experiment.method).trainable
        generation = task.stopping(experiment.generation, trained=trained is not False)
        requests = []
        if answered:  # without requests, max_new_tokens may exceed the context window
            requests = requests_of([e.record for e in answered], task, prefix, generation)
        engine = Engine(backbone, task.base.tokenizer, generation)
        generated = engine.generate(requests, settings.batch_size, f"{label}: generate", progress)
        predictions = [each.text.strip() for each in generated]
        references = [task.reference(example.record) for example in answered]
    if answered:
        results |= measure(names, predictions, references, stem=settings.stem, progress=progress)
    samples = [
        {"input": task.input_fields(e.record), "reference": reference, "prediction": prediction}
        for e, reference, prediction in zip(answered, references, predictions, strict=True)
    ]
    return EvaluationResult(results, samples)


def likelihood(name: str, examples: Sequence[Example], scores: np.ndarray) -> Scores:
    """Return the loss or the perplexity of the right candidates.

    Args:
      name: `loss`, the mean negative log-likelihood per token in nats, or `perplexity`,
        e to the power of the loss.
      examples: N examples with their answers.
      scores: log-probabilities of their candidates, `[N, C]`.
    """
    answers = [example.answer or 0 for example in examples]
    right = scores[np.arange(len(examples)), answers].astype(np.float64)
    tokens = [
        len(example.candidates[answer]) + example.earlier_targets
        for example, answer in zip(examples, answers, strict=True)
    ]

    def combine(total: np.ndarray, count: int) -> dict[str, float]:
        loss = float(total[0] / total[1])
        return {name: loss if name == "loss" else math.exp(min(loss, 700))}

    return Scores(np.stack([-right, tokens], axis=1), combine)
