"""Metrics of labels, all from one table of how often each was taken for which.

Axis letters: N examples, C labels.
"""

from collections.abc import Callable, Sequence

import numpy as np

from softprompt.errors import UserError
from softprompt.metrics.scores import Scores, mean_of

_MOST_LABELS = 1000

Table = np.ndarray  # [C, C], counts of references (rows) that were predicted (columns)


def accuracy(table: Table) -> float:
    """The share of right predictions."""
    return float(np.trace(table) / table.sum())


def precision(table: Table) -> float:
    """The mean over labels of the share of its predictions that are right."""
    return float(np.mean(_share(table, axis=0)))


def recall(table: Table) -> float:
    """The mean over labels of the share of its examples that are found."""
    return float(np.mean(_share(table, axis=1)))


def macro_f1(table: Table) -> float:
    """The mean over labels of F1; a label that is never right has 0."""
    twice = table.sum(axis=0) + table.sum(axis=1)
    return float(np.mean(_divide(2 * np.diag(table), twice)))


def micro_f1(table: Table) -> float:
    """F1 of all decisions together: with one label an example, the accuracy."""
    return accuracy(table)


def matthews(table: Table) -> float:
    """Matthews' correlation of predictions with references, for any number of labels.

    From -1 to 1; 0 if all references or all predictions are the same. (Gorodkin 2004,
    doi:10.1016/j.compbiolchem.2004.09.006)
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
    """A metric of `SUMMARIES`, or the table itself as `confusion`.

    The labels are those that occur among predictions or references. `confusion` counts as
    `confusion.<reference>.<prediction>`.

    Args:
      name: of the metric.
      predictions, references: N labels each.

    Raises:
      UserError: if a reference is a list of texts, or there are too many labels for a table.
    """
    actual = [reference for reference in references if isinstance(reference, str)]
    if len(actual) < len(references):
        raise UserError(f"metric {name}: a reference must be one label, not a list")
    if name in ("accuracy", "micro_f1"):
        pairs = zip(actual, predictions, strict=True)
        return mean_of([name], [[float(label == other)] for label, other in pairs])
    labels = sorted({*predictions, *actual})
    if len(labels) > _MOST_LABELS:
        raise UserError(f"metric {name}: {len(labels)} different labels; is this free text?")
    number, size = {label: i for i, label in enumerate(labels)}, len(labels)
    cells = [number[a] * size + number[p] for a, p in zip(actual, predictions, strict=True)]
    used, columns = np.unique(cells, return_inverse=True)  # most cells of a table are empty
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


def _share(table: Table, axis: int) -> np.ndarray:
    return _divide(np.diag(table), table.sum(axis=axis))


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros(len(numerator)), where=denominator > 0)
