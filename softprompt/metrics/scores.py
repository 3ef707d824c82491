"""What a metric measured: numbers of each example, and what their sum comes to.

All metrics have this form, those of a whole corpus too (BLEU sums counts of n-grams), so
that resampling the examples costs one product of matrices and no second look at the texts.

Axis letters: N examples, S statistics, R resamples.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from softprompt.errors import UserError

_RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Scores:
    """A metric on some examples.

    Attributes:
      statistics: `[N, S]`, of each example; N is at least 1.
      combine: from the sum `[S]` of the statistics of so many examples, to values by name.
      signature: how the metric was computed, as its reference implementation writes it.
    """

    statistics: np.ndarray
    combine: Callable[[np.ndarray, int], dict[str, float]]
    signature: str | None = None

    def values(self) -> dict[str, float]:
        """Of all examples together."""
        return self.combine(self.statistics.sum(axis=0), len(self.statistics))

    def each(self) -> list[dict[str, float]]:
        """Of each example alone."""
        return [self.combine(row, 1) for row in self.statistics]

    def intervals(self, level: float = 0.95, seed: int = 0) -> dict[str, tuple[float, float]]:
        """Bootstrap intervals: percentiles of the values of 1,000 resamples.

        (Efron & Tibshirani 1993, chapter 13; for BLEU Koehn 2004, W04-3250)

        Args:
          level: share of the resamples inside the interval.
          seed: of the resampling.
        """
        resampled = _resampled(self, seed)
        tail = (1 - level) / 2
        low, high = np.quantile(resampled, [tail, 1 - tail], axis=0)
        return dict(zip(self.values(), zip(low.tolist(), high.tolist(), strict=True), strict=True))


@dataclasses.dataclass(frozen=True)
class Difference:
    """One system's value less another's.

    Attributes:
      difference: the one measured.
      interval: its 95 % bootstrap interval.
      p_value: how often chance would make it as large.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float


def paired_test(ours: Scores, theirs: Scores, seed: int = 0) -> dict[str, Difference]:
    """Compare two systems on the same examples, by the paired bootstrap.

    1,000 times the same examples are drawn for both. Were there no difference, the
    resampled ones would spread around zero as they spread around the one measured; `p_value`
    is the share of them that are at least so large. (Koehn 2004, W04-3250, as sacrebleu
    computes it)

    Args:
      ours, theirs: one metric of both, their examples in the same order.
      seed: of the resampling.

    Raises:
      UserError: if they have different numbers of examples, or different names.
    """
    if len(ours.statistics) != len(theirs.statistics):
        raise UserError(
            f"two systems are compared on the same examples, not on {len(ours.statistics)} "
            f"and {len(theirs.statistics)}"
        )
    names = list(ours.values())
    if names != list(theirs.values()):
        raise UserError("two systems are compared by metrics of the same names")
    measured = _array(ours.values()) - _array(theirs.values())
    resampled = _resampled(ours, seed) - _resampled(theirs, seed)
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0).tolist()
    extreme = (np.abs(resampled - measured) >= np.abs(measured)).sum(axis=0)
    p_values = (extreme + 1) / (_RESAMPLES + 1)
    intervals = zip(low, high, strict=True)
    found = map(Difference, measured.tolist(), intervals, p_values.tolist())
    return dict(zip(names, found, strict=True))


def all_values(scores: Mapping[str, Scores]) -> dict[str, float]:
    """The values of several metrics, by the values' own names."""
    return {name: value for one in scores.values() for name, value in one.values().items()}


def all_intervals(scores: Mapping[str, Scores]) -> dict[str, tuple[float, float]]:
    """Their bootstrap intervals."""
    return {name: pair for one in scores.values() for name, pair in one.intervals().items()}


def mean_of(names: Sequence[str], rows: Sequence[Sequence[float]]) -> Scores:
    """A metric that is the mean over examples.

    Args:
      names: of its values.
      rows: the values of each example.
    """

    def mean(total: np.ndarray, count: int) -> dict[str, float]:
        return dict(zip(names, (total / count).tolist(), strict=True))

    return Scores(np.array(rows, np.float64), mean)


def _resampled(scores: Scores, seed: int) -> np.ndarray:
    """Values `[R, names]` of examples drawn with repetition; of equal N, the same are drawn."""
    random, count = np.random.default_rng(seed), len(scores.statistics)
    values = []
    for _ in range(_RESAMPLES):
        times = np.bincount(random.integers(0, count, count), minlength=count)  # [N]
        values.append(_array(scores.combine(times @ scores.statistics, count)))
    return np.array(values)


def _array(values: dict[str, float]) -> np.ndarray:
    return np.array(list(values.values()))
