"""What is computed for targets only: the last layer, and logits in chunks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import batch_of, example_of
from flax import nnx

from softprompt.backbones import head as head_module
from softprompt.backbones.head import OutputHead, log_probabilities
from softprompt.backbones.layers import Embedding, Linear
from softprompt.plan.flops import count_flops

PACKS, TARGETS, SIZE, VOCABULARY = 2, 21, 6, 50


def head_of(kind: str) -> OutputHead:
    random = np.random.default_rng(0)
    table = jnp.asarray(random.normal(size=(VOCABULARY, SIZE)), jnp.float32)
    embedding = Embedding(VOCABULARY, SIZE)
    embedding.table[...] = table
    if kind == "tied":
        return OutputHead(embedding, None, None, scale=0.5)
    linear = Linear(SIZE, VOCABULARY)
    linear.kernel[...] = table.T
    return OutputHead(embedding, linear, None, scale=0.5, softcap=1.5)


def reference(head, hidden, targets):
    """The log-probabilities from the logits of all targets at once."""
    scores = jax.nn.log_softmax(head(hidden))
    return jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("chunk", [8, 16, 100])
@pytest.mark.parametrize("kind", ["tied", "separate"])
def test_chunks_of_logits_give_the_values_and_gradients_of_all_logits(kind, chunk, monkeypatch):
    monkeypatch.setattr(head_module, "_MAX_LOGITS", chunk * PACKS * VOCABULARY)
    random = np.random.default_rng(1)
    hidden = jnp.asarray(random.normal(size=(PACKS, TARGETS, SIZE)), jnp.float32)
    targets = jnp.asarray(random.integers(0, VOCABULARY, (PACKS, TARGETS)))
    weights = jnp.asarray(random.normal(size=(PACKS, TARGETS)), jnp.float32)
    graphdef, state = nnx.split(head_of(kind))
    count = 13
    real = jnp.arange(TARGETS) < count

    def gradients(function, arguments):
        def total(state, hidden):
            values = function(nnx.merge(graphdef, state), hidden)
            return jnp.sum(weights * values, where=real)

        return jax.jit(jax.grad(total, arguments))(state, hidden)

    def in_chunks(head, hidden):
        return log_probabilities(head, hidden, targets, jnp.array(count))

    def at_once(head, hidden):
        return reference(head, hidden, targets)

    found = in_chunks(head_of(kind), hidden)
    np.testing.assert_allclose(
        found[:, :count], at_once(head_of(kind), hidden)[:, :count], rtol=1e-5
    )
    for arguments in (1, (0, 1)):  # of a frozen head, and of a trained one
        ours, theirs = (gradients(function, arguments) for function in (in_chunks, at_once))
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def test_no_array_holds_the_logits_of_all_targets(tiny, monkeypatch):
    monkeypatch.setattr(head_module, "_MAX_LOGITS", 8 * 259)
    examples = [example_of([5, 6], [[7] * 20], 0) for _ in range(2)]
    batch = batch_of(examples)

    def loss(hidden):
        values = log_probabilities(tiny.backbone.output_head, hidden, batch.targets, jnp.array(40))
        return values.sum()

    hidden = jnp.zeros((1, batch.targets.size, 32))
    program = jax.jit(jax.grad(loss)).lower(hidden).as_text()
    assert "tensor<1x8x259xf32>" in program
    assert f"x{batch.targets.size}x259xf32>" not in program


def test_the_last_layer_computes_outputs_for_targets_only(tiny):
    """More targets cost one layer, without keys and values. More tokens cost the others."""
    arch, batch = tiny.backbone.arch, batch_of([example_of([5, 6, 7], [[8, 9]], 0)])

    def operations(batch):
        states = jax.jit(lambda backbone, batch: backbone.target_states(batch, None))
        return count_flops(states.trace(tiny.backbone, batch))

    def longer(batch, names, by):
        arrays = {name: np.pad(getattr(batch, name), [(0, 0), (0, by)]) for name in names}
        return dataclasses.replace(batch, **arrays)

    size, heads = arch.hidden_size, arch.num_heads * arch.head_size
    keys_and_values = 2 * size * arch.num_kv_heads * arch.head_size
    others = 2 * size * heads + 3 * size * arch.feed_forward_size
    names = ("targets", "target_candidates", "target_indices")
    before = operations(batch)
    assert operations(longer(batch, names, 7)) - before == 2 * 7 * others
    layers = len(arch.layers)
    of_token = layers * keys_and_values + (layers - 1) * others
    assert operations(longer(batch, ("tokens",), 7)) - before == 2 * 7 * of_token
