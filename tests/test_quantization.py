"""Quantized matrices: how they are packed, what they compute, and which files keep their values.

Axis letters: L layers, E experts, G groups of inputs.
"""

import dataclasses
import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES_GOLDEN, batch_of, example_of, golden_backbone
from flax import nnx
from test_compute import loss_and_gradient
from test_sharded_loading import write_gguf

from softprompt import UserError
from softprompt.backbones.config import architecture_of
from softprompt.backbones.formats.gguf_grid import grid_of
from softprompt.backbones.loading import backbone_shapes, load_backbone
from softprompt.backbones.quantization import (
    dequantize,
    group_size,
    kernel_shape,
    parameter_count,
    quantize,
)
from softprompt.evaluation.scoring import candidate_scores
from softprompt.experiment.compute_settings import ComputeSettings
from softprompt.methods.backbone_arrays import parameters_of, with_parameters


def dequantized(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Dequantize a kernel, as the reference. An int4 kernel takes one input at a time."""
    if "scale" in arrays:
        return arrays["kernel"] * arrays["scale"]
    kernel, scale, offset = (arrays[n] for n in ("kernel", "group_scale", "group_offset"))
    group = 2 * len(kernel) // len(scale)
    values = np.empty((2 * len(kernel), kernel.shape[1]), np.float32)
    for row in range(len(values)):
        codes = kernel[row // 2] // 16 if row % 2 else kernel[row // 2] % 16
        values[row] = codes * np.float32(scale[row // group]) + np.float32(offset[row // group])
    return values


@pytest.mark.parametrize(("inputs", "group"), [(96, 32), (80, 16), (64, 32), (6, 2)])
def test_int4_rounds_each_group_to_sixteen_values(inputs, group):
    kernel = np.random.default_rng(0).normal(size=(inputs, 5)).astype(np.float32)
    kernel[:group, 2], kernel[:group, 3] = 0, 0.25  # both are exact
    arrays = quantize("int4", kernel)
    groups = kernel.reshape(-1, group, 5)
    assert arrays["kernel"].shape == (inputs // 2, 5)
    assert arrays["group_scale"].shape == arrays["group_offset"].shape == (inputs // group, 5)
    assert kernel_shape(arrays["kernel"]) == kernel.shape
    expected = dequantized(arrays)
    assert (expected[:group, 2] == 0).all()
    assert (expected[:group, 3] == 0.25).all()
    step = (groups.max(axis=1) - groups.min(axis=1))[:, None] / 15
    error = np.abs(expected.reshape(groups.shape) - groups)
    rounding = 2**-11 * (np.abs(groups).max(axis=1)[:, None] + 15 * step)  # of the float16 numbers
    assert (error <= step / 2 + rounding).all()
    np.testing.assert_array_equal(dequantize(arrays, jnp.float32), expected)
    stacked = {name: np.stack([array, array[::-1]]) for name, array in arrays.items()}
    np.testing.assert_array_equal(dequantize(stacked, jnp.float32)[0], expected)


def test_matrices_that_int4_cannot_hold_are_one_line():
    assert [group_size(inputs) for inputs in (576, 48, 40, 34)] == [32, 16, 8, 2]
    with pytest.raises(UserError, match=r"int4: the model has a matrix with 23 inputs.*be even"):
        group_size(23)
    with pytest.raises(ValueError, match="values are too large for int4"):
        quantize("int4", np.full((4, 2), 7e4, np.float32))


def quantized_and_reference(variant, kind):
    """Return a quantized model, and one of floats with its values, dequantized by NumPy."""
    golden = golden_backbone(variant)
    arch = dataclasses.replace(golden.arch, feed_forward_size=24)  # theirs is odd
    floats, model = backbone_shapes(arch), backbone_shapes(arch, quantize=kind)
    random = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    stored: dict[str, np.ndarray] = {}
    for names, shape in nnx.to_flat_state(nnx.state(floats, nnx.Param)):
        path = ".".join(map(str, names))
        drawn = random.normal(size=shape.shape).astype(np.float32) * 0.2
        arrays[path] = stored[path] = drawn + ("norm.scale" in path)
        if path.endswith("kernel") and "router" not in path:
            around, stack = path.removesuffix("kernel"), shape.shape[:-2]
            found = [quantize(kind, drawn[i]) for i in np.ndindex(stack)]  # of layers and experts
            for name in found[0]:
                each = [one[name] for one in found]
                stored[around + name] = np.reshape(each, (*stack, *each[0].shape))
            values = [dequantized(one) for one in found]
            arrays[path] = np.reshape(values, shape.shape)
    return with_parameters(model, jnp_of(stored)), with_parameters(floats, jnp_of(arrays))


def jnp_of(arrays):
    return {path: jnp.asarray(array) for path, array in arrays.items()}


@pytest.mark.parametrize(
    ("variant", "kind"),
    [("llama-biased", "int8"), ("llama-biased", "int4"), ("qwen3_moe-plain", "int4")],
)
def test_a_quantized_model_computes_what_its_values_say(variant, kind):
    models = quantized_and_reference(variant, kind)
    random = np.random.default_rng(0)
    tokens, lengths = random.integers(3, 60, (2, 9)), np.array([9, 6])
    prompt = jnp.asarray(random.normal(size=(3, models[0].arch.hidden_size)), jnp.float32)
    losses, gradients = zip(
        *(loss_and_gradient(model, tokens, lengths, prompt) for model in models), strict=True
    )
    np.testing.assert_allclose(*losses, rtol=1e-5)
    np.testing.assert_allclose(*gradients, rtol=0, atol=1e-4 * np.abs(gradients[1]).max())


def test_a_quantized_encoder_decoder_computes_what_its_values_say():
    models = quantized_and_reference("t5-gated", "int4")
    examples = [example_of([5, 9, 7], [[4, 1], [8, 1]], 0), example_of([6, 3], [[4, 1], [8, 1]], 1)]
    batch = batch_of(examples, separate_targets=True)
    scores = [np.asarray(candidate_scores(model, None, batch, 2))[:2] for model in models]
    np.testing.assert_allclose(*scores, rtol=1e-5)


def test_the_parameters_of_a_quantized_model_are_counted_before_quantization():
    arch = dataclasses.replace(golden_backbone("qwen3_moe-plain").arch, feed_forward_size=24)
    counts = {
        parameter_count(nnx.state(backbone_shapes(arch, quantize=kind), nnx.Param))
        for kind in (None, "int8", "int4")
    }
    assert len(counts) == 1


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K"])
def test_the_grid_of_4_bit_blocks_gives_their_values_exactly(kind):
    """The blocks hold random bytes, with finite numbers as scales."""
    kind = gguf.GGMLQuantizationType[kind]
    size, count = gguf.GGML_QUANT_SIZES[kind][1], 24
    blocks = np.random.default_rng(0).integers(0, 256, (count, size), np.uint8)
    blocks[:, :4].view(np.float16)[:] = np.random.default_rng(1).normal(size=(count, 2))
    rows = blocks.reshape(4, -1)
    values = gguf.quants.dequantize(rows, kind)
    scale, offset = grid_of(rows, kind).transpose(2, 0, 1)[..., None]
    groups = values.reshape(4, -1, 32)
    codes = np.rint((groups - offset) / np.where(scale == 0, 1, scale))
    assert codes.min() == 0
    assert codes.max() == 15
    np.testing.assert_array_equal(codes * scale + offset, groups)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_int4_keeps_the_values_of_a_gguf_file(kind, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", gguf.GGMLQuantizationType[kind])
    floats, model = load_backbone(file)[0], load_backbone(file, quantize="int4")[0]
    expected, arrays = parameters_of(floats), parameters_of(model)
    kernels = [path for path in arrays if arrays[path].dtype == jnp.uint8]
    assert len(kernels) >= 7
    for path in kernels:
        names = "kernel", "group_scale", "group_offset"
        stored = {name: arrays[path.removesuffix("kernel") + name] for name in names}
        np.testing.assert_array_equal(dequantize(stored, jnp.float32), expected[path])


def test_training_keeps_no_dequantized_matrix_of_all_layers():
    config = json.loads((FAMILIES_GOLDEN / "llama-biased" / "config.json").read_text())
    config |= {"hidden_size": 128, "intermediate_size": 512, "head_dim": 32}

    def temporaries(layers):
        arch = architecture_of(config | {"num_hidden_layers": layers}, set())
        arguments = (
            backbone_shapes(arch, quantize="int4"),
            jax.ShapeDtypeStruct((1, 4), jnp.int32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
            jax.ShapeDtypeStruct((2, 128), jnp.float32),
        )
        return loss_and_gradient.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    one_layer = 4 * (4 * 128 * 128 + 3 * 128 * 512)  # bytes of the matrices in float32
    assert temporaries(9) - temporaries(3) < one_layer / 2


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"int8": True}, "int8"),
        ({"int8": False}, None),
        ({"int8": True, "quantize": None}, "int8"),
        ({"int8": False, "quantize": "int4"}, "int4"),
        ({"quantize": "int4"}, "int4"),
        ({}, None),
    ],
)
def test_the_former_key_int8_is_read(values, expected):
    settings = ComputeSettings.model_validate(values)
    assert settings.quantize == expected
    assert "int8" not in settings.model_dump()


def test_contradicting_settings_are_rejected():
    with pytest.raises(ValueError, match="int8: true and quantize: 'int4' differ"):
        ComputeSettings.model_validate({"int8": True, "quantize": "int4"})
