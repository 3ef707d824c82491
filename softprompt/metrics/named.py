"""Compute metrics by name, and compare models by a metric."""

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
from softprompt.runtime.progress import Progress, silent


def measure(
    names: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    *,
    stem: bool = False,
    progress: Progress = silent,
) -> dict[str, Scores]:
    """Score predictions by several metrics.

    Args:
      names: names of metrics. For texts: `rouge` (ROUGE-1, 2, L and Lsum), `rouge1` to
        `rouge9`, `rougeL`, `rougeLsum`, `bleu`, `chrf`, `ter`, `exact_match`, `token_f1`.
        For labels: `accuracy`, `precision`, `recall`, `macro_f1`, `micro_f1`, `matthews`,
        `confusion`.
      predictions: N texts, at least one.
      references: for each prediction a text, or a list of texts that are all correct.
      stem: whether ROUGE stems English words before it compares them.
      progress: shows for each metric of texts how many predictions are done.

    Returns:
      Scores by metric name.

    Raises:
      UserError: if there is no such metric, it does not accept lists of references, or a text is
        too long for it: over 500,000 characters; for ROUGE-L over 50,000 words; for TER over
        500 words.
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
            scores[name] = _text_scores(name, predictions, references, stem, progress)
    return scores


def _text_scores(
    name: str,
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    stem: bool,
    progress: Progress,
) -> Scores:
    from softprompt.metrics import rouge, text  # take seconds to import; labels do not need them

    if types := rouge_types(name):
        return rouge.rouge(predictions, references, types, stem, progress)
    return getattr(text, name)(predictions, references, progress)


def is_better(values: Mapping[str, float], others: Mapping[str, float], name: str) -> bool:
    """Return whether a model is better than another by a metric, or by its loss if they tie."""
    return merit(values, name) > merit(others, name)


def merit(values: Mapping[str, float], name: str) -> tuple[float, float]:
    """Return a key for sorting models by a metric, then by loss. Higher is better."""
    sign = -1 if lower_is_better(name) else 1
    return sign * values[name], -values["loss"]
