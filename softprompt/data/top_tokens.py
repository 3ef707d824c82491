"""The most likely tokens of a teacher at each target, stored before training.

Axis letters: N examples, G packs, M targets of a pack, W targets of all examples, k tokens.
"""

import dataclasses
from collections.abc import Container, Sequence

import numpy as np

from softprompt.backbones.batch import Batch


class TopTokens:
    """The most likely tokens of a teacher at the targets of N examples.

    Args:
      targets: `[N]`, the number of targets of each example.
      ids: `[W, k]`, the most likely token first.
      log_probabilities: `[W, k + 1]`, of these tokens and of all other tokens together.
    """

    def __init__(self, targets: np.ndarray, ids: np.ndarray, log_probabilities: np.ndarray):
        self.ids, self.log_probabilities = ids, log_probabilities
        self.targets, self._ends = targets, np.cumsum(targets)

    @classmethod
    def empty(cls, targets: np.ndarray, count: int) -> "TopTokens":
        """Return arrays to fill in, for `count` tokens at each target."""
        total = int(targets.sum())
        return cls(
            targets,
            np.empty((total, count), np.int32),
            np.empty((total, count + 1), np.float32),
        )

    def places(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the indices in W of all targets of some examples, in order."""
        counts = self.targets[numbers]
        ends = np.cumsum(counts)
        return np.arange(counts.sum()) + np.repeat(self._ends[numbers] - ends, counts)

    def beside(
        self, batch: Batch, packs: Sequence[np.ndarray], filled: Container[int] | None = None
    ) -> Batch:
        """Return a batch together with the most likely tokens at its targets.

        Args:
          batch: rows of the student.
          packs: the numbers of the examples in each pack.
          filled: see `Layout.lay_out`.
        """
        shape, count = batch.targets.shape, self.ids.shape[1]
        ids = np.zeros((*shape, count), np.int32)
        log_probabilities = np.zeros((*shape, count + 1), np.float32)
        for pack, numbers in enumerate(packs):
            if filled is None or pack in filled:
                places = self.places(numbers)
                ids[pack, : len(places)] = self.ids[places]
                log_probabilities[pack, : len(places)] = self.log_probabilities[places]
        return dataclasses.replace(batch, top_tokens=ids, top_log_probabilities=log_probabilities)
