"""The decoder against transformers and peft, whose results are in tests/golden."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN

from softprompt import load_base
from softprompt.backbones.attention import Source, attend, causal_mask

pytestmark = pytest.mark.usefixtures("strict_types")

VARIANTS = ["llama-grouped", "llama-untied", "llama-sharded"]
EXACT = 1e-4  # of the reference logits' spread, in float32


def rows(golden):
    """Tokens, positions and segments of a golden file's right-padded batch."""
    tokens = jnp.asarray(golden["tokens"])
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments = jnp.where(positions < golden["lengths"][:, None], 0, -1)
    return tokens, positions, segments


def run(backbone, tokens, positions, segments, prefix=None):
    return backbone.logits(backbone(backbone.embedding(tokens), positions, segments, prefix))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(variant):
    golden = np.load(GOLDEN / variant / "golden.npz")
    backbone = load_base(str(GOLDEN / variant)).backbone
    batch = rows(golden)
    real = np.asarray(batch[2] == 0)
    error = np.abs(run(backbone, *batch) - golden["logits"])[real]
    assert error.max() < EXACT * golden["logits"].std()


@pytest.mark.parametrize("variant", VARIANTS)
def test_prompted_loss_and_gradient_are_those_of_peft(variant):
    golden = np.load(GOLDEN / variant / "golden.npz")
    backbone = load_base(str(GOLDEN / variant)).backbone
    tokens, positions, segments = rows(golden)
    real = segments == 0

    def loss(prompt):
        logits = run(backbone, tokens, positions, segments, backbone.prefill(prompt))
        log_probabilities = jnp.take_along_axis(
            jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1
        )[..., 0]
        return -log_probabilities.mean(where=real[:, 1:]), logits

    (value, logits), gradient = jax.value_and_grad(loss, has_aux=True)(
        jnp.asarray(golden["prompt"])
    )
    error = np.abs(logits - golden["prompted_logits"])[np.asarray(real)]
    assert error.max() < EXACT * golden["prompted_logits"].std()
    np.testing.assert_allclose(value, golden["loss"], rtol=1e-6)
    scale = np.abs(golden["prompt_gradient"]).max()
    assert np.abs(gradient - golden["prompt_gradient"]).max() < EXACT * scale


def test_smollm2_logits_are_those_of_transformers(smollm2):
    golden = np.load(GOLDEN / "smollm2.npz")
    text = "The quick brown fox jumps over the lazy dog, and 12 more."
    tokens = smollm2.tokenizer(text).input_ids
    assert tokens == golden["tokens"].tolist()
    positions = jnp.arange(len(tokens))[None]
    logits = run(smollm2.backbone, jnp.array([tokens]), positions, jnp.zeros_like(positions))[0]
    assert np.abs(logits[:, ::61] - golden["logits"]).max() < EXACT * golden["spread"]
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    np.testing.assert_allclose(normaliser, golden["log_normaliser"], rtol=1e-5)


def test_no_token_sees_a_later_one_or_another_candidate(tiny):
    """By gradients: a hidden state depends on exactly the tokens it may see."""
    segments = jnp.array([[0, 0, 0, 1, 1, 2, 2, -1]])
    positions = jnp.array([[0, 1, 2, 3, 4, 3, 4, 0]])
    embeddings = tiny.backbone.embedding(jnp.arange(8)[None] + 50)

    def hidden(embeddings):
        return tiny.backbone(embeddings, positions, segments)[0].sum(axis=-1)

    gradient = jnp.abs(jax.jacobian(hidden)(embeddings))[:, 0].sum(axis=-1)  # [T, T]
    seen = np.asarray(gradient > 0)[:-1]  # what padding sees does not matter
    expected = np.array(
        [
            [1, 0, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0, 0, 0],
            [1, 1, 1, 1, 0, 0, 0, 0],
            [1, 1, 1, 1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0, 1, 0, 0],
            [1, 1, 1, 0, 0, 1, 1, 0],
        ],
        bool,
    )
    np.testing.assert_array_equal(seen, expected)


def test_attention_is_a_softmax_over_prefix_and_own_keys():
    """Against the textbook, one query head at a time, in float64."""
    random = np.random.default_rng(0)
    batch, length, kv_heads, group, size, virtual = 2, 5, 2, 3, 4, 3
    queries = random.normal(size=(batch, length, kv_heads * group, size))
    keys, values = random.normal(size=(2, batch, length, kv_heads, size))
    prefix_keys, prefix_values = random.normal(size=(2, virtual, kv_heads, size))
    positions = np.broadcast_to(np.arange(length), (batch, length))
    visible = causal_mask(jnp.asarray(positions), jnp.asarray(positions), None)

    expected = np.empty(queries.shape)
    for row, head, query in np.ndindex(batch, kv_heads * group, length):
        kv = head // group
        seen = np.concatenate([prefix_keys[:, kv], keys[row, : query + 1, kv]])
        mixed = np.concatenate([prefix_values[:, kv], values[row, : query + 1, kv]])
        weights = np.exp(seen @ queries[row, query, head] / size**0.5)
        expected[row, query, head] = weights @ mixed / weights.sum()

    arrays = (queries, keys, values, prefix_keys, prefix_values)
    queries, keys, values, *prefix = (jnp.asarray(a, jnp.float32) for a in arrays)
    got = attend(queries, [Source(keys, values, visible), Source(*prefix)], scale=size**-0.5)
    np.testing.assert_allclose(got, expected, atol=1e-6)
