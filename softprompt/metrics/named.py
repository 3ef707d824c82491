"""Metrics by the names that experiments and the command line call them by."""

from collections.abc import Mapping, Sequence

from softprompt.errors import UserError
from softprompt.experiment.metric_names import (
    LABEL_METRICS,
    MODEL_METRICS,
    lower_is_better,
    metric_values,
    rouge_types,
)
from softprompt.metrics.labels import label_scores
from softprompt.metrics.scores import Scores


def measure(
    names: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    *,
    stem: bool = False,
) -> dict[str, Scores]:
    """Score predictions by several metrics.

    Args:
      names: of the metrics: `rouge` (1, 2, L and Lsum), or `rouge` with any N, `L` or `Lsum`;
        `bleu`, `chrf`, `ter`, `exact_match`, `token_f1`; and of labels `accuracy`,
        `precision`, `recall`, `macro_f1`, `micro_f1`, `matthews`, `confusion`.
      predictions: N texts, at least one.
      references: N texts, or lists of texts of which any will do.
      stem: whether ROUGE compares English words without their endings.

    Returns:
      Scores by the metrics' names.

    Raises:
      UserError: if there is no such metric, or it does not take such references.
    """
    for name in names:
        try:
            metric_values(name)
        except ValueError as error:
            raise UserError(str(error)) from None
        if name in MODEL_METRICS:
            raise UserError(f"metric {name!r} needs a model, not predictions")
    scores = {}
    for name in names:
        if name in LABEL_METRICS:
            scores[name] = label_scores(name, predictions, references)
        else:
            scores[name] = _text_scores(name, predictions, references, stem)
    return scores


def _text_scores(
    name: str, predictions: Sequence[str], references: Sequence[str | Sequence[str]], stem: bool
) -> Scores:
    from softprompt.metrics import text  # here, for it takes seconds that labels need not wait

    if types := rouge_types(name):
        return text.rouge(predictions, references, types, stem)
    return getattr(text, name)(predictions, references)


def is_better(values: Mapping[str, float], others: Mapping[str, float], name: str) -> bool:
    """Whether a model is better than another by a metric or, as good by it, by its loss."""
    return merit(values, name) > merit(others, name)


def merit(values: Mapping[str, float], name: str) -> tuple[float, float]:
    """What is higher the better a model is by a metric or, as good by it, by its loss."""
    sign = -1 if lower_is_better(name) else 1
    return sign * values[name], -values["loss"]
