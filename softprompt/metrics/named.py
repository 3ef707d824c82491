"""Metrics by the names that experiments and the command line call them by."""

import re
from collections.abc import Mapping, Sequence

from softprompt.errors import UserError
from softprompt.metrics.labels import SUMMARIES, label_scores
from softprompt.metrics.scores import Scores

TEXT_METRICS = ("rouge", "bleu", "chrf", "ter", "exact_match", "token_f1")
LABEL_METRICS = (*SUMMARIES, "confusion")
OF_A_TABLE = tuple(name for name in LABEL_METRICS if name not in ("accuracy", "micro_f1"))
MODEL_METRICS = ("loss", "perplexity")  # of the references' probabilities, not of predictions

_ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def metric_values(name: str) -> list[str]:
    """The names of a metric's values, those of `confusion` left out.

    Raises:
      ValueError: if there is no such metric.
    """
    if types := _rouge_types(name):
        return [f"{kind}.{part}" for kind in types for part in ("precision", "recall", "f1")]
    if name in (*TEXT_METRICS, *LABEL_METRICS, *MODEL_METRICS):
        return [] if name == "confusion" else [name]
    known = ", ".join([*TEXT_METRICS, "rougeN", "rougeL", "rougeLsum", *LABEL_METRICS])
    raise ValueError(f"there is no metric {name!r}; known: {known}")


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

    if types := _rouge_types(name):
        return text.rouge(predictions, references, types, stem)
    return getattr(text, name)(predictions, references)


def is_better(values: Mapping[str, float], others: Mapping[str, float], name: str) -> bool:
    """Whether a model is better than another by a metric or, as good by it, by its loss."""
    return merit(values, name) > merit(others, name)


def merit(values: Mapping[str, float], name: str) -> tuple[float, float]:
    """What is higher the better a model is by a metric or, as good by it, by its loss."""
    sign = -1 if lower_is_better(name) else 1
    return sign * values[name], -values["loss"]


def lower_is_better(name: str) -> bool:
    """Whether a metric is the lower the better a model is."""
    return name in ("loss", "perplexity", "ter")


def _rouge_types(name: str) -> Sequence[str]:
    """The types of ROUGE that a name asks for; none if it is another metric's."""
    if name == "rouge":
        return _ROUGE
    return (name,) if re.fullmatch("rouge([1-9]|L|Lsum)", name) else ()
