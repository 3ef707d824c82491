"""The layout of batches: examples as arrays of a given shape.

Axis letters: G packs, R rows of a pack, N tokens of a pack, M targets of a pack, T tokens of a row.
"""

import dataclasses
from collections.abc import Container, Sequence

import numpy as np

from softprompt.backbones.batch import Batch
from softprompt.data.examples import Example, Lengths


@dataclasses.dataclass(frozen=True)
class PackedShape:
    """The shape of a batch. Each shape needs a compiled program of its own.

    Attributes:
      packs: G.
      rows: R, the rows of each pack.
      tokens: N, the tokens of each pack.
      targets: M, the targets of each pack.
      row_length: T, the most tokens of a row.
      row_targets: the most targets of a row.
    """

    packs: int
    rows: int
    tokens: int
    targets: int
    row_length: int
    row_targets: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the examples of a dataset become rows.

    Attributes:
      separate_targets: whether the backbone reads candidates apart from the input.
      branching: whether a row may hold several candidates of more than one token, for which
        attention needs more than the causal mask.
    """

    separate_targets: bool
    branching: bool

    @classmethod
    def of(cls, lengths: Lengths, separate_targets: bool) -> "Layout":
        """Return the layout for examples of the given lengths."""
        return cls(separate_targets, lengths.branching and not separate_targets)

    def row_lengths(self, lengths: Lengths) -> np.ndarray:
        """Return for each example the number of tokens in its row."""
        return lengths.input if self.separate_targets else lengths.input + lengths.read

    def lay_out(
        self,
        packs: Sequence[Sequence[Example]],
        shape: PackedShape,
        filled: Container[int] | None = None,
        weights: Sequence[np.ndarray] | None = None,
    ) -> Batch:
        """Lay out examples as a batch.

        Args:
          packs: the examples of each pack. Missing examples leave rows empty.
          shape: the shape, in which they fit.
          filled: the packs to fill in, by default all. The others only get their lengths.
          weights: the weights of the examples of each pack; None if all count the same.
        """
        count = shape.packs
        batch = Batch(
            tokens=np.zeros((count, shape.tokens), np.int32),
            lengths=np.zeros((count, shape.rows), np.int32),
            targets=np.zeros((count, shape.targets), np.int32),
            target_lengths=np.zeros((count, shape.rows), np.int32),
            target_candidates=np.full((count, shape.targets), -1, np.int32),
            target_indices=np.zeros((count, shape.targets), np.int32),
            positions=np.zeros((count, shape.tokens), np.int32),
            segments=np.full((count, shape.tokens), -1, np.int32),
            row_length=shape.row_length,
            row_targets=shape.row_targets,
        )
        for pack, examples in enumerate(packs):
            begin = target = 0
            for row, example in enumerate(examples):
                sizes = list(map(len, example.candidates))
                length = len(example.input)
                if not self.separate_targets:
                    length += sum(sizes) - len(sizes)
                targets = sum(sizes) + example.earlier_targets
                batch.lengths[pack, row] = length
                batch.target_lengths[pack, row] = targets
                if filled is None or pack in filled:
                    self._fill(batch, pack, begin, target, example)
                begin, target = begin + length, target + targets
        if weights is not None:
            of_rows = np.zeros((count, shape.rows), np.float32)
            for pack, values in enumerate(weights):
                of_rows[pack, : len(values)] = values
            batch = dataclasses.replace(batch, weights=of_rows)
        if self.separate_targets:
            batch = dataclasses.replace(batch, target_indices=None)
        if not self.branching:
            batch = dataclasses.replace(batch, positions=None, segments=None)
        return batch

    def _fill(self, batch: Batch, pack: int, begin: int, target: int, example: Example) -> None:
        """Write an example into a pack from a token and a target on."""
        length = len(example.input)
        end = begin + length
        batch.tokens[pack, begin:end] = example.input
        batch.positions[pack, begin:end] = np.arange(length)
        batch.segments[pack, begin:end] = 0
        for start, stop in example.earlier:
            scored = slice(target, target + stop - start)
            batch.targets[pack, scored] = example.input[start:stop]
            batch.target_candidates[pack, scored] = 0
            batch.target_indices[pack, scored] = np.arange(begin + start, begin + stop) - 1
            target = scored.stop
        last = end - 1
        for number, candidate in enumerate(example.candidates):
            scored = slice(target, target + len(candidate))
            batch.targets[pack, scored] = candidate
            batch.target_candidates[pack, scored] = number
            target = scored.stop
            if self.separate_targets:
                continue
            read, stop = candidate[:-1], end + len(candidate) - 1
            batch.tokens[pack, end:stop] = read
            batch.positions[pack, end:stop] = length + np.arange(len(read))
            batch.segments[pack, end:stop] = number + 1
            batch.target_indices[pack, scored] = [last, *range(end, stop)]
            end = stop


def grown(size: int, needed: int) -> int:
    """Return a size of a shape, or if more is needed, the size plus a few sixteenths of it."""
    step = multiple_of_8(-(-size // 16))
    return size + max(0, -(-(needed - size) // step)) * step


def multiple_of_8(number: int) -> int:
    """Round up to a multiple of 8."""
    return -(-number // 8) * 8
