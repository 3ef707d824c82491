"""Dividing examples into batches that have equally many tokens.

Axis letters: N examples.
"""

from collections.abc import Sequence

import numpy as np

_CLASS_RATIO = 1.6  # between the longest rows of two length classes
_ATTENTION_KEYS = 128  # attention to this many keys takes about as long as all matrices of a layer
_WORTHWHILE = 0.05  # the share of time that another length class must save


def length_classes(lengths: np.ndarray) -> list[int]:
    """Choose classes of row lengths. The rows of a batch belong to one class.

    In attention, each row is padded to the longest row of its class. Every class needs a compiled
    program, so one is added only if it saves 5 % of the time.

    Args:
      lengths: the number of tokens in each row, `[N]`.

    Returns:
      The longest row of each class, in descending order.
    """
    bounds = [int(lengths.max())]
    while True:
        shorter = lengths[lengths <= bounds[-1] / _CLASS_RATIO]
        if not shorter.size:
            return bounds
        bound = int(shorter.max())
        saved = shorter.sum() / lengths.sum() * (bounds[-1] - bound) / _ATTENTION_KEYS
        if saved < _WORTHWHILE:
            return bounds
        bounds.append(bound)


def divide_by_class(
    numbers: np.ndarray, lengths: np.ndarray, bounds: Sequence[int], size: int
) -> list[np.ndarray]:
    """Divide examples into length classes.

    Args:
      numbers: the examples to divide, indices of `lengths`.
      lengths: the number of tokens in each row, `[N]`.
      bounds: what `length_classes` returned.
      size: the number of examples in a batch. Each class but the last gets whole batches. If its
        own examples do not fill them, the next shorter ones do.

    Returns:
      The examples of each class, the longest first.
    """
    numbers = numbers[np.argsort(-lengths[numbers], kind="stable")]
    classes, start = [], 0
    for bound in [*bounds[1:], 0]:
        longer = int((lengths[numbers] > bound).sum())
        stop = start + -(-max(0, longer - start) // size) * size if bound else len(numbers)
        classes.append(numbers[start:stop])
        start = min(stop, len(numbers))
    return classes


def balanced(
    numbers: np.ndarray,
    lengths: np.ndarray,
    count: int,
    random: np.random.Generator | None = None,
) -> list[np.ndarray]:
    """Divide examples into groups with equally many examples and almost equally many tokens.

    The examples are dealt out in rounds, from the longest to the shortest. In a balancing round,
    the group with the fewest tokens gets the longest example.

    Args:
      numbers: the examples to divide, indices of `lengths`.
      lengths: the number of tokens in each row, `[N]`.
      count: the number of groups.
      random: if given, every other round deals at random. The groups then differ between calls.

    Returns:
      The examples of each group. If they cannot be divided equally, some groups have one less.
    """
    numbers = numbers[np.argsort(-lengths[numbers], kind="stable")]
    if count == 1:
        return [numbers]
    groups: list[list[int]] = [[] for _ in range(count)]
    totals = np.zeros(count, np.int64)
    rounds = -(-len(numbers) // count)
    for turn in range(rounds):
        dealt = numbers[turn * count : (turn + 1) * count]
        if random is not None and (rounds - turn) % 2 == 0:
            order = random.permutation(count)
        else:
            order = np.argsort(totals, kind="stable")
        for group, number in zip(order, dealt, strict=False):
            groups[group].append(int(number))
            totals[group] += lengths[number]
    return [np.array(group, np.int64) for group in groups]
