"""The shared prefix is the prepended prompt: same loss, same gradient; and initial vectors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN

from softprompt import SoftPrompt, load_base
from softprompt.methods import initializers

pytestmark = pytest.mark.usefixtures("strict_types")

LENGTHS = [7, 1, 4]


def batch_of(lengths, side, vocabulary=259):
    """Tokens, positions and segments of ragged rows, padded on one side."""
    random = np.random.default_rng(3)
    longest = max(lengths) + 2
    tokens = np.zeros((len(lengths), longest), np.int32)
    positions, segments = np.zeros_like(tokens), np.full_like(tokens, -1)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(longest - length, longest)
        tokens[row, place] = random.integers(3, vocabulary, length)
        positions[row, place] = np.arange(length)
        segments[row, place] = 0
    return jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(segments)


def loss_of(logits, tokens, segments):
    """Mean loss of every real token but a row's first, whatever the padding's side."""
    log_probabilities = jax.nn.log_softmax(logits[:, :-1])
    picked = jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1)[..., 0]
    return -picked.mean(where=(segments[:, 1:] == 0) & (segments[:, :-1] == 0))


@jax.jit
def prepended(backbone, vectors, tokens, positions, segments):
    """Logits of the rows with the prompt's vectors in front of their embeddings."""
    length = vectors.shape[0]
    embeddings = SoftPrompt(vectors)(backbone.embedding(tokens))
    ours = jnp.broadcast_to(jnp.arange(length), (len(tokens), length))
    positions = jnp.concatenate([ours, positions + length], axis=1)
    segments = jnp.concatenate([jnp.zeros_like(ours), segments], axis=1)
    return backbone.logits(backbone(embeddings, positions, segments))[:, length:]


@jax.jit
def shared(backbone, vectors, tokens, positions, segments):
    """Logits of the rows behind the prefix that the prompt's vectors give."""
    backbone, prefix = SoftPrompt(vectors).apply(backbone)
    return backbone.logits(backbone(backbone.embedding(tokens), positions, segments, prefix))


@partial(jax.jit, static_argnames="form")
def loss_and_gradient(vectors, backbone, batch, form):
    def loss(vectors):
        tokens, _, segments = batch
        return loss_of(form(backbone, vectors, *batch), tokens, segments)

    return jax.value_and_grad(loss)(vectors)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("length", [1, 5, 40])
@pytest.mark.parametrize("variant", ["llama-grouped", "llama-sharded"])
def test_a_shared_prefix_gives_the_loss_and_gradient_of_prepending(variant, length, side):
    backbone = load_base(str(GOLDEN / variant)).backbone
    batch = batch_of(LENGTHS, side)
    vectors = jax.random.normal(jax.random.key(length), (length, 32))
    one, its_gradient = loss_and_gradient(vectors, backbone, batch, prepended)
    other, other_gradient = loss_and_gradient(vectors, backbone, batch, shared)
    np.testing.assert_allclose(one, other, rtol=1e-6)
    scale = np.abs(its_gradient).max()
    np.testing.assert_allclose(its_gradient, other_gradient, atol=1e-5 * scale)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("form", [prepended, shared])
def test_a_padded_row_is_as_it_is_alone(tiny, form, side):
    vectors = jax.random.normal(jax.random.key(0), (5, 32))
    tokens, positions, segments = batch_of(LENGTHS, side)
    together = form(tiny.backbone, vectors, tokens, positions, segments)
    for row, length in enumerate(LENGTHS):
        real = np.asarray(segments[row] == 0)
        alone = tokens[row][real][None]
        plain = jnp.arange(length)[None]
        expected = form(tiny.backbone, vectors, alone, plain, jnp.zeros_like(plain))[0]
        np.testing.assert_allclose(together[row][real], expected, atol=2e-5)


def test_a_prompt_of_token_embeddings_is_those_tokens(tiny, golden_llama):
    """Behind the embeddings of a text as prompt, a row reads as behind the text itself."""
    tokens = jnp.asarray(golden_llama["tokens"])[:1]
    positions = jnp.arange(9)[None]
    whole = tiny.backbone(tiny.backbone.embedding(tokens), positions, jnp.zeros_like(positions))
    _, prefix = SoftPrompt(tiny.backbone.embedding(tokens[0, :4])).apply(tiny.backbone)
    rest = tiny.backbone(
        tiny.backbone.embedding(tokens[:, 4:]), positions[:, :5], jnp.zeros((1, 5), int), prefix
    )
    np.testing.assert_allclose(rest, whole[:, 4:], atol=1e-5)


def test_sampled_vocabulary_draws_frequent_tokens_once(smollm2):
    table = smollm2.backbone.embedding.table[...]
    vectors = initializers.sampled_vocabulary(smollm2, 600, np.random.default_rng(0))
    distance = jnp.abs(vectors[:, None, :8] - table[None, :6000, :8]).sum(axis=-1)
    tokens = np.asarray(distance.argmin(axis=1))
    np.testing.assert_array_equal(vectors, table[tokens])
    assert len(set(tokens)) == 600
    special = [i for i in smollm2.tokenizer.added_tokens_decoder if i < 6000]
    assert len(special) == 17
    assert tokens.min() > max(special)
    assert tokens.max() < 5000 + len(special)


def test_random_vectors_have_the_tables_spread(smollm2):
    table = smollm2.backbone.embedding.table[...]
    vectors = initializers.random_vectors(smollm2, 3000, np.random.default_rng(0))
    np.testing.assert_allclose(vectors.std(axis=0), table.std(axis=0), rtol=0.1)
    np.testing.assert_allclose(vectors.mean(axis=0), table.mean(axis=0), atol=0.01)


def test_text_vectors_repeat_or_cut_the_text(tiny):
    tokens = tiny.tokenizer("abc", add_special_tokens=False).input_ids
    table = tiny.backbone.embedding.table[...]
    repeated = initializers.text_vectors(tiny, 5, "abc")
    np.testing.assert_array_equal(repeated, table[jnp.array([*tokens, *tokens[:2]])])
    np.testing.assert_array_equal(initializers.text_vectors(tiny, 2, "abc"), repeated[:2])


def test_label_vectors_are_mean_embeddings_of_the_labels_then_vocabulary(tiny):
    table = tiny.backbone.embedding.table[...]
    (one,), two = tiny.tokenizer(["a", "bc"], add_special_tokens=False).input_ids
    random = np.random.default_rng(1)
    vectors = initializers.label_vectors(tiny, 6, ["a", "bc"], random)
    np.testing.assert_array_equal(vectors[0], table[one])
    np.testing.assert_allclose(vectors[1], (table[two[0]] + table[two[1]]) / 2, rtol=1e-6)
    rest = initializers.sampled_vocabulary(tiny, 4, np.random.default_rng(1))
    np.testing.assert_array_equal(vectors[2:], rest)
    assert initializers.label_vectors(tiny, 1, ["a", "bc"], random).shape == (1, 32)
