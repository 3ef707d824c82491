"""Metrics of labels, all computed from one confusion matrix.

Axis letters: N examples, C labels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from softprompt.errors import UserError
from softprompt.metrics.scores import Scores, mean_of

_MAX_LABELS = 1000
_MAX_CONFUSION_LABELS = 100  # every pair is a value, with 1,000 resamples for its interval
_MAX_STATISTICS = 2**27  # examples times pairs of labels: 1 GiB

Table = np.ndarray  # confusion matrix [C, C]: a row per reference, a column per prediction


def accuracy(table: Table) -> float:
    """Return the fraction of correct predictions."""
    return float(np.trace(table) / table.sum())


def precision(table: Table) -> float:
    """Return the mean over labels of the fraction of their predictions that are correct."""
    return float(np.mean(_correct_fraction(table, axis=0)))


def recall(table: Table) -> float:
    """Return the mean over labels of the fraction of their examples that are found."""
    return float(np.mean(_correct_fraction(table, axis=1)))


def macro_f1(table: Table) -> float:
    """Return the mean of F1 over labels; a label that is never predicted correctly has 0."""
    twice = table.sum(axis=0) + table.sum(axis=1)
    return float(np.mean(_divide(2 * np.diag(table), twice)))


def micro_f1(table: Table) -> float:
    """Return F1 over all decisions; with one label per example it equals the accuracy."""
    return accuracy(table)


def matthews(table: Table) -> float:
    """Return Matthews' correlation of predictions with references, for any number of labels.

    It ranges from -1 to 1, and is 0 if all references or all predictions are the same.
    Source: Gorodkin 2004, doi:10.1016/j.compbiolchem.2004.09.006.
    """
    count, right = table.sum(), np.trace(table)
    predicted, actual = table.sum(axis=0), table.sum(axis=1)
    spread = (count**2 - predicted @ predicted) * (count**2 - actual @ actual)
    return float((right * count - predicted @ actual) / np.sqrt(spread)) if spread else 0.0


SUMMARIES: dict[str, Callable[[Table], float]] = {
    function.__name__: function
    for function in (accuracy, precision, recall, macro_f1, micro_f1, matthews)
}


def label_scores(
    name: str, predictions: Sequence[str], references: Sequence[str | Sequence[str]]
) -> Scores:
    """Measure predicted labels.

    The labels are all that occur among predictions or references.

    Args:
      name: a metric of `SUMMARIES`, or `confusion` for the counts of the confusion matrix,
        which are named `confusion.<reference>.<prediction>`.
      predictions, references: N labels each.

    Raises:
      UserError: if a reference is a list, or there are more than 1,000 different labels (for
        `confusion`, more than 100), or too many examples for so many labels.
    """
    actual = [reference for reference in references if isinstance(reference, str)]
    if len(actual) < len(references):
        raise UserError(f"metric {name}: a reference must be one label, not a list")
    if name in ("accuracy", "micro_f1"):
        pairs = zip(actual, predictions, strict=True)
        return mean_of([name], [[float(label == other)] for label, other in pairs])
    labels = sorted({*predictions, *actual})
    if len(labels) > (_MAX_CONFUSION_LABELS if name == "confusion" else _MAX_LABELS):
        raise UserError(f"metric {name}: {len(labels)} different labels; is this free text?")
    number, size = {label: i for i, label in enumerate(labels)}, len(labels)
    cells = [number[a] * size + number[p] for a, p in zip(actual, predictions, strict=True)]
    used, columns = np.unique(cells, return_inverse=True)  # most cells are empty
    if len(cells) * len(used) > _MAX_STATISTICS:
        raise UserError(
            f"metric {name}: {len(cells)} examples with {len(used)} different pairs of labels need "
            "too much memory; accuracy needs none"
        )
    statistics = np.zeros((len(cells), len(used)))
    statistics[np.arange(len(cells)), columns] = 1

    def combine(total: np.ndarray, count: int) -> dict[str, float]:
        table = np.zeros(size * size)
        table[used] = total
        if name == "confusion":
            names = [f"confusion.{row}.{column}" for row in labels for column in labels]
            return dict(zip(names, table.tolist(), strict=True))
        return {name: SUMMARIES[name](table.reshape(size, size))}

    return Scores(statistics, combine)


def confusion_rows(values: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return the confusion matrix as rows of a table, one per reference label.

    Args:
      values: all values of the metric `confusion`, as `label_scores` names and orders them.
    """
    names, size = list(values), math.isqrt(len(values))
    # The names on the diagonal hold a label twice: labels may contain dots.
    doubled = [name.removeprefix("confusion.") for name in names[:: size + 1]]
    labels = [text[: len(text) // 2] for text in doubled]
    counts = np.array(list(values.values())).reshape(size, size)
    return [
        {"reference \\ prediction": label} | dict(zip(labels, map(int, row), strict=True))
        for label, row in zip(labels, counts, strict=True)
    ]


def _correct_fraction(table: Table, axis: int) -> np.ndarray:
    """Return for each label the fraction of its column (axis 0) or row (axis 1) that is correct."""
    return _divide(np.diag(table), table.sum(axis=axis))


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divide elementwise; 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros(len(numerator)), where=denominator > 0)
