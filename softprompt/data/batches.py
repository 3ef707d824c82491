"""Batches: lay out examples as arrays of few shapes, in an order fixed by the seed.

Axis letters: B batch, T tokens, M target positions, N examples.
"""

import dataclasses
import functools
from collections.abc import Callable, Container, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jax.sharding import Mesh

from softprompt.backbones.batch import Batch
from softprompt.data.examples import Example, Examples, Lengths
from softprompt.parallel.hosts import rows_here
from softprompt.runtime.memory import Result, run_batches

if TYPE_CHECKING:
    import grain

_WINDOW = 32  # number of batches whose examples are sorted by length together
_MULTIPLE = 8  # row lengths are rounded up to a multiple of this
_MAX_SHAPES = 6  # maximum number of row lengths among the batches of a dataset


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the examples of a dataset become batches.

    Attributes:
      separate_targets: whether the backbone reads candidates apart from the input.
      branching: whether rows may hold several candidates, for which attention needs a mask.
      shapes: the `(T, M)` that batches may have, T ascending.
    """

    separate_targets: bool
    branching: bool
    shapes: Sequence[tuple[int, int]]

    @classmethod
    def of(cls, examples: Sequence[Example], separate_targets: bool = False) -> "Layout":
        """Plan batches with all candidates of the given examples, at least one."""
        return cls.of_lengths(Examples.of(examples).lengths, separate_targets)

    @classmethod
    def of_lengths(cls, lengths: Lengths, separate_targets: bool) -> "Layout":
        """Choose at most six shapes, with the least padding if each example were its own batch."""
        rows = _row_lengths(lengths, separate_targets)
        rows = -(-rows // _MULTIPLE) * _MULTIPLE
        bounds = _least_padding(rows, _MAX_SHAPES)
        shapes = [(bound, int(lengths.targets[rows <= bound].max())) for bound in bounds]
        return cls(separate_targets, lengths.branching and not separate_targets, shapes)

    def length(self, example: Example) -> int:
        """Return the number of tokens in an example's row."""
        read = 0 if self.separate_targets else sum(len(c) - 1 for c in example.candidates)
        return len(example.input) + read

    def batch(
        self, examples: Sequence[Example], rows: int, filled: Container[int] | None = None
    ) -> Batch:
        """Lay out at most `rows` examples in the smallest shape that fits all of them.

        Args:
          examples: at least one.
          rows: B. The remaining rows are empty if there are fewer examples.
          filled: the rows to fill in, by default all. The others only get their `lengths`.
        """
        length = max(map(self.length, examples))
        targets = max(map(_target_count, examples))
        shape = next(s for s in self.shapes if s[0] >= length and s[1] >= targets)
        return self.lay_out(examples, rows, *shape, filled)

    def lay_out(
        self,
        examples: Sequence[Example],
        rows: int,
        length: int,
        targets: int,
        filled: Container[int] | None = None,
    ) -> Batch:
        """Lay out examples as a batch of T = `length` and M = `targets`; see `batch`."""
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
            batch.lengths[row] = self.length(example)
            if filled is None or row in filled:
                self._fill(batch, row, example)
        if self.separate_targets:
            batch = dataclasses.replace(batch, target_indices=None)
        if not self.branching:
            batch = dataclasses.replace(batch, positions=None, segments=None)
        return batch

    def _fill(self, batch: Batch, row: int, example: Example) -> None:
        start = len(example.input)
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


def _row_lengths(lengths: Lengths, separate_targets: bool) -> np.ndarray:
    """Return the number of tokens in each example's row, `[N]`."""
    return lengths.input if separate_targets else lengths.input + lengths.read


def _least_padding(lengths: np.ndarray, most: int) -> list[int]:
    """Choose at most `most` of the lengths as upper bounds, with the least total padding."""
    values, counts = np.unique(lengths, return_counts=True)
    sizes = np.concatenate([[0], np.cumsum(counts)])

    @functools.cache
    def best(end: int, bounds: int) -> tuple[float, tuple[int, ...]]:
        """Return the padded size of `values[:end]` and its bounds, the last its maximum."""
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
    """An endless sequence of shuffled batches. Batch n depends only on the seed and n.

    Each epoch is shuffled anew. Within a window of 32 batches, examples of similar length
    share a batch, and the batches come in random order. Examples at the end of an epoch
    that do not fill a batch are dropped.

    Args:
      examples: at least `batch_size`, each with its answer.
      batch_size: examples in a batch, B.
      seed: seed of the order.
      separate_targets: whether the backbone reads targets apart from the input.
      mesh: the devices that divide the rows, or None. In a run of several processes, each one
        fills in only the rows that its devices hold; see `hosts.divide_rows`.

    Examples:
      >>> base = load_base("smollm2-135m-instruct")
      >>> task = make_task(base, TemplateSettings(input="{text}"), None, virtual_tokens=5)
      >>> records = [{"text": "One, two,", "label": " three"}] * 4
      >>> batches = TrainingBatches(make_examples(task, records), batch_size=2, seed=0)
      >>> batches
      TrainingBatches(4 examples, batch size 2, seed 0)
      >>> batches[100]  # tokens [B, T], targets [B, M]
      Batch(2 rows, 8 tokens, 2 targets)
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        seed: int,
        *,
        separate_targets: bool = False,
        mesh: Mesh | None = None,
    ):
        import grain  # takes a tenth of a second, and only training needs it

        self._rows = None if mesh is None else set(rows_here(batch_size, mesh))
        self._examples = Examples.of(examples)
        lengths = self._examples.lengths.answer_only()
        self._layout = Layout.of_lengths(lengths, separate_targets)
        self._row_lengths = _row_lengths(lengths, separate_targets)
        self._batch_size = batch_size
        self._per_epoch = len(examples) // batch_size
        self._seed = seed
        self._order = grain.MapDataset.source(range(len(examples))).seed(seed).shuffle().repeat()
        self._window = functools.lru_cache(maxsize=2)(self._sorted_window)

    def __repr__(self) -> str:
        size, count = self._batch_size, len(self._examples)
        return f"TrainingBatches({count} examples, batch size {size}, seed {self._seed})"

    def __len__(self) -> int:
        return 2**62 // self._batch_size

    def __getitem__(self, number: int) -> Batch:
        epoch, number = divmod(number, self._per_epoch)
        window, place = divmod(number, _WINDOW)
        examples = [self._examples[i].answer_only() for i in self._window(epoch, window)[place]]
        return self._layout.batch(examples, self._batch_size, self._rows)

    def largest(self) -> Batch:
        """Return an empty batch of the largest shape."""
        return self._layout.lay_out([], self._batch_size, *self._layout.shapes[-1])

    def iterate(self) -> "grain.DatasetIterator[Batch]":
        """Return a Grain iterator. Its `get_state` and `set_state` save and set the position."""
        import grain

        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        return iter(grain.MapDataset.source(self).to_iter_dataset(options))

    def _sorted_window(self, epoch: int, window: int) -> list[list[int]]:
        """Return the indices of the examples in each batch of a window."""
        size, first = self._batch_size, window * _WINDOW
        batches = min(_WINDOW, self._per_epoch - first)
        begin = epoch * len(self._examples) + first * size
        indices = [self._order[begin + i] for i in range(batches * size)]
        indices.sort(key=self._row_lengths.__getitem__)
        order = np.random.default_rng([self._seed, epoch, window]).permutation(batches)
        return [indices[b * size : (b + 1) * size] for b in order]


def side_by_side(batches: Sequence[Batch]) -> Batch:
    """Stack batches with the same number of rows along a new first axis; pad shorter rows."""

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
    """Run all examples once; examples of similar length share a batch.

    Args:
      examples: at least one.
      batch_size: maximum number of examples in a batch; it is lowered if memory runs out.
      run: function to call with each batch.
      separate_targets: whether the backbone reads targets apart from the input.

    Yields:
      The indices of the examples in the rows of a batch, and the result of `run`.
    """
    dataset = Examples.of(examples)
    layout = Layout.of_lengths(dataset.lengths, separate_targets)
    row_lengths = _row_lengths(dataset.lengths, separate_targets)
    order = np.argsort(row_lengths, kind="stable").tolist()
    # A power of two, so that a program is compiled for few numbers of rows.
    most = 1 << (len(order) - 1).bit_length()
    return run_batches(
        [order],
        min(batch_size, most),
        lambda numbers, rows: run(layout.batch([dataset[i] for i in numbers], rows)),
    )
