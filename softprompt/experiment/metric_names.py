"""The names of metrics and of their values."""

import re
from collections.abc import Sequence

TEXT_METRICS = ("rouge", "bleu", "chrf", "ter", "exact_match", "token_f1")
"""Metrics of texts."""
LABEL_METRICS = (
    "accuracy",
    "precision",
    "recall",
    "macro_f1",
    "micro_f1",
    "matthews",
    "confusion",
)
"""Metrics of labels."""
CORPUS_METRICS = ("precision", "recall", "macro_f1", "matthews", "confusion")
"""Metrics of labels that have no value for a single example."""
MODEL_METRICS = ("loss", "perplexity")
"""Metrics of the probabilities of the references, which need a model."""
OBJECTIVE_METRICS = {
    "preference": ("objective_loss", "reward_margin", "preference_accuracy", "kl"),
    "distill": ("objective_loss", "agreement"),
}
"""By objective, what it measures on the validation and test data. It needs the base model too."""

_ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def metric_values(name: str) -> list[str]:
    """Return the names of a metric's values; none for `confusion`: they depend on the labels.

    Raises:
      ValueError: if there is no such metric.
    """
    if types := rouge_types(name):
        return [f"{kind}.{part}" for kind in types for part in ("precision", "recall", "f1")]
    if name in (*TEXT_METRICS, *LABEL_METRICS, *MODEL_METRICS):
        return [] if name == "confusion" else [name]
    known = ", ".join([*TEXT_METRICS, "rougeN", "rougeL", "rougeLsum", *LABEL_METRICS])
    raise ValueError(f"there is no metric {name!r}; known: {known}")


def lower_is_better(name: str) -> bool:
    """Return whether lower values of a metric are better."""
    return name in ("loss", "perplexity", "ter", "objective_loss", "kl")


def rouge_types(name: str) -> Sequence[str]:
    """Return the types of ROUGE that a name includes; none for other metrics."""
    if name == "rouge":
        return _ROUGE
    return (name,) if re.fullmatch("rouge([1-9]|L|Lsum)", name) else ()
