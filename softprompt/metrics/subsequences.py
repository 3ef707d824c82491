"""Longest common subsequences (LCS), for ROUGE-L and ROUGE-Lsum.

Rows of the usual table are bits of one integer, so that long texts take little time and memory
(Hyyrö 2004, "Bit-parallel LCS-length computation revisited"). The results are those of the
package rouge-score, including which of several longest subsequences is taken.
"""

import collections
from collections.abc import Callable, Sequence

Words = Sequence[str]

_KEPT = 1000  # words whose places are kept as bits; for all of them, memory might not suffice


def lcs_length(reference: Words, prediction: Words) -> int:
    """Return the number of words of a longest common subsequence."""
    row, occurrences = _first_row(reference), _occurrences(reference)
    for word in prediction:
        row = _next_row(row, occurrences(word), len(reference))
    return len(reference) - row.bit_count()


def lcs_indices(
    reference: Words, prediction: Words, occurrences: Callable[[str], int] | None = None
) -> list[int]:
    """Return the indices in the reference of a longest common subsequence, in falling order.

    Args:
      reference, prediction: words.
      occurrences: the result of `_occurrences(reference)`, if it is known.
    """
    occurrences = occurrences or _occurrences(reference)
    length = len(reference)
    rows = [_first_row(reference)]
    for word in prediction:
        rows.append(_next_row(rows[-1], occurrences(word), length))
    indices = []
    i, j = length, len(prediction)
    while i and j:
        if reference[i - 1] == prediction[j - 1]:
            i, j = i - 1, j - 1
            indices.append(i)
        elif rows[j] >> (i - 1) & 1:
            i -= 1
        else:  # the last word of the reference adds to the length
            j -= 1
    return indices


def summary_hits(references: Sequence[Words], predictions: Sequence[Words]) -> int:
    """Return the number of words of the reference lines that ROUGE-Lsum counts as found.

    For each reference line, these are the words of its LCS with any line of the prediction. A word
    counts at most as often as it occurs in the prediction.

    Args:
      references: the lines of the reference, as words.
      predictions: the lines of the prediction, as words.
    """
    left = collections.Counter(word for line in predictions for word in line)
    lines = [(set(line), line) for line in predictions]
    hits = 0
    for reference in references:
        words, occurrences = set(reference), _occurrences(reference)
        found: set[int] = set()
        for others, line in lines:
            if not words.isdisjoint(others):
                found.update(lcs_indices(reference, line, occurrences))
        for i in found:
            if left[reference[i]]:
                left[reference[i]] -= 1
                hits += 1
    return hits


def _first_row(reference: Words) -> int:
    """Return the row before the first word of the prediction.

    Bit i of a row is 0 if the LCS with the first i + 1 words of the reference is longer than the
    LCS with the first i words.
    """
    return (1 << len(reference)) - 1


def _next_row(row: int, occurrences: int, length: int) -> int:
    """Return the row after one more word of the prediction."""
    matches = row & occurrences
    if not matches:
        return row
    return ((row + matches) | (row - matches)) & ((1 << length) - 1)


def _occurrences(reference: Words) -> Callable[[str], int]:
    """Return a function that gives the places of a word in the reference, as bits."""
    places: dict[str, list[int]] = collections.defaultdict(list)
    for i, word in enumerate(reference):
        places[word].append(i)
    kept: dict[str, int] = {}

    def occurrences(word: str) -> int:
        if word not in places:
            return 0
        if word not in kept:
            if len(kept) >= _KEPT:
                kept.pop(next(iter(kept)))
            bits = bytearray(len(reference) // 8 + 1)
            for i in places[word]:
                bits[i // 8] |= 1 << i % 8
            kept[word] = int.from_bytes(bits, "little")
        return kept[word]

    return occurrences
