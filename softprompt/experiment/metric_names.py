"""The names of metrics, as experiments and the command line write them."""

import re
from collections.abc import Sequence

TEXT_METRICS = ("rouge", "bleu", "chrf", "ter", "exact_match", "token_f1")
LABEL_METRICS = (
    "accuracy",
    "precision",
    "recall",
    "macro_f1",
    "micro_f1",
    "matthews",
    "confusion",
)
CORPUS_METRICS = ("precision", "recall", "macro_f1", "matthews", "confusion")
"""Metrics of labels that no single example has a value of."""
MODEL_METRICS = ("loss", "perplexity")
"""Metrics of the probabilities of the references, which need a model."""

_ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def metric_values(name: str) -> list[str]:
    """The names of a metric's values, those of `confusion` left out.

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
    """Whether a metric is the lower the better a model is."""
    return name in ("loss", "perplexity", "ter")


def rouge_types(name: str) -> Sequence[str]:
    """The types of ROUGE that a name asks for; none if it is another metric's."""
    if name == "rouge":
        return _ROUGE
    return (name,) if re.fullmatch("rouge([1-9]|L|Lsum)", name) else ()
