"""The decoder agrees with transformers and peft, whose results are in tests/golden."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN

from softprompt import load_base
from softprompt.backbones.architecture import LayerKind
from softprompt.backbones.attention import Source, attend, causal_mask
from softprompt.backbones.rope import Rope

pytestmark = pytest.mark.usefixtures("strict_types")

VARIANTS = ["llama-grouped", "llama-untied", "llama-sharded"]
EXACT = 1e-4  # tolerance in units of the standard deviation of the reference logits


quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def rows(golden):
    """Return tokens, positions and segments of the right-padded batch in a golden file."""
    tokens = jnp.asarray(golden["tokens"])
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments = jnp.where(positions < golden["lengths"][:, None], 0, -1)
    return tokens, positions, segments


@quick
def run(backbone, tokens, positions, segments, prefix=None):
    return backbone.logits(backbone(backbone.embedding(tokens), positions, segments, prefix))


@quick
def loss_and_gradient(backbone, tokens, positions, segments, prompt):
    def loss(prompt):
        prefix = backbone.prefill(prompt)
        hidden = backbone(backbone.embedding(tokens), positions, segments, prefix)
        logits = backbone.logits(hidden)
        log_probabilities = jnp.take_along_axis(
            jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1
        )[..., 0]
        return -log_probabilities.mean(where=(segments == 0)[:, 1:]), logits

    return jax.value_and_grad(loss, has_aux=True)(prompt)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_agree_with_transformers(variant):
    golden = np.load(GOLDEN / variant / "golden.npz")
    backbone = load_base(str(GOLDEN / variant)).backbone
    batch = rows(golden)
    real = np.asarray(batch[2] == 0)
    error = np.abs(run(backbone, *batch) - golden["logits"])[real]
    assert error.max() < EXACT * golden["logits"].std()


@pytest.mark.parametrize("variant", VARIANTS)
def test_prompted_loss_and_gradient_agree_with_peft(variant):
    golden = np.load(GOLDEN / variant / "golden.npz")
    backbone = load_base(str(GOLDEN / variant)).backbone
    batch = rows(golden)
    real = np.asarray(batch[2] == 0)
    (value, logits), gradient = loss_and_gradient(backbone, *batch, jnp.asarray(golden["prompt"]))
    error = np.abs(logits - golden["prompted_logits"])[real]
    assert error.max() < EXACT * golden["prompted_logits"].std()
    np.testing.assert_allclose(value, golden["loss"], rtol=1e-6)
    scale = np.abs(golden["prompt_gradient"]).max()
    assert np.abs(gradient - golden["prompt_gradient"]).max() < EXACT * scale


def test_smollm2_logits_agree_with_transformers(smollm2):
    golden = np.load(GOLDEN / "smollm2.npz")
    text = "The quick brown fox jumps over the lazy dog, and 12 more."
    tokens = smollm2.tokenizer(text).input_ids
    assert tokens == golden["tokens"].tolist()
    positions = jnp.arange(len(tokens))[None]
    logits = run(smollm2.backbone, jnp.array([tokens]), positions, jnp.zeros_like(positions))[0]
    assert np.abs(logits[:, ::61] - golden["logits"]).max() < EXACT * golden["spread"]
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    np.testing.assert_allclose(normalizer, golden["log_normaliser"], rtol=1e-5)


def test_no_token_attends_to_a_later_token_or_another_candidate(tiny):
    """Gradients show which tokens each hidden state depends on."""
    segments = jnp.array([[0, 0, 0, 1, 1, 2, 2, -1]])
    positions = jnp.array([[0, 1, 2, 3, 4, 3, 4, 0]])
    embeddings = tiny.backbone.embedding(jnp.arange(8)[None] + 50)

    def hidden(embeddings):
        return tiny.backbone(embeddings, positions, segments)[0].sum(axis=-1)

    gradient = jnp.abs(quick(jax.jacobian(hidden))(embeddings))[:, 0].sum(axis=-1)  # [T, T]
    seen = np.asarray(gradient > 0)[:-1]  # without the row of the padding
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


def test_attention_is_a_softmax_over_keys_of_all_rows_of_some_rows_and_of_one_row():
    """The reference is computed in float64, one query and head at a time."""
    random = np.random.default_rng(0)
    batch, length, kv_heads, group, size, virtual = 4, 5, 2, 3, 4, 3
    queries = random.normal(size=(batch, length, kv_heads * group, size))
    own = random.normal(size=(2, batch, length, kv_heads, size))
    of_pairs = random.normal(size=(2, 2, virtual, kv_heads, size))
    of_all = random.normal(size=(2, 1, virtual, kv_heads, size))
    positions = np.broadcast_to(np.arange(length), (batch, length))
    visible = causal_mask(jnp.asarray(positions), jnp.asarray(positions), None)

    expected = np.empty(queries.shape)
    for row, head, query in np.ndindex(batch, kv_heads * group, length):
        kv = head // group
        parts = of_all[:, 0], of_pairs[:, row // 2], own[:, row, : query + 1]
        seen, mixed = np.concatenate([part[:, :, kv] for part in parts], axis=1)
        weights = np.exp(seen @ queries[row, query, head] / size**0.5)
        expected[row, query, head] = weights @ mixed / weights.sum()

    arrays = (queries, own, of_pairs, of_all)
    queries, own, of_pairs, of_all = (jnp.asarray(array, jnp.float32) for array in arrays)

    @jax.jit
    def attention(queries, own, of_pairs, of_all):
        sources = [Source(*own, visible), Source(*of_pairs), Source(*of_all)]
        return attend(queries, sources, scale=size**-0.5)

    got = attention(queries, own, of_pairs, of_all)
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 0},
        {"hidden_size": True},
        {"head_size": -1},
        {"norm_epsilon": math.nan},
        {"norm_epsilon": 0.0},
        {"embedding_scale": math.inf},
        {"residual_scale": 0.0},
        {"logit_scale": -1.0},
        {"attention_scale": math.nan},
        {"attention_softcap": 0.0},
        {"logit_softcap": -30},
        {"num_experts": -1},
        {"num_experts": 4},
        {"num_experts": 4, "experts_per_token": 5},
        {"layers": ()},
        {"layers": (LayerKind(None, window=0),)},
        {"layers": (LayerKind(Rope((math.inf,))),)},
        {"layers": (LayerKind(Rope((0.0,))), LayerKind(Rope((0.0, 0.0))))},
        {"layers": (LayerKind(Rope((0.0,))), LayerKind(None))},
        {"layers": (LayerKind(Rope((0.0,), factor=math.nan)),)},
    ],
    ids=str,
)
def test_an_architecture_that_cannot_compute_finite_numbers_is_rejected(tiny, changes):
    with pytest.raises(ValueError, match=r"\S"):
        dataclasses.replace(tiny.backbone.arch, **changes)
