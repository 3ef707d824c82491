"""An opening that is read together with the rows, compared with the prefix that it stands for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import batch_of, example_of, golden_backbone

from softprompt.backbones.batch import target_log_probabilities
from softprompt.backbones.opening import Opening, computed
from softprompt.methods.soft_prompt import SoftPrompt
from softprompt.plan.flops import count_flops

ONE_SEQUENCE = [
    example_of([5, 6, 7, 8], [[9, 3, 4]], 0),
    example_of([3], [[2, 2]], 0),
    example_of([1, 2, 3, 4, 5, 6, 7], [[8]], 0),
]
CANDIDATES = [
    example_of([5, 6, 7, 8], [[9, 3, 4], [2, 1]], 0),
    example_of([3], [[2, 2], [7, 7, 7, 7]], 0),
    example_of([1, 2, 3, 4, 5, 6, 7], [[8], [9]], 0),
]


def loss(embeddings, backbone, batch, before, read_together):
    opening = Opening(embeddings, None if before is None else backbone.prefill(before))
    beginning = opening if read_together else computed(backbone, opening)
    values = target_log_probabilities(backbone, beginning, batch)
    return -jnp.sum(values, where=batch.target_candidates >= 0)


@pytest.mark.parametrize(
    ("examples", "packs", "learned"),
    [(ONE_SEQUENCE, 1, 0), (ONE_SEQUENCE, 3, 3), (CANDIDATES, 1, 3), (CANDIDATES, 3, 0)],
    ids=["one_sequence", "sequences_after_a_prefix", "candidates_after_a_prefix", "candidates"],
)
@pytest.mark.parametrize("variant", ["llama-llama3", "gemma3_text-pattern", "opt-plain"])
def test_an_opening_has_the_loss_and_gradient_of_its_prefix(variant, examples, packs, learned):
    """These models have grouped heads, windows of two sizes, and learned positions."""
    backbone, batch = golden_backbone(variant), batch_of(examples, packs=packs)
    size = backbone.arch.hidden_size
    embeddings, before = jax.random.normal(jax.random.key(0), (2, 5, size))
    arguments = backbone, batch, before[:learned] if learned else None
    both = jax.jit(jax.value_and_grad(loss), static_argnums=4)
    value, gradient = both(embeddings, *arguments, True)
    expected, expected_gradient = both(embeddings, *arguments, False)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5 * abs(gradient).max())


def test_padding_of_an_opening_is_not_read():
    backbone, batch = golden_backbone("opt-plain"), batch_of(CANDIDATES)
    vectors = jax.random.normal(jax.random.key(0), (5, backbone.arch.hidden_size))
    prompt = SoftPrompt(vectors)

    @jax.jit
    def values(prompt):
        return target_log_probabilities(*prompt.apply(backbone), batch)

    padded = prompt.padded(8)
    padded.vectors[...] = padded.vectors[...].at[5:].set(100.0)
    np.testing.assert_allclose(values(padded), values(prompt), atol=1e-5)


def test_an_opening_costs_as_many_operations_as_its_tokens():
    backbone, batch = golden_backbone("llama-llama3"), batch_of(ONE_SEQUENCE)
    longer = dataclasses.replace(batch, tokens=np.pad(batch.tokens, [(0, 0), (0, 5)]))
    embeddings = jnp.zeros((5, backbone.arch.hidden_size))

    def matrix_operations(batch, prefix):
        states = jax.jit(lambda backbone, batch, prefix: backbone.target_states(batch, prefix))
        return count_flops(states.trace(backbone, batch, prefix))

    attention = 4 * backbone.arch.num_heads * backbone.arch.head_size
    rows, layers = batch.lengths.size, len(backbone.arch.layers)
    scores = (layers - 1) * (5 + rows * batch.row_length) * 5 + rows * batch.row_targets * 5
    assert matrix_operations(batch, Opening(embeddings)) == (
        matrix_operations(longer, None) + attention * scores
    )
