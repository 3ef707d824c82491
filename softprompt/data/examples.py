"""Examples: inputs and their possible targets as token ids, and datasets of them.

Axis letters: N examples.
"""

import abc
import array
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import overload

import numpy as np

from softprompt.data.records import Record


@dataclasses.dataclass(frozen=True)
class Example:
    """One input and its candidates, as token ids.

    Attributes:
      input: ids of the input, at least one.
      candidates: ids of each possible target: one per label, or the single target of free
        text.
      answer: index of the right candidate; None if it is not known.
      record: the record that the example was made from.
      truncated: whether the input was truncated.
      earlier: start and stop in `input` of each earlier target, such as an earlier answer of a
        conversation. The input does not begin with one. An example that has any has a single
        candidate.
    """

    input: Sequence[int]
    candidates: Sequence[Sequence[int]]
    answer: int | None
    record: Record
    truncated: bool
    earlier: Sequence[tuple[int, int]] = ()

    def __repr__(self) -> str:
        return f"Example({len(self.input)} tokens, {len(self.candidates)} candidates)"

    @property
    def earlier_targets(self) -> int:
        """Number of tokens of earlier targets, which count as tokens of the only candidate."""
        return sum(stop - start for start, stop in self.earlier)

    def answer_only(self) -> "Example":
        """Return the example to train on, whose only candidate is the right one."""
        assert self.answer is not None
        return dataclasses.replace(self, candidates=[self.candidates[self.answer]], answer=0)


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Token counts of N examples, from which batches are planned. Each array is `[N]`.

    Attributes:
      input: tokens of the input.
      answer: tokens of the right candidate; 0 if it is not known.
      longest: tokens of the longest candidate.
      targets: tokens of all candidates and earlier targets together.
      candidates: number of candidates.
      earlier: tokens of earlier targets.
    """

    input: np.ndarray
    answer: np.ndarray
    longest: np.ndarray
    targets: np.ndarray
    candidates: np.ndarray
    earlier: np.ndarray

    @property
    def read(self) -> np.ndarray:
        """Candidate tokens that are inputs of a decoder: all but the last of each candidate."""
        return self.targets - self.earlier - self.candidates

    @property
    def branching(self) -> bool:
        """Whether any example has several candidates of more than one token."""
        # With only one such candidate, `read` is its length minus one: less than `longest`.
        return bool(((self.read >= self.longest) & (self.longest > 0)).any())

    def answer_only(self) -> "Lengths":
        """Return the lengths of the same examples with the right candidate alone."""
        one = np.ones_like(self.candidates)
        targets = self.answer + self.earlier
        return Lengths(self.input, self.answer, self.answer, targets, one, self.earlier)


class Dataset(Sequence[Example]):
    """The examples of one split, wherever they are stored.

    This is the interface between sources of examples and batches. Its attributes are known
    without another pass over the examples. A slice of it is a plain sequence of examples.

    Attributes:
      lengths: token counts of every example.
      answers: the index of the right candidate of every example, `[N]`; -1 if it is not known.
      digest: SHA-256 of the token ids and the answers of all examples.
      truncated: number of examples whose input was truncated.
    """

    lengths: Lengths
    answers: np.ndarray
    digest: str
    truncated: int

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} examples)"

    @abc.abstractmethod
    def example(self, number: int) -> Example:
        """Return one example; `number` is in `range(len(self))`."""

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        numbers = range(len(self))[index]
        if isinstance(numbers, int):
            return self.example(numbers)
        return self if numbers == range(len(self)) else [self.example(i) for i in numbers]


class Summary:
    """Lengths, answers and digest of examples, from one pass over them."""

    def __init__(self) -> None:
        self._counts = array.array("i")
        self._digest = hashlib.sha256()
        self.truncated = 0

    def add(self, example: Example) -> None:
        """Add the next example."""
        sizes = list(map(len, example.candidates))
        answer = -1 if example.answer is None else example.answer
        right = 0 if example.answer is None else sizes[answer]
        earlier = example.earlier_targets
        longest, targets = max(sizes, default=0), sum(sizes) + earlier
        length = len(example.input)
        self._counts.extend((length, right, longest, targets, len(sizes), earlier, answer))
        # The sizes come first, so that no two examples are hashed as the same numbers.
        content = [length, len(sizes), *sizes, answer, *example.input]
        for candidate in example.candidates:
            content += candidate
        for start, stop in example.earlier:
            content += [-start, -stop]  # no other number after the candidates is negative
        self._digest.update(np.array(content, "<i8").tobytes())
        self.truncated += example.truncated

    @property
    def digest(self) -> str:
        """See `Dataset`."""
        return self._digest.hexdigest()

    def counts(self) -> np.ndarray:
        """Return the lengths and the answer of each example, int32 `[7, N]`; see `from_counts`."""
        return np.array(self._counts, np.int32).reshape(-1, 7).T.copy()


def from_counts(counts: np.ndarray) -> tuple[Lengths, np.ndarray]:
    """Return the `lengths` and the `answers` of a dataset from the result of `Summary.counts`."""
    return Lengths(*counts[:-1]), counts[-1]


class Examples(Dataset):
    """A dataset in memory. Its lengths and digest are computed while it is filled.

    Args:
      examples: read once.
    """

    def __init__(self, examples: Iterable[Example]):
        self._examples: list[Example] = []
        summary = Summary()
        for example in examples:
            self._examples.append(example)
            summary.add(example)
        self.lengths, self.answers = from_counts(summary.counts())
        self.digest, self.truncated = summary.digest, summary.truncated

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Dataset:
        """Return a dataset unchanged, and any other sequence of examples as a dataset."""
        return examples if isinstance(examples, Dataset) else cls(examples)

    def __len__(self) -> int:
        return len(self._examples)

    def example(self, number: int) -> Example:
        return self._examples[number]


class AnswerOnly(Dataset):
    """The examples of another dataset, with only their right candidates.

    Args:
      dataset: examples with their answers.
    """

    def __init__(self, dataset: Dataset):
        self._dataset = dataset
        self.lengths, self.answers = dataset.lengths.answer_only(), np.zeros_like(dataset.answers)
        self.digest, self.truncated = dataset.digest, dataset.truncated

    def __len__(self) -> int:
        return len(self._dataset)

    def example(self, number: int) -> Example:
        return self._dataset.example(number).answer_only()


def data_digest(splits: Mapping[str, Dataset]) -> str:
    """Return one digest of all splits, by which a run recognizes its data when it resumes."""
    digests = {split: dataset.digest for split, dataset in splits.items()}
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def same_data(saved: str, splits: Mapping[str, Dataset]) -> bool:
    """Return whether a checkpoint was trained on these splits.

    Args:
      saved: the digest in the checkpoint: from `data_digest`, or from an earlier version,
        which hashed the examples of all splits one after another.
      splits: the data to resume with.
    """
    return saved == data_digest(splits) or saved == _earlier_digest(splits)


def _earlier_digest(splits: Mapping[str, Dataset]) -> str:
    """Return the digest of an earlier version, which takes a pass over all examples."""
    digest = hashlib.sha256()
    for split, examples in splits.items():
        for example in examples:
            candidates = list(map(list, example.candidates))
            content = [split, list(example.input), candidates, example.answer]
            digest.update(json.dumps(content).encode())
    return digest.hexdigest()
