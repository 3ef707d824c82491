"""Score labels for many requests at a time.

Axis letters: C candidates.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import threading
from collections.abc import Sequence

import numpy as np

from softprompt.data.examples import Example
from softprompt.data.layout import Layout, PackedShape
from softprompt.errors import UserError
from softprompt.runtime.finite import model_not_finite
from softprompt.serving.bank import Stored
from softprompt.serving.device import MOST_TARGETS, Device

_MOST_TOGETHER = 64  # examples that are considered for a batch

Scored = concurrent.futures.Future[np.ndarray]
"""A future of the log-probabilities of an example's candidates, `[C]`."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Item:
    prefix: Stored
    example: Example
    done: Scored

    @functools.cached_property
    def tokens(self) -> int:
        """The number of tokens in its row: input and candidates, without their last tokens."""
        candidates = self.example.candidates
        return len(self.example.input) + sum(map(len, candidates)) - len(candidates)

    @functools.cached_property
    def targets(self) -> int:
        """The number of tokens of all candidates."""
        return sum(map(len, self.example.candidates))


class Scorer:
    """Collects examples and scores those with the same prefix together.

    Args:
      device: is used by the thread that calls `run`.
    """

    def __init__(self, device: Device):
        self._device = device
        self._layout = Layout(separate_targets=False, branching=True)
        self._items: collections.deque[_Item] = collections.deque()
        self._lock = threading.Lock()

    @property
    def pending(self) -> int:
        """The number of examples that wait."""
        return len(self._items)

    def require_fitting(self, prefix: Stored, example: Example) -> None:
        """Require that an example fits the compiled programs.

        Raises:
          UserError: if it is too long.
        """
        item = _Item(prefix, example, concurrent.futures.Future())
        if not any(_fits([item], shape) for shape in self._device.scoring_shapes):
            raise UserError(
                f"{example.record.where}: the input and the labels have {item.tokens} tokens, but "
                f"the server scores at most {self._device.length}"
            )

    def add(self, prefix: Stored, example: Example) -> Scored:
        """Score an example in one of the next batches."""
        item = _Item(prefix, example, concurrent.futures.Future())
        with self._lock:
            self._items.append(item)
        return item.done

    def run(self) -> None:
        """Score one batch: the oldest example, and others with its prefix that fit."""
        with self._lock:
            if not self._items:
                return
            first = self._items[0]
            same = (each for each in self._items if each.prefix is first.prefix)
            shape, chosen = self._batch(list(itertools.islice(same, _MOST_TOGETHER)))
            for each in chosen:
                self._items.remove(each)
        chosen = [each for each in chosen if each.done.set_running_or_notify_cancel()]
        if not chosen:
            return
        try:
            batch = self._layout.lay_out([[each.example for each in chosen]], shape)
            scores = self._device.score(first.prefix, batch)[0]
        except Exception as error:
            for each in chosen:
                each.done.set_exception(error)
            raise
        begin = 0
        for each in chosen:
            ends = begin + np.cumsum([len(candidate) for candidate in each.example.candidates])
            total = np.add.reduceat(scores[: ends[-1]], [begin, *ends[:-1]])
            begin = ends[-1]
            if np.isfinite(total).all():
                each.done.set_result(total)
            else:
                each.done.set_exception(model_not_finite("scores"))

    def fail(self, error: Exception) -> None:
        """Report an error for all examples that wait."""
        with self._lock:
            failed, self._items = list(self._items), collections.deque()
        for each in failed:
            if each.done.set_running_or_notify_cancel():
                each.done.set_exception(error)

    def _batch(self, items: Sequence[_Item]) -> tuple[PackedShape, list[_Item]]:
        """Return the shape that fits the most items, and these items."""
        shapes = self._device.scoring_shapes
        fitting = [shape for shape in shapes if _fits(items[:1], shape)]
        batches = []
        for shape in fitting:
            chosen: list[_Item] = []
            for each in items:
                if len(chosen) < shape.rows and _fits([*chosen, each], shape):
                    chosen.append(each)
            batches.append((shape, chosen))
        return max(batches, key=lambda batch: (len(batch[1]), -batch[0].tokens))


def require_scorable(labels: Sequence[Sequence[int]]) -> None:
    """Require that the labels of a prompt, given as ids, fit the compiled programs.

    Raises:
      UserError: if they have too many tokens together.
    """
    if (count := sum(map(len, labels))) > MOST_TARGETS:
        raise UserError(
            f"its labels have {count} tokens together, but the server scores at most "
            f"{MOST_TARGETS}; shorten the texts of the verbalizer"
        )


def _fits(items: Sequence[_Item], shape: PackedShape) -> bool:
    return (
        len(items) <= shape.rows
        and sum(each.tokens for each in items) <= shape.tokens
        and max(each.tokens for each in items) <= shape.row_length
        and max(each.targets for each in items) <= shape.row_targets
    )
