"""Batches of examples, in an order fixed by the seed.

Axis letters: B batch, G packs, N examples.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.sharding import Mesh

from softprompt.backbones.batch import Batch
from softprompt.data.balance import balanced, divide_by_class, length_classes
from softprompt.data.examples import AnswerOnly, Dataset, Example, Examples
from softprompt.data.layout import Layout, PackedShape, grown, multiple_of_8
from softprompt.data.teacher_rows import TeacherRows
from softprompt.data.top_tokens import TopTokens
from softprompt.parallel.hosts import rows_here
from softprompt.parallel.mesh import ROWS, axis_size
from softprompt.runtime.memory import Result, require_batch_size, run_batches

if TYPE_CHECKING:
    import grain

_WINDOW = 2**14  # number of examples that are divided into batches together
_SAMPLED_WINDOWS = 4  # the batches of this many windows determine the shapes


class TrainingBatches:
    """An endless sequence of shuffled batches. Batch n depends only on the seed and n.

    Each epoch is shuffled anew. All batches have almost the same number of tokens, so that they
    share a compiled program with little padding. If the lengths of the examples differ much, there
    are a few classes of batches, each with rows of similar length and with its own program.
    Examples at the end of an epoch that do not fill a batch are dropped.

    Args:
      examples: at least `batch_size`, each with its answer.
      batch_size: examples in a batch, B.
      seed: seed of the order.
      separate_targets: whether the backbone reads targets apart from the input.
      passes: the number of passes that a batch is run in. Passes times devices must divide
        `batch_size`.
      mesh: the devices that divide the rows, or None. In a run of several processes, each one
        fills in only the packs that its devices hold; see `hosts.divide_rows`.
      weights: `[N]`, how much each example counts, see `Batch.weights`; None if all count the same.
      all_candidates: whether to keep all candidates of an example, and not only the right one.
      teacher: the examples as a teacher reads them, or its most likely tokens at the targets of
        the rows; None without a teacher, or if it reads the same rows.

    Raises:
      ValueError: if there are fewer examples than `batch_size`, or if passes times devices do
        not divide it.

    Examples:
      >>> base = load_base("smollm2-135m-instruct")
      >>> task = make_task(base, TemplateSettings(input="{text}"), None, virtual_tokens=5)
      >>> records = [{"text": "One, two,", "label": " three"}] * 4
      >>> batches = TrainingBatches(make_examples(task, records), batch_size=2, seed=0)
      >>> batches
      TrainingBatches(4 examples, batch size 2, seed 0)
      >>> batches[100]
      Batch(2 rows, 16 tokens, 8 targets)
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        seed: int,
        *,
        separate_targets: bool = False,
        passes: int = 1,
        mesh: Mesh | None = None,
        weights: np.ndarray | None = None,
        all_candidates: bool = False,
        teacher: Dataset | TopTokens | None = None,
    ):
        import grain  # takes a tenth of a second, and only training needs it

        self._packs = passes * axis_size(mesh, ("data", "fsdp"))
        if not 1 <= batch_size <= len(examples):
            raise ValueError(
                f"batch_size {batch_size}: must be between 1 and the number of examples, "
                f"{len(examples)}"
            )
        if batch_size % self._packs:
            raise ValueError(
                f"batch_size {batch_size}: must be a multiple of {self._packs}, the number of "
                "passes times the number of devices that divide the rows"
            )
        self._filled = None if mesh is None else set(rows_here(self._packs, mesh))
        self._examples = Examples.of(examples)
        if not all_candidates:
            self._examples = AnswerOnly(self._examples)
            teacher = AnswerOnly(teacher) if isinstance(teacher, Dataset) else teacher
        self._weights = weights
        self._teacher = _beside(self._examples, teacher, separate_targets)
        lengths = self._examples.lengths
        self._layout = Layout.of(lengths, separate_targets)
        self._row_lengths = self._layout.row_lengths(lengths)
        self._target_lengths = lengths.targets
        self._bounds = length_classes(self._row_lengths)
        self._batch_size = batch_size
        self._per_epoch = len(examples) // batch_size
        self._per_window = max(1, _WINDOW // batch_size)
        self._seed = seed
        self._order = grain.MapDataset.source(range(len(examples))).seed(seed).shuffle().repeat()
        self._window = functools.lru_cache(maxsize=2)(self._divide_window)
        self._shapes = self._choose_shapes()

    def __repr__(self) -> str:
        size, count = self._batch_size, len(self._examples)
        return f"TrainingBatches({count} examples, batch size {size}, seed {self._seed})"

    def __len__(self) -> int:
        return 2**62 // self._batch_size

    def __getitem__(self, number: int) -> Batch:
        epoch, number = divmod(number, self._per_epoch)
        window, place = divmod(number, self._per_window)
        length_class, packs = self._window(epoch, window)[place]
        examples = [[self._examples[int(i)] for i in pack] for pack in packs]
        shape = self._shape(length_class, packs)
        weights = None if self._weights is None else [self._weights[pack] for pack in packs]
        batch = self._layout.lay_out(examples, shape, self._filled, weights)
        if self._teacher is None:
            return batch
        return self._teacher.beside(batch, packs, self._filled)

    def largest(self) -> Batch:
        """Return an empty batch of the largest shape."""
        weights: list[np.ndarray] | None = None if self._weights is None else []
        batch = self._layout.lay_out([], self._shapes[0], weights=weights)
        return batch if self._teacher is None else self._teacher.beside(batch, [])

    def iterate(self) -> "grain.DatasetIterator[Batch]":
        """Return a Grain iterator. Its `get_state` and `set_state` save and set the position."""
        import grain

        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        return iter(grain.MapDataset.source(self).to_iter_dataset(options))

    def _divide_window(self, epoch: int, window: int) -> list[tuple[int, list[np.ndarray]]]:
        """Return the length class of each batch of a window, and the examples in its packs."""
        size, first = self._batch_size, window * self._per_window
        count = min(self._per_window, self._per_epoch - first)
        begin = epoch * len(self._examples) + first * size
        numbers = np.array([self._order[begin + i] for i in range(count * size)])
        random = np.random.default_rng([self._seed, epoch, window])
        classes = divide_by_class(numbers, self._row_lengths, self._bounds, size)
        batches = [
            (length_class, balanced(batch, self._row_lengths, self._packs))
            for length_class, members in enumerate(classes)
            if members.size
            for batch in balanced(members, self._row_lengths, members.size // size, random)
        ]
        return [batches[i] for i in random.permutation(count)]

    def _choose_shapes(self) -> list[PackedShape]:
        """Choose a shape for each length class, in which the batches of the first windows fit."""
        # A sample may lack the longest example, which must fit all the same.
        largest = np.array([[bound, 1] for bound in self._bounds])
        windows = -(-self._per_epoch // self._per_window)
        for sampled in range(_SAMPLED_WINDOWS):
            for length_class, packs in self._window(*divmod(sampled, windows)):
                sizes = _largest(packs, self._row_lengths, self._target_lengths)
                largest[length_class] = np.maximum(largest[length_class], sizes)
        return [
            PackedShape(
                packs=self._packs,
                rows=self._batch_size // self._packs,
                tokens=multiple_of_8(int(tokens)),
                targets=multiple_of_8(int(targets)),
                row_length=multiple_of_8(bound),
                row_targets=int(self._target_lengths[self._row_lengths <= bound].max()),
            )
            for bound, (tokens, targets) in zip(self._bounds, largest, strict=True)
        ]

    def _shape(self, length_class: int, packs: Sequence[np.ndarray]) -> PackedShape:
        """Return the shape of a class, or a larger one if the packs do not fit into it."""
        sizes = _largest(packs, self._row_lengths, self._target_lengths)
        return _enlarged(self._shapes[length_class], *sizes)


def evaluation_batches(
    examples: Sequence[Example],
    batch_size: int,
    run: Callable[[Batch], Result],
    *,
    separate_targets: bool = False,
    mesh: Mesh | None = None,
    teacher: Sequence[Example] | TopTokens | None = None,
) -> Iterator[tuple[list[int], Result]]:
    """Run all examples once, in batches with almost equally many tokens.

    Args:
      examples: at least one.
      batch_size: maximum number of examples in a batch; it is lowered if memory runs out.
      run: function to call with each batch.
      separate_targets: whether the backbone reads targets apart from the input.
      mesh: the devices that divide the rows, or None.
      teacher: as for `TrainingBatches`; it may be longer than the examples.

    Yields:
      The indices of the examples in the first rows of a batch, and the result of `run`.
    """
    require_batch_size(batch_size)
    dataset = Examples.of(examples)
    layout = Layout.of(dataset.lengths, separate_targets)
    plan = _EvaluationPlan(dataset, layout, batch_size, axis_size(mesh, ROWS))
    beside = _beside(dataset, teacher, separate_targets)

    def run_part(numbers: list[int], most: int) -> tuple[list[int], Result]:
        packs, shape = plan.packs(numbers, most)
        batch = layout.lay_out([[dataset[int(i)] for i in pack] for pack in packs], shape)
        if beside is not None:
            batch = beside.beside(batch, packs)
        return np.concatenate(packs).tolist(), run(batch)

    for _, result in run_batches(plan.groups, batch_size, run_part):
        yield result


class _EvaluationPlan:
    """Divides examples into batches with almost equally many tokens.

    Args:
      dataset: the examples.
      layout: their layout.
      batch_size: the maximum number of examples in a batch.
      packs: the number of packs of a batch.

    Attributes:
      groups: the numbers of the examples in each batch.
    """

    def __init__(self, dataset: Dataset, layout: Layout, batch_size: int, packs: int):
        self._lengths, self._targets = layout.row_lengths(dataset.lengths), dataset.lengths.targets
        self._batch_size, self._packs = batch_size, packs
        self.groups: list[list[int]] = []
        self._shapes: list[PackedShape] = []
        self._class_of = np.zeros(len(dataset), np.int64)
        self._smaller = functools.cache(self._shape_for_fewer_rows)
        bounds, numbers = length_classes(self._lengths), np.arange(len(dataset))
        for members in divide_by_class(numbers, self._lengths, bounds, batch_size):
            if not members.size:
                continue
            count = -(-members.size // batch_size)
            batches = [batch.tolist() for batch in balanced(members, self._lengths, count)]
            # A power of two, so that programs are compiled for few numbers of rows.
            rows = batch_size if len(batches) > 1 else 1 << (members.size - 1).bit_length()
            self._class_of[members] = len(self._shapes)
            self._shapes.append(self._shape(batches, min(rows, batch_size)))
            self.groups += batches

    def packs(self, numbers: Sequence[int], most: int) -> tuple[list[np.ndarray], PackedShape]:
        """Return the examples in each pack of a batch, and its shape.

        Args:
          numbers: the numbers of examples of one group.
          most: the maximum number of examples in a batch; below the batch size if memory ran out.
        """
        number = int(self._class_of[numbers[0]])
        shape = self._shapes[number] if most == self._batch_size else self._smaller(number, most)
        ordered = self._in_packs(numbers, shape.rows)
        return ordered, _enlarged(shape, *_largest(ordered, self._lengths, self._targets))

    def _in_packs(self, batch: Sequence[int], rows: int) -> list[np.ndarray]:
        ordered = np.concatenate(balanced(np.array(batch), self._lengths, self._packs))
        # Full packs come first, so that all empty rows are at the end of the batch.
        return [ordered[start : start + rows] for start in range(0, len(ordered), rows)]

    def _shape(self, batches: Sequence[Sequence[int]], rows: int) -> PackedShape:
        """Return a shape of `rows` rows in which each of the batches fits."""
        rows = -(-rows // self._packs)
        all_packs = [pack for batch in batches for pack in self._in_packs(batch, rows)]
        members = np.concatenate(all_packs)
        most_tokens, most_targets = _largest(all_packs, self._lengths, self._targets)
        return PackedShape(
            packs=self._packs,
            rows=rows,
            tokens=_rounded(most_tokens),
            targets=multiple_of_8(most_targets),
            row_length=_rounded(int(self._lengths[members].max())),
            row_targets=int(self._targets[members].max()),
        )

    def _shape_for_fewer_rows(self, number: int, most: int) -> PackedShape:
        """Return the shape of a class for fewer rows, because memory ran out."""
        own = [group for group in self.groups if self._class_of[group[0]] == number]
        parts = [group[i : i + most] for group in own for i in range(0, len(group), most)]
        return self._shape(parts, min(most, self._shapes[number].rows * self._packs))


def _beside(
    examples: Dataset, teacher: Sequence[Example] | TopTokens | None, separate_targets: bool
) -> TeacherRows | TopTokens | None:
    """Return the object that adds the teacher's rows or most likely tokens to a batch."""
    if teacher is None or isinstance(teacher, TopTokens):
        return teacher
    return TeacherRows(examples, Examples.of(teacher[: len(examples)]), separate_targets)


def side_by_side(batches: Sequence[Batch]) -> Batch:
    """Stack batches with the same number of rows along a new first axis; pad shorter packs."""

    def stacked(name: str, empty: int) -> np.ndarray | None:
        arrays = [getattr(batch, name) for batch in batches]
        if arrays[0] is None:
            return None
        width = max(array.shape[1] for array in arrays)
        more = [[(0, 0), (0, width - a.shape[1]), *[(0, 0)] * (a.ndim - 2)] for a in arrays]
        return np.stack(
            [np.pad(a, m, constant_values=empty) for a, m in zip(arrays, more, strict=True)]
        )

    names = [field.name for field in dataclasses.fields(Batch) if field.name != "teacher"]
    static: dict[str, Any] = {
        name: max(getattr(batch, name) for batch in batches) for name in Batch.STATIC
    }
    padding = {"target_candidates": -1, "segments": -1}
    arrays: dict[str, Any] = {
        name: stacked(name, padding.get(name, 0)) for name in names if name not in static
    }
    teachers = [batch.teacher for batch in batches if batch.teacher is not None]
    return Batch(**arrays, **static, teacher=side_by_side(teachers) if teachers else None)


def _largest(
    packs: Sequence[np.ndarray], lengths: np.ndarray, targets: np.ndarray
) -> tuple[int, int]:
    """Return the most tokens and the most targets of a pack."""
    return max(int(lengths[p].sum()) for p in packs), max(int(targets[p].sum()) for p in packs)


def _rounded(number: int) -> int:
    """Round up to a multiple of 8, and from 512 on to one of 32 numbers up to the double."""
    multiple = max(8, 2 ** (number.bit_length() - 6))
    return -(-number // multiple) * multiple


def _enlarged(shape: PackedShape, tokens: int, targets: int) -> PackedShape:
    """Return the shape, or a larger one if packs of so many tokens and targets do not fit."""
    return dataclasses.replace(
        shape, tokens=grown(shape.tokens, tokens), targets=grown(shape.targets, targets)
    )
