"""Scores: statistics of each example, and a function from their sum to a metric's values.

All metrics have this form, including metrics of a whole corpus: BLEU, for example, sums
counts of n-grams. The bootstrap therefore resamples statistics and never compares texts again.

Axis letters: N examples, S statistics, R resamples.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from softprompt.errors import UserError

_RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Scores:
    """A metric on N examples.

    Attributes:
      statistics: statistics of each example, `[N, S]`; N is at least 1.
      combine: function of a sum of statistics `[S]` and the number of examples in the sum,
        which returns the metric's values by name.
      signature: settings of the metric in the notation of its reference implementation.
    """

    statistics: np.ndarray
    combine: Callable[[np.ndarray, int], dict[str, float]]
    signature: str | None = None

    def values(self) -> dict[str, float]:
        """Return the values for all examples together."""
        return self.combine(self.statistics.sum(axis=0), len(self.statistics))

    def each(self) -> list[dict[str, float]]:
        """Return the values for each example alone."""
        return [self.combine(row, 1) for row in self.statistics]

    def intervals(self, level: float = 0.95, seed: int = 0) -> dict[str, tuple[float, float]]:
        """Return percentile bootstrap intervals from 1,000 resamples.

        Sources: Efron & Tibshirani 1993, chapter 13; for BLEU Koehn 2004, W04-3250.

        Args:
          level: fraction of the resamples inside the interval.
          seed: seed of the resampling.
        """
        resampled = _resampled(self, seed)
        tail = (1 - level) / 2
        low, high = np.quantile(resampled, [tail, 1 - tail], axis=0)
        return dict(zip(self.values(), zip(low.tolist(), high.tolist(), strict=True), strict=True))


def weighted_mean(name: str) -> Callable[[np.ndarray, int], dict[str, float]]:
    """Return the `combine` of a metric that divides a sum by a sum of weights, in this order."""
    return lambda total, count: {name: float(total[0] / total[1])}


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference between the values of two systems.

    Attributes:
      difference: the first system's value minus the second's.
      interval: its 95% bootstrap interval.
      p_value: probability of a difference at least this large if there were none.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float


def paired_test(ours: Scores, theirs: Scores, seed: int = 0) -> dict[str, Difference]:
    """Compare two systems on the same examples by the paired bootstrap.

    Each of 1,000 resamples draws the same examples for both systems. The test assumes that
    without a true difference, resampled differences would be distributed around zero as they
    are around the measured one. `p_value` is the fraction of resamples whose distance from
    the measured difference is at least the measured difference itself.
    Source: Koehn 2004, W04-3250, as computed by sacrebleu.

    Args:
      ours, theirs: scores of the two systems by the same metric, with the examples in the
        same order.
      seed: seed of the resampling.

    Raises:
      UserError: if the numbers of examples or the names of the values differ.
    """
    if len(ours.statistics) != len(theirs.statistics):
        raise UserError(
            f"two systems must be compared on the same examples, not on {len(ours.statistics)} "
            f"and {len(theirs.statistics)}"
        )
    names = list(ours.values())
    if names != list(theirs.values()):
        raise UserError("two systems must be compared by the same metrics")
    measured = _array(ours.values()) - _array(theirs.values())
    resampled = _resampled(ours, seed) - _resampled(theirs, seed)
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0).tolist()
    extreme = (np.abs(resampled - measured) >= np.abs(measured)).sum(axis=0)
    p_values = (extreme + 1) / (_RESAMPLES + 1)
    intervals = zip(low, high, strict=True)
    found = map(Difference, measured.tolist(), intervals, p_values.tolist())
    return dict(zip(names, found, strict=True))


def all_values(scores: Mapping[str, Scores]) -> dict[str, float]:
    """Return the values of several metrics in one mapping."""
    return {name: value for one in scores.values() for name, value in one.values().items()}


def all_intervals(scores: Mapping[str, Scores]) -> dict[str, tuple[float, float]]:
    """Return the bootstrap intervals of several metrics in one mapping."""
    return {name: pair for one in scores.values() for name, pair in one.intervals().items()}


def mean_of(names: Sequence[str], rows: Sequence[Sequence[float]]) -> Scores:
    """Return a metric whose values are means over examples.

    Args:
      names: names of the values.
      rows: the values of each example, in the same order.
    """

    def mean(total: np.ndarray, count: int) -> dict[str, float]:
        return dict(zip(names, (total / count).tolist(), strict=True))

    return Scores(np.array(rows, np.float64), mean)


def _resampled(scores: Scores, seed: int) -> np.ndarray:
    """Return the values of R resamples, one row each.

    The examples drawn depend only on N and the seed, so they are the same for two systems.
    """
    random, count = np.random.default_rng(seed), len(scores.statistics)
    values = []
    for _ in range(_RESAMPLES):
        times = np.bincount(random.integers(0, count, count), minlength=count)  # [N]
        values.append(_array(scores.combine(times @ scores.statistics, count)))
    return np.array(values)


def _array(values: dict[str, float]) -> np.ndarray:
    return np.array(list(values.values()))
