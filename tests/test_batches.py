"""Batches: their layout and order. Every epoch contains every example once."""

from collections import Counter

import jax
import numpy as np
import pytest
from conftest import batch_of, example_of

from softprompt.data.balance import balanced, divide_by_class, length_classes
from softprompt.data.batches import TrainingBatches, evaluation_batches


def examples(count, seed=0):
    """Return examples of random lengths whose first input token is their index."""
    lengths = np.random.default_rng(seed).integers(1, 60, count)
    return [
        example_of([i, *range(1, n)], [[1000], [1001, 1002]], i % 2) for i, n in enumerate(lengths)
    ]


def rows(batch, values):
    """Return the values of the tokens in each row that is not empty."""
    ends = np.cumsum(batch.lengths, axis=1)
    return [
        values[pack, end - length : end].tolist()
        for pack in range(len(ends))
        for end, length in zip(ends[pack], batch.lengths[pack], strict=True)
        if length
    ]


def numbers(batch):
    """Return the indices of the examples in a batch of `examples`."""
    return [row[0] for row in rows(batch, batch.tokens)]


def padding_of(batches):
    sizes = [batch.tokens.size for batch in batches]
    return sum(b.padding * n for b, n in zip(batches, sizes, strict=True)) / sum(sizes)


def test_a_row_contains_the_input_followed_by_the_candidates():
    example = example_of([5, 6, 7], [[10, 11, 12], [13], [14, 15]], 0)
    batch = batch_of([example], padding=2)
    np.testing.assert_array_equal(batch.tokens[0], [5, 6, 7, 10, 11, 14, 0, 0])
    np.testing.assert_array_equal(batch.positions[0], [0, 1, 2, 3, 4, 3, 0, 0])
    np.testing.assert_array_equal(batch.segments[0], [0, 0, 0, 1, 1, 3, -1, -1])
    np.testing.assert_array_equal(batch.target_indices[0], [2, 3, 4, 2, 2, 5, 0, 0])
    np.testing.assert_array_equal(batch.targets[0], [10, 11, 12, 13, 14, 15, 0, 0])
    np.testing.assert_array_equal(batch.target_candidates[0], [0, 0, 0, 1, 2, 2, -1, -1])
    np.testing.assert_array_equal(batch.lengths, [[6, 0]])
    np.testing.assert_array_equal(batch.target_lengths, [[6, 0]])
    assert batch.padding == 2 / 8


def test_the_rows_of_a_pack_follow_each_other_without_gaps():
    some = [
        example_of([5, 6], [[10, 11]], 0),
        example_of([7], [[12], [13]], 0),
        example_of([8, 9], [[14]], 0),
    ]
    batch = batch_of(some, packs=2, padding=1)
    assert batch.positions is None
    assert batch.segments is None
    np.testing.assert_array_equal(batch.tokens, [[5, 6, 10, 7, 0], [8, 9, 0, 0, 0]])
    np.testing.assert_array_equal(batch.lengths, [[3, 1, 0], [2, 0, 0]])
    np.testing.assert_array_equal(batch.targets, [[10, 11, 12, 13, 0], [14, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.target_indices, [[1, 2, 3, 3, 0], [1, 0, 0, 0, 0]])


def test_separate_targets_are_not_part_of_the_row():
    example = example_of([5, 6, 7], [[10, 11, 12], [13]], 0)
    batch = batch_of([example], separate_targets=True, padding=1)
    np.testing.assert_array_equal(batch.tokens, [[5, 6, 7, 0]])
    np.testing.assert_array_equal(batch.lengths, [[3, 0]])
    np.testing.assert_array_equal(batch.targets, [[10, 11, 12, 13, 0]])
    np.testing.assert_array_equal(batch.target_candidates, [[0, 0, 0, 1, -1]])
    assert batch.target_indices is None


def test_packed_tokens_become_rows_and_packed_tokens_again():
    random = np.random.default_rng(0)
    some = [example_of([1] * n, [[2]], 0) for n in (3, 1, 7, 2, 5, 4)]
    batch = batch_of(some, packs=2)
    values = random.normal(size=(*batch.tokens.shape, 2, 3)).astype(np.float32)
    found = np.asarray(batch.rows.to_rows(values))
    assert found.shape == (8, batch.row_length, 2, 3)
    expected = np.zeros_like(found)
    real = np.zeros(batch.tokens.shape, bool)
    for pack, lengths in enumerate(batch.lengths):
        start = 0
        for row, length in enumerate(lengths):
            expected[pack * 4 + row, :length] = values[pack, start : start + length]
            start += length
        real[pack, :start] = True
    np.testing.assert_array_equal(found, expected)
    again = batch.rows.from_rows(found + 1)
    np.testing.assert_array_equal(again, np.where(real[..., None, None], values + 1, 0))


def test_epochs_contain_every_example_once_in_different_orders():
    batches = TrainingBatches(examples(640), batch_size=4, seed=1)
    first, second = ([numbers(batches[i + 160 * e]) for i in range(160)] for e in (0, 1))
    for epoch in (first, second):
        assert sorted(n for batch in epoch for n in batch) == list(range(640))
    assert len({frozenset(b) for b in first} & {frozenset(b) for b in second}) < 5


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
    assert any(numbers(one[i]) != numbers(third[i]) for i in range(5))


def test_passes_divide_the_same_examples():
    whole, halves = (TrainingBatches(examples(64), 8, seed=1, passes=n) for n in (1, 2))
    for i in range(20):
        assert halves[i].lengths.shape == (2, 4)
        assert sorted(numbers(halves[i])) == sorted(numbers(whole[i]))


@pytest.mark.parametrize(
    ("batch_size", "passes", "message"),
    [
        (3, 2, "batch_size 3: must be a multiple of 2, the number of passes times"),
        (11, 1, "batch_size 11: must be between 1 and the number of examples, 10"),
        (0, 1, "batch_size 0: must be between 1 and"),
    ],
)
def test_a_batch_size_that_cannot_be_used_is_rejected(batch_size, passes, message):
    with pytest.raises(ValueError, match=message):
        TrainingBatches(examples(10), batch_size, seed=0, passes=passes)


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


@pytest.mark.parametrize(("batch_size", "passes"), [(16, 1), (16, 4), (4, 1)])
def test_training_batches_have_two_shapes_and_little_padding(batch_size, passes):
    batches = TrainingBatches(examples(2000), batch_size, seed=0, passes=passes)
    epoch = [batches[i] for i in range(2000 // batch_size)]
    assert len({(b.tokens.shape, b.targets.shape, b.row_length) for b in epoch}) == 2
    assert padding_of(epoch) < (0.03 if batch_size // passes >= 16 else 0.1)


def test_rows_of_very_different_lengths_have_two_shapes():
    long = [example_of([i + 1000] * 900, [[1]], 0) for i in range(20)]
    batches = TrainingBatches([*examples(500), *long], batch_size=4, seed=0)
    epoch = [batches[i] for i in range(130)]
    assert {b.row_length for b in epoch} == {64, 904}
    assert sum(b.row_length == 904 for b in epoch) == 5
    assert padding_of(epoch) < 0.05
    assert batches.largest().tokens.shape == max(b.tokens.shape for b in epoch)


def test_the_largest_shape_has_space_for_the_longest_example_if_no_sample_has_it(monkeypatch):
    monkeypatch.setattr("softprompt.data.batches._WINDOW", 4)
    short = [example_of([i, 1], [[1000]], 0) for i in range(400)]
    batches = TrainingBatches([*short, example_of([400] * 900, [[1]], 0)], batch_size=4, seed=0)
    sampled = [number for i in range(4) for number in numbers(batches[i])]
    assert 400 not in sampled
    assert batches.largest().tokens.size == 904


def test_a_batch_that_does_not_fit_gets_a_larger_shape():
    short = [example_of([i, 1], [[1000]], 0) for i in range(64)]
    batches = TrainingBatches(short, batch_size=4, seed=0)
    batches._shapes[0].__dict__["tokens"] = 4
    assert batches[0].lengths.sum() == 8
    assert batches[0].tokens.size == 12


def test_training_rows_contain_only_the_right_candidate():
    for batch in [TrainingBatches(examples(40), 4, seed=0)[i] for i in range(10)]:
        ends = np.cumsum(batch.target_lengths[0])
        for number, end, count in zip(numbers(batch), ends, batch.target_lengths[0], strict=True):
            targets = batch.targets[0, end - count : end]
            assert targets.tolist() == [[1000], [1001, 1002]][number % 2]
        assert (batch.target_candidates <= 0).all()


def test_a_class_is_added_where_it_saves_attention():
    assert length_classes(np.array([10, 20, 30])) == [30]
    assert length_classes(np.array([10] * 20 + [40] * 80)) == [40]
    assert length_classes(np.array([10] * 60 + [40] * 40)) == [40, 10]
    assert length_classes(np.array([30] * 90 + [100] * 5 + [2000] * 5)) == [2000, 100, 30]


def test_only_the_last_class_has_batches_that_are_not_full():
    lengths = np.array([50, 3, 4, 60, 5, 6, 70, 2, 1])
    long, short = divide_by_class(np.arange(9), lengths, [70, 6], 4)
    assert sorted(lengths[long]) == [6, 50, 60, 70]
    assert sorted(lengths[short]) == [1, 2, 3, 4, 5]


def test_groups_are_balanced_with_and_without_chance():
    lengths = np.random.default_rng(0).integers(1, 60, 1600)
    for random in (None, np.random.default_rng(1)):
        groups = balanced(np.arange(1600), lengths, 100, random)
        totals = [lengths[group].sum() for group in groups]
        assert max(totals) - min(totals) <= 4
        assert {len(group) for group in groups} == {16}
        assert sorted(np.concatenate(groups)) == list(range(1600))


@pytest.mark.parametrize("count", [1, 8, 13])
def test_evaluation_runs_every_example_once(count):
    seen = []
    for which, batch in evaluation_batches(examples(count), 4, lambda batch: batch):
        assert batch.lengths.shape == (1, min(4, count))
        assert numbers(batch) == which
        seen += which
    assert sorted(seen) == list(range(count))


def test_evaluation_batches_have_two_shapes_and_little_padding():
    batches = [batch for _, batch in evaluation_batches(examples(500), 32, lambda batch: batch)]
    assert len({batch.tokens.shape for batch in batches}) == 2
    assert padding_of(batches) < 0.05


@pytest.mark.parametrize(("count", "size"), [(1, 1), (5, 8), (8, 8)])
def test_a_batch_has_few_more_rows_than_there_are_examples(count, size):
    ((_, batch),) = evaluation_batches(examples(count), 10**19, lambda batch: batch)
    assert batch.lengths.shape == (1, size)


def limited(most, calls=()):
    """Return a function that runs out of memory: with more rows, or in calls of these numbers."""
    number = 0

    def run(batch):
        nonlocal number
        number += 1
        if batch.lengths.size > most or number in calls:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return batch

    return run


def test_one_shape_per_class_is_added_when_memory_runs_out():
    random = np.random.default_rng(0)
    some = [
        example_of([i, *range(1, random.integers(1, 60))], [[1] * random.integers(1, 40)], 0)
        for i in range(500)
    ]
    seen, shapes = [], set()
    for which, batch in evaluation_batches(some, 32, limited(8)):
        assert numbers(batch) == which
        seen += which
        shapes.add((batch.tokens.shape, batch.targets.shape, batch.row_length, batch.row_targets))
    assert sorted(seen) == list(range(500))
    assert len(shapes) == 2


def test_a_class_of_few_examples_keeps_its_few_rows_when_memory_runs_out():
    some = [example_of([1] * (1000 if i < 32 else 300), [[1]], 0) for i in range(35)]
    found = [batch.lengths.size for _, batch in evaluation_batches(some, 32, limited(16))]
    assert found == [16, 16, 4]


def test_parts_of_a_batch_fit_after_memory_runs_out_a_second_time():
    # 14, 7 and then 3 examples at a time: three with many targets come together.
    targets = [60 if 7 <= i < 10 else 1 for i in range(14)]
    some = [example_of([i] * (100 - n), [[1] * n], 0) for i, n in enumerate(targets)]
    batches = [batch for _, batch in evaluation_batches(some, 14, limited(14, calls=(1, 3)))]
    assert [int(batch.target_lengths.sum()) for batch in batches] == [7, 180, 3, 1]
