"""Examples to batches of few shapes, in an order that only the seed decides.

Axis letters: B batch, T tokens, M target positions.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from softprompt.backbones.batch import Batch
from softprompt.data.examples import Example
from softprompt.runtime.memory import Result, run_batches

_WINDOW = 32  # batches whose examples are sorted by length together
_MULTIPLE = 8  # lengths are rounded up to this
_MOST_LENGTHS = 6  # batch lengths a dataset gets


def only_answer(example: Example) -> Example:
    """The example to train on: the right candidate alone."""
    assert example.answer is not None
    return dataclasses.replace(example, candidates=[example.candidates[example.answer]], answer=0)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a dataset's examples become batches.

    Attributes:
      separate_targets: whether a separate decoder reads the candidates.
      branching: whether rows may hold several candidates that are read.
      shapes: the few `(T, M)` that batches have, T rising.
    """

    separate_targets: bool
    branching: bool
    shapes: Sequence[tuple[int, int]]

    @classmethod
    def of(cls, examples: Sequence[Example], separate_targets: bool = False) -> "Layout":
        """At most six lengths, chosen so that padding single examples wastes least."""
        branching = any(sum(len(c) > 1 for c in e.candidates) > 1 for e in examples)
        layout = cls(separate_targets, branching and not separate_targets, [])
        lengths = np.array([layout.length(e) for e in examples])
        lengths = -(-lengths // _MULTIPLE) * _MULTIPLE
        bounds = _least_padding(lengths, _MOST_LENGTHS)
        counts = np.array([_target_count(e) for e in examples])
        shapes = [(bound, int(counts[lengths <= bound].max())) for bound in bounds]
        return dataclasses.replace(layout, shapes=shapes)

    def length(self, example: Example) -> int:
        """Tokens of an example's row."""
        read = 0 if self.separate_targets else sum(len(c) - 1 for c in example.candidates)
        return len(example.input) + read

    def batch(self, examples: Sequence[Example], rows: int) -> Batch:
        """The examples, at most `rows`, in the smallest shape that takes them all."""
        length = max(map(self.length, examples))
        targets = max(map(_target_count, examples))
        shape = next(s for s in self.shapes if s[0] >= length and s[1] >= targets)
        return self.lay_out(examples, rows, *shape)

    def lay_out(self, examples: Sequence[Example], rows: int, length: int, targets: int) -> Batch:
        """The examples as a batch of B = `rows`, T = `length`, M = `targets`.

        Rows are left empty if there are fewer examples.
        """
        batch = Batch(
            tokens=np.zeros((rows, length), np.int32),
            lengths=np.zeros(rows, np.int32),
            targets=np.zeros((rows, targets), np.int32),
            target_candidates=np.full((rows, targets), -1, np.int32),
            target_indices=np.zeros((rows, targets), np.int32),
            positions=np.zeros((rows, length), np.int32),
            segments=np.full((rows, length), -1, np.int32),
        )
        for row, example in enumerate(examples):
            self._fill(batch, row, example)
        if self.separate_targets:
            batch = dataclasses.replace(batch, target_indices=None)
        if not self.branching:
            batch = dataclasses.replace(batch, positions=None, segments=None)
        return batch

    def _fill(self, batch: Batch, row: int, example: Example) -> None:
        start = len(example.input)
        batch.lengths[row] = self.length(example)
        batch.tokens[row, :start] = example.input
        batch.positions[row, :start] = np.arange(start)
        batch.segments[row, :start] = 0
        end, target = start, 0
        for number, candidate in enumerate(example.candidates):
            scored = slice(target, target + len(candidate))
            batch.targets[row, scored] = candidate
            batch.target_candidates[row, scored] = number
            target = scored.stop
            if self.separate_targets:
                continue
            read, stop = candidate[:-1], end + len(candidate) - 1
            batch.tokens[row, end:stop] = read
            batch.positions[row, end:stop] = start + np.arange(len(read))
            batch.segments[row, end:stop] = number + 1
            batch.target_indices[row, scored] = [start - 1, *range(end, stop)]
            end = stop


def _target_count(example: Example) -> int:
    return sum(map(len, example.candidates))


def _least_padding(lengths: np.ndarray, most: int) -> list[int]:
    """At most `most` of the given lengths as upper bounds, the sum of all gaps least."""
    values, counts = np.unique(lengths, return_counts=True)
    sizes = np.concatenate([[0], np.cumsum(counts)])

    @functools.cache
    def best(end: int, bounds: int) -> tuple[float, tuple[int, ...]]:
        """Padded size of values[:end] with that many bounds, the last one values[end - 1]."""
        if end == 0:
            return 0, ()
        if bounds == 0:
            return float("inf"), ()
        last = int(values[end - 1])
        return min(
            (cost + last * int(sizes[end] - sizes[start]), (*rest, last))
            for start in range(end)
            for cost, rest in [best(start, bounds - 1)]
        )

    return list(best(len(values), most)[1])


class TrainingBatches:
    """Endless shuffled batches; batch number n depends on seed and n alone.

    Each epoch is shuffled anew. Within a window of 32 batches, examples of like length
    share a batch, and the batches come in random order. What is left of an epoch when no
    whole batch can be made of it is dropped.

    Args:
      examples: at least `batch_size`, each with its answer.
      batch_size: examples in a batch, B.
      seed: of the order.
      separate_targets: whether a separate decoder reads the targets.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        seed: int,
        *,
        separate_targets: bool = False,
    ):
        self._examples = [only_answer(example) for example in examples]
        self._layout = Layout.of(self._examples, separate_targets)
        self._batch_size = batch_size
        self._per_epoch = len(examples) // batch_size
        self._seed = seed
        self._order = grain.MapDataset.source(range(len(examples))).seed(seed).shuffle().repeat()
        self._window = functools.lru_cache(maxsize=2)(self._sorted_window)

    def __len__(self) -> int:
        return 2**62 // self._batch_size

    def __getitem__(self, number: int) -> Batch:
        epoch, number = divmod(number, self._per_epoch)
        window, place = divmod(number, _WINDOW)
        return self._layout.batch(self._window(epoch, window)[place], self._batch_size)

    def largest(self) -> Batch:
        """An empty batch of the largest shape."""
        return self._layout.lay_out([], self._batch_size, *self._layout.shapes[-1])

    def iterate(self) -> "grain.DatasetIterator[Batch]":
        """A Grain iterator, whose `get_state` and `set_state` give and take the position."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        return iter(grain.MapDataset.source(self).to_iter_dataset(options))

    def _sorted_window(self, epoch: int, window: int) -> list[list[Example]]:
        size, first = self._batch_size, window * _WINDOW
        batches = min(_WINDOW, self._per_epoch - first)
        begin = epoch * len(self._examples) + first * size
        indices = [self._order[begin + i] for i in range(batches * size)]
        indices.sort(key=lambda i: self._layout.length(self._examples[i]))
        order = np.random.default_rng([self._seed, epoch, window]).permutation(batches)
        return [[self._examples[i] for i in indices[b * size : (b + 1) * size]] for b in order]


def side_by_side(batches: Sequence[Batch]) -> Batch:
    """Batches of as many rows with a new leading axis, shorter ones padded."""

    def stacked(name: str, empty: int) -> np.ndarray | None:
        arrays = [getattr(batch, name) for batch in batches]
        if arrays[0] is None:
            return None
        width = max(array.shape[-1] for array in arrays)
        more = [[(0, 0)] * (a.ndim - 1) + [(0, width - a.shape[-1])] for a in arrays]
        return np.stack(
            [np.pad(a, m, constant_values=empty) for a, m in zip(arrays, more, strict=True)]
        )

    lengths = np.stack([batch.lengths for batch in batches])
    padding = {"target_candidates": -1, "segments": -1}
    names = [field.name for field in dataclasses.fields(Batch) if field.name != "lengths"]
    return Batch(lengths=lengths, **{name: stacked(name, padding.get(name, 0)) for name in names})


def evaluation_batches(
    examples: Sequence[Example],
    batch_size: int,
    run: Callable[[Batch], Result],
    *,
    separate_targets: bool = False,
) -> Iterator[tuple[list[int], Result]]:
    """Run all examples once, those of like length together.

    Args:
      examples: at least one.
      batch_size: the most in a batch; fewer if there is no memory for as many.
      run: what to do with a batch.
      separate_targets: whether a separate decoder reads the targets.

    Yields:
      The examples' numbers in the rows of each batch, and what `run` gave.
    """
    layout = Layout.of(examples, separate_targets)
    order = sorted(range(len(examples)), key=lambda i: layout.length(examples[i]))
    return run_batches(
        [order],
        batch_size,
        lambda numbers, rows: run(layout.batch([examples[i] for i in numbers], rows)),
    )
