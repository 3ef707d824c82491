"""Flash attention: its kernels, how they share a softmax, and which of them is chosen."""

import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES_GOLDEN, golden_backbone
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo as cudnn_operations

from softprompt import UserError
from softprompt.backbones import cudnn_kernel, decoder, dense_kernel, pallas_kernel
from softprompt.backbones.attention import Source, attend, causal_mask
from softprompt.backbones.attention_choice import (
    choose_attention,
    compare_with_xla,
    planned_attention,
)
from softprompt.backbones.flash import Scoring, flash_attend, kernel_of
from softprompt.parallel.mesh import make_mesh

PALLAS = SimpleNamespace(  # runs without a TPU
    forward=partial(pallas_kernel.forward, interpret=True),
    backward=partial(pallas_kernel.backward, interpret=True),
)
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def draw(*shapes):
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]


def plain_attend(queries, keys, values, prefix, *, scale, window, softcap=None):
    virtual = len(prefix[0]) if prefix else 0
    positions = jnp.arange(queries.shape[1])[None] + virtual
    sources = [Source(keys, values, causal_mask(positions, positions, window))]
    if prefix:
        visible = causal_mask(positions, jnp.arange(virtual)[None], window)
        sources.append(Source(prefix[0][None], prefix[1][None], visible))
    return attend(queries, sources, scale=scale, softcap=softcap)


def outputs_and_gradients(form, queries, keys, values, prefix, **options):
    """Return the output, and the gradients of queries, own keys and values, and the prefix's."""

    @quick
    def run(queries, keys, values, prefix):
        mixed, pull = jax.vjp(partial(form, **options), queries, keys, values, prefix)
        return [mixed, *jax.tree.leaves(pull(jnp.sin(mixed + 1)))]

    return run(queries, keys, values, prefix)


def assert_same_attention(kernel, tokens, virtual, window, softcap):
    own, shared = (2, tokens, 2, 8), (virtual, 2, 8)
    queries, keys, values, *prefix = draw((2, tokens, 4, 8), own, own, shared, shared)
    arrays = queries, keys, values, tuple(prefix) if virtual else None
    options = {"scale": 0.3, "window": window, "softcap": softcap}
    flash = outputs_and_gradients(partial(flash_attend, kernel=kernel), *arrays, **options)
    plain = outputs_and_gradients(plain_attend, *arrays, **options)
    assert len(flash) == (6 if virtual else 4)
    for ours, theirs in zip(flash, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6 * np.abs(theirs).max(), rtol=0)


@pytest.mark.parametrize(
    ("tokens", "virtual", "window", "softcap"),
    [(7, 5, None, 2.0), (7, 5, 9, None), (7, 5, 3, 2.0), (7, 0, 3, None)],
)
def test_dense_attention_has_the_outputs_and_gradients_of_plain_attention(
    tokens, virtual, window, softcap
):
    assert_same_attention(dense_kernel, tokens, virtual, window, softcap)


# 260 tokens are three blocks of queries and of keys. With a window of 140 a block skips the keys
# before it; with one of 20, most queries attend to nothing in the prefix.
@pytest.mark.parametrize(
    ("tokens", "virtual", "window", "softcap"),
    [(7, 5, None, 2.0), (7, 0, 3, None), (260, 130, 140, None), (260, 5, 20, 2.0)],
)
def test_the_pallas_kernel_has_the_outputs_and_gradients_of_plain_attention(
    tokens, virtual, window, softcap
):
    assert_same_attention(PALLAS, tokens, virtual, window, softcap)


def emulated(backward):
    """Return a stand-in for an operation of cuDNN that computes the same by XLA."""

    def bind(queries, keys, values, *others, scale, mask_type, sliding_window_length, **_):
        is_causal = mask_type == cudnn_operations.MaskType.CAUSAL
        assert is_causal or sliding_window_length is None
        offset = 0 if is_causal else queries.shape[1] * keys.shape[1]
        scoring = Scoring(scale, None, sliding_window_length, offset)
        assert all(unused.size == 0 for unused in others[:7])
        if not backward:
            return dense_kernel.forward(queries, keys, values, scoring)
        sums, output, gradient = others[7:]
        return dense_kernel.backward(queries, keys, values, output, sums, gradient, scoring)

    return SimpleNamespace(bind=bind)


@pytest.mark.parametrize(
    ("virtual", "window"), [(0, None), (0, 3), (5, None), (5, 12), (5, 11), (5, 3)]
)
def test_cudnn_is_asked_for_the_right_attention(virtual, window, monkeypatch):
    """Without a GPU, XLA takes the place of cuDNN's operations."""
    forward, backward = (f"_dot_product_attention_{name}_p_wrapper" for name in ("fwd", "bwd"))
    monkeypatch.setattr(cudnn_operations, forward, emulated(backward=False))
    monkeypatch.setattr(cudnn_operations, backward, emulated(backward=True))
    assert_same_attention(cudnn_kernel, 7, virtual, window, None)


def test_cudnn_reads_a_shared_prefix_without_a_copy_for_each_row():
    shapes = (3, 32, 4, 64), (3, 32, 2, 64), (3, 32, 2, 64), (10, 2, 64), (10, 2, 64)
    queries, keys, values, *prefix = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes)

    def gradient(*arrays):
        form = partial(flash_attend, kernel=cudnn_kernel, scale=0.1, window=None)
        mixed, pull = jax.vjp(form, *arrays)
        return pull(mixed)

    traced = jax.jit(gradient).trace(queries, keys, values, prefix)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"@__cudnn\$(\w+)\(.* : \(tensor<(\w+)xbf16>, tensor<(\w+)xbf16>", text)
    own, shared = ("3x32x4x64", "3x32x2x64"), ("1x96x4x64", "1x10x2x64")
    names = "fmhaSoftmax", "fmhaSoftmaxBackward"
    assert sorted(calls) == sorted((name, *shape) for name in names for shape in (own, shared))


@pytest.mark.parametrize("variant", ["mistral-window", "qwen3-window"])
def test_a_model_with_flash_attention_has_the_same_logits(variant, monkeypatch):
    """On a CPU, the dense kernel takes the place of the others."""
    monkeypatch.setattr(decoder, "kernel_of", {"pallas": dense_kernel}.get)
    golden = np.load(FAMILIES_GOLDEN / variant / "golden.npz")
    backbone = nnx.clone(golden_backbone(variant))
    backbone.attention = "pallas"
    tokens = jnp.asarray(golden["tokens"])

    @quick
    def prompted(backbone, prompt):
        prefix = backbone.prefill(prompt)
        return backbone.logits(backbone(backbone.embedding(tokens), prefix=prefix))

    logits = prompted(backbone, jnp.asarray(golden["prompt"]))
    real = np.arange(tokens.shape[1])[None] < golden["lengths"][:, None]
    error = np.abs(np.asarray(logits) - golden["prompted_logits"])[real]
    assert error.max() < 1e-4 * golden["prompted_logits"][real].std()


def test_the_comparison_finds_wrong_and_failing_kernels():
    arch = golden_backbone("llama-biased").arch
    assert compare_with_xla(arch, "bfloat16", dense_kernel) is None
    assert "failed" in compare_with_xla(arch, "bfloat16", kernel_of("cudnn"))

    def without_prefix(queries, keys, values, output, sums, gradient, scoring):
        parts = dense_kernel.backward(queries, keys, values, output, sums, gradient, scoring)
        return parts if scoring.offset == 0 else tuple(map(jnp.zeros_like, parts))

    wrong = SimpleNamespace(forward=dense_kernel.forward, backward=without_prefix)
    assert "disagreed" in compare_with_xla(arch, "bfloat16", wrong)


def test_attention_is_chosen_by_device():
    arch = golden_backbone("llama-biased").arch
    assert choose_attention("auto", arch, "bfloat16", None) == "xla"
    assert choose_attention("xla", arch, "bfloat16", None) == "xla"
    with pytest.raises(UserError, match=r"attention cudnn: it needs an NVIDIA GPU.*auto or xla"):
        choose_attention("cudnn", arch, "bfloat16", None)
    with pytest.raises(UserError, match=r"attention pallas: it needs a TPU, and the device here"):
        choose_attention("pallas", arch, "bfloat16", None)
    with pytest.raises(UserError, match="attention 'fast' is not one of auto, xla, cudnn, pallas"):
        choose_attention("fast", arch, "bfloat16", None)


@pytest.mark.parametrize(
    ("requested", "platform", "kind", "chosen"),
    [
        ("auto", "tpu", "TPU v5 lite", "pallas"),
        ("auto", "gpu", "NVIDIA H100", "cudnn"),
        ("auto", "gpu", "AMD MI300X", "xla"),
        ("xla", "tpu", "TPU v5 lite", "xla"),
        ("pallas", "tpu", "TPU v5 lite", "pallas"),
    ],
)
def test_a_kernel_is_chosen_only_if_a_test_run_agrees(
    requested, platform, kind, chosen, monkeypatch
):
    arch = golden_backbone("llama-biased").arch
    device = SimpleNamespace(platform=platform, device_kind=kind)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    choice = "softprompt.backbones.attention_choice.compare_with_xla"
    monkeypatch.setattr(choice, lambda *_: None)
    assert choose_attention(requested, arch, "bfloat16", None) == chosen
    monkeypatch.setattr(choice, lambda *_: "a test run disagreed with XLA")
    if requested == "pallas":
        with pytest.raises(UserError, match="attention pallas: a test run disagreed with XLA"):
            choose_attention(requested, arch, "bfloat16", None)
    else:
        assert choose_attention(requested, arch, "bfloat16", None) == "xla"


def test_a_plan_uses_a_kernel_only_if_asked():
    arch, mesh = golden_backbone("llama-biased").arch, make_mesh({}, jax.devices("cpu")[:1])
    assert planned_attention("auto", arch, "bfloat16", mesh) == "xla"
    with pytest.raises(UserError, match=r"attention pallas: it needs a TPU.*'cpu'"):
        planned_attention("pallas", arch, "bfloat16", mesh)
