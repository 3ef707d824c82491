"""Batches: their layout and order. Every epoch contains every example once."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from conftest import example_of

from softprompt.data.batches import Layout, TrainingBatches, _least_padding, evaluation_batches


def examples(count, seed=0):
    """Return examples of random lengths whose first input token is their index."""
    lengths = np.random.default_rng(seed).integers(1, 60, count)
    return [
        example_of([i, *range(1, n)], [[1000], [1001, 1002]], i % 2) for i, n in enumerate(lengths)
    ]


def numbers(batch):
    """Return the indices of the examples in a batch of `examples`."""
    return [int(row[0]) for row, n in zip(batch.tokens, batch.lengths, strict=True) if n]


def test_a_row_contains_the_input_followed_by_the_candidates():
    example = example_of([5, 6, 7], [[10, 11, 12], [13], [14, 15]], 0)
    batch = Layout.of([example]).lay_out([example], 2, 8, 7)
    np.testing.assert_array_equal(batch.tokens[0], [5, 6, 7, 10, 11, 14, 0, 0])
    np.testing.assert_array_equal(batch.positions[0], [0, 1, 2, 3, 4, 3, 0, 0])
    np.testing.assert_array_equal(batch.segments[0], [0, 0, 0, 1, 1, 3, -1, -1])
    np.testing.assert_array_equal(batch.target_indices[0], [2, 3, 4, 2, 2, 5, 0])
    np.testing.assert_array_equal(batch.targets[0], [10, 11, 12, 13, 14, 15, 0])
    np.testing.assert_array_equal(batch.target_candidates[0], [0, 0, 0, 1, 2, 2, -1])
    assert (batch.segments[1] == -1).all()
    assert (batch.target_candidates[1] == -1).all()
    np.testing.assert_array_equal(batch.lengths, [6, 0])
    assert batch.padding == 10 / 16


def test_rows_with_a_single_sequence_need_no_mask():
    some = [
        example_of([5, 6], [[10, 11]], 0),
        example_of([7], [[12], [13]], 0),
    ]
    batch = Layout.of(some).lay_out(some, 2, 4, 2)
    assert batch.positions is None
    assert batch.segments is None
    np.testing.assert_array_equal(batch.tokens, [[5, 6, 10, 0], [7, 0, 0, 0]])
    np.testing.assert_array_equal(batch.lengths, [3, 1])


def test_separate_targets_are_not_part_of_the_row():
    example = example_of([5, 6, 7], [[10, 11, 12], [13]], 0)
    batch = Layout.of([example], separate_targets=True).lay_out([example], 1, 4, 5)
    np.testing.assert_array_equal(batch.tokens, [[5, 6, 7, 0]])
    np.testing.assert_array_equal(batch.lengths, [3])
    np.testing.assert_array_equal(batch.targets, [[10, 11, 12, 13, 0]])
    np.testing.assert_array_equal(batch.target_candidates, [[0, 0, 0, 1, -1]])


def test_epochs_contain_every_example_once_in_different_orders():
    batches = TrainingBatches(examples(640), batch_size=4, seed=1)
    first = [n for i in range(160) for n in numbers(batches[i])]
    second = [n for i in range(160, 320) for n in numbers(batches[i])]
    assert sorted(first) == sorted(second) == list(range(640))
    assert first != second


def test_each_epoch_drops_different_examples_that_do_not_fill_a_batch():
    batches = TrainingBatches(examples(11), batch_size=4, seed=1)
    epochs = [{n for i in (0, 1) for n in numbers(batches[2 * e + i])} for e in range(20)]
    assert all(len(epoch) == 8 for epoch in epochs)
    assert Counter(n for epoch in epochs for n in epoch).keys() == set(range(11))


def test_a_batch_depends_only_on_the_seed_and_its_number():
    one, other = (TrainingBatches(examples(100), 4, seed=1) for _ in range(2))
    for i in (60, 3, 25, 0):
        np.testing.assert_array_equal(one[i].tokens, other[i].tokens)
    third = TrainingBatches(examples(100), 4, seed=2)
    assert any(not np.array_equal(one[i].tokens, third[i].tokens) for i in range(5))


def test_the_iterator_resumes_from_its_state():
    iterator = TrainingBatches(examples(100), 4, seed=1).iterate()
    for _ in range(5):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator).tokens for _ in range(30)]
    other = TrainingBatches(examples(100), 4, seed=1).iterate()
    other.set_state(state)
    for tokens in expected:
        np.testing.assert_array_equal(next(other).tokens, tokens)


def test_there_are_few_shapes_and_little_padding():
    batches = TrainingBatches(examples(2000), batch_size=16, seed=0)
    epoch = [batches[i] for i in range(125)]
    assert len({batch.tokens.shape for batch in epoch}) <= 6
    padding = sum(b.padding * b.tokens.size for b in epoch) / sum(b.tokens.size for b in epoch)
    assert padding < 0.2


def test_training_rows_contain_only_the_right_candidate():
    for batch in [TrainingBatches(examples(40), 4, seed=0)[i] for i in range(10)]:
        for row, number in enumerate(numbers(batch)):
            targets = batch.targets[row][batch.target_candidates[row] == 0]
            assert targets.tolist() == [[1000], [1001, 1002]][number % 2]
            assert (batch.target_candidates[row] <= 0).all()


def test_the_chosen_bounds_pad_as_little_as_the_best_possible_bounds():
    random = np.random.default_rng(0)
    for _ in range(20):
        lengths = random.integers(1, 12, 30)
        values = sorted(set(lengths.tolist()))
        best = min(
            sum(min(b for b in (*some, values[-1]) if b >= n) for n in lengths)
            for some in combinations(values[:-1], 2)
        )
        bounds = _least_padding(lengths, 3)
        assert len(bounds) <= 3
        assert sum(min(b for b in bounds if b >= n) for n in lengths) == best


def test_a_shape_fits_the_longest_target_of_its_length():
    some = [
        example_of([1] * 5, [[2] * 3], 0),
        example_of([1] * 20, [[2]], 0),
    ]
    assert Layout.of(some).shapes == [(8, 3), (24, 3)]


@pytest.mark.parametrize("count", [1, 8, 13])
def test_evaluation_runs_every_example_once(count):
    seen = []
    for which, batch in evaluation_batches(examples(count), 4, lambda batch: batch):
        assert batch.tokens.shape[0] == min(4, count)
        assert numbers(batch) == which
        seen += which
    assert sorted(seen) == list(range(count))


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (5, 8), (8, 8)])
def test_a_batch_has_few_more_rows_than_there_are_examples(count, rows):
    ((_, batch),) = evaluation_batches(examples(count), 10**19, lambda batch: batch)
    assert batch.tokens.shape[0] == rows
