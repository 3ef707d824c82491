"""Storage and computation of a backbone: bfloat16 and int8."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES_GOLDEN, GOLDEN, golden_backbone
from flax import nnx

from softprompt import load_base
from softprompt.backbones.quantization import quantize

MIXED = "gemma3_text-pattern"  # windows shorter than the prompt, two kinds of RoPE, a soft cap


quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@quick
def loss_and_gradient(backbone, tokens, lengths, prompt):
    real = jnp.arange(tokens.shape[1])[None] < lengths[:, None]

    def loss(prompt):
        prefix = backbone.prefill(prompt.astype(backbone.embedding.table[...].dtype))
        logits = backbone.logits(backbone(backbone.embedding(tokens), prefix=prefix))
        scores = jnp.take_along_axis(
            jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1
        )[..., 0]
        return -scores.mean(where=real[:, 1:])

    return jax.value_and_grad(loss)(prompt)


@functools.cache
def measured(variant, **compute):
    golden = np.load(FAMILIES_GOLDEN / variant / "golden.npz")
    arguments = golden["tokens"], golden["lengths"], jnp.asarray(golden["prompt"])
    return loss_and_gradient(golden_backbone(variant, **compute), *arguments)


def cosine(one, other):
    """The cosine similarity of two gradients."""
    return jnp.vdot(one, other) / (jnp.linalg.norm(one) * jnp.linalg.norm(other))


@pytest.mark.parametrize("variant", ["llama-biased", MIXED, "qwen3_moe-plain", "gpt2-plain"])
@pytest.mark.parametrize("compute", [{"dtype": "bfloat16"}, {"quantize": "int8"}], ids=str)
def test_rounded_weights_hardly_change_loss_and_prompt_gradient(variant, compute):
    loss, gradient = measured(variant)
    rounded_loss, rounded = measured(variant, **compute)
    assert rounded.dtype == jnp.float32
    assert rounded_loss != loss
    np.testing.assert_allclose(rounded_loss, loss, rtol=0.02)
    assert cosine(rounded, gradient) > 0.99


def test_all_parameters_except_norms_have_the_requested_dtype():
    _, state = nnx.split(golden_backbone(MIXED, dtype="bfloat16"))
    for path, parameter in nnx.to_flat_state(state):
        expected = jnp.float32 if "norm" in str(path) else jnp.bfloat16
        assert parameter.dtype == expected, path


def test_only_kernels_are_int8():
    _, state = nnx.split(golden_backbone("llama-biased", quantize="int8"))
    for path, parameter in nnx.to_flat_state(state):
        assert (parameter.dtype == jnp.int8) == (path[-1] == "kernel"), path


def test_quantization_error_is_at_most_half_a_step():
    kernel = np.random.default_rng(0).normal(size=(40, 7)).astype(np.float32)
    kernel[:, 3] = 0
    values, scales = quantize("int8", kernel).values()
    assert values.dtype == np.int8
    assert (np.abs(values).max(axis=0) == [127, 127, 127, 0, 127, 127, 127]).all()
    assert (np.abs(values * scales - kernel) <= scales / 2 * (1 + 1e-6)).all()


def test_the_fingerprint_does_not_depend_on_dtype_or_quantization():
    path = str(GOLDEN / "llama-grouped")
    fingerprints = {
        load_base(path, **compute).fingerprint
        for compute in ({}, {"dtype": "bfloat16"}, {"quantize": "int8"})
    }
    assert len(fingerprints) == 1
