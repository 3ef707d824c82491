"""Storing a backbone gives the tensors that it was read from."""

import json
import shutil
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from conftest import FAMILIES_GOLDEN, GOLDEN, golden_backbone
from flax import nnx
from safetensors.numpy import load_file, save_file

from softprompt import UserError
from softprompt.backbones.families import FAMILIES
from softprompt.backbones.formats import names
from softprompt.backbones.formats.directory import ModelDirectory
from softprompt.backbones.formats.gguf import GGUFFile
from softprompt.backbones.formats.storing import stored_tensors
from softprompt.backbones.loading import load_backbone

VARIANTS = sorted(path.name for path in FAMILIES_GOLDEN.iterdir() if path.is_dir())
GGUF_FILES = sorted((GOLDEN / "gguf").glob("*.gguf"))


def stored(backbone, file):
    return dict(stored_tensors(backbone, FAMILIES[file.config["model_type"]].names))


@pytest.mark.parametrize("variant", VARIANTS)
def test_stored_tensors_equal_the_tensors_that_were_read(variant):
    file = ModelDirectory(FAMILIES_GOLDEN / variant)
    backbone = golden_backbone(variant)
    table = FAMILIES[file.config["model_type"]].names
    head = str(table["head"]) + ".weight"
    tensors = stored(backbone, file)
    first = str(table["embedding"]).split(".")[0] + "."
    whole = any(name.startswith(first) for name in file.names)
    theirs = {name if whole or name == head else first + name: name for name in file.names}
    if backbone.arch.tied_head:
        theirs.pop(head, None)
    assert tensors.keys() == theirs.keys()
    for name, tensor in tensors.items():
        expected = file.read(theirs[name]).astype(np.float32)
        if name.endswith("embed_positions.weight"):
            expected[:2] = 0  # the rows for padding
        # Gemma's norms are stored as the difference from 1.
        differs = 1e-7 if "gemma" in variant and "norm" in name else 0
        np.testing.assert_allclose(tensor, expected, rtol=0, atol=differs)


@pytest.mark.parametrize("path", GGUF_FILES, ids=lambda path: path.stem)
def test_a_gguf_file_stored_as_a_directory_is_the_same_model(path, tmp_path):
    file = GGUFFile(path)
    backbone, _ = load_backbone(file)
    save_file(stored(backbone, file), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(file.config))
    again, _ = load_backbone(ModelDirectory(tmp_path))
    assert again.arch == backbone.arch
    expected = dict(nnx.to_flat_state(nnx.state(backbone)))
    for key, variable in nnx.to_flat_state(nnx.state(again)):
        differs = 1e-7 if path.stem == "gemma3" and "norm" in str(key) else 0
        np.testing.assert_allclose(variable[...], expected[key][...], rtol=0, atol=differs)


@pytest.mark.parametrize("variant", ["phi3-window", "gpt2-plain", "qwen3_moe-plain"])
def test_int8_matrices_are_stored_within_half_a_step(variant):
    file = ModelDirectory(FAMILIES_GOLDEN / variant)
    exact = stored(golden_backbone(variant), file)
    for name, tensor in stored(golden_backbone(variant, quantize="int8"), file).items():
        step = np.abs(exact[name]).max() / 127
        assert tensor.dtype == np.float32
        np.testing.assert_allclose(tensor, exact[name], rtol=0, atol=step / 2 + 1e-6)


def test_bfloat16_tensors_are_stored_as_bfloat16():
    tensors = stored(
        golden_backbone("phi3-window", "bfloat16"), ModelDirectory(FAMILIES_GOLDEN / "phi3-window")
    )
    assert {tensor.dtype for name, tensor in tensors.items() if "norm" not in name} == {
        np.dtype(ml_dtypes.bfloat16)
    }


ARCH = SimpleNamespace(num_heads=4, num_kv_heads=2, head_size=6)
FORMS = {  # each form, and the number of rows of a tensor in this form
    "query_key_value": (names.QUERY_KEY_VALUE, 48),
    "by_head": (names.BY_HEAD, 72),
    "halves": (names.HALVES, 10),
    "pairs": (names.GGUF_LLAMA["layers.attention.query"].form, 24),
    "whole": (names.WHOLE, 7),
}


@pytest.mark.parametrize(("form", "rows"), FORMS.values(), ids=FORMS)
def test_split_tensors_are_joined_again_exactly(form, rows):
    """The tensors are biases, matrices and LoRA's `up`, which is split like its matrix."""
    random = np.random.default_rng(0)
    up, down = random.normal(size=(rows, 2)), random.normal(size=(2, 5))
    for tensor in (up[:, 0], up, up @ down):
        np.testing.assert_array_equal(form.join(form.split(tensor, ARCH), ARCH), tensor)
    for part, part_of_up in zip(form.split(up @ down, ARCH), form.split(up, ARCH), strict=True):
        np.testing.assert_allclose(part, part_of_up @ down)


@pytest.mark.parametrize(
    ("variant", "ending"),
    [
        ("phi3-window", "layers.0.self_attn.qkv_proj.weight"),
        ("phi3-window", "layers.0.mlp.gate_up_proj.weight"),
        ("gpt_neox-quarter", "layers.0.attention.query_key_value.weight"),
        ("gpt2-plain", "h.0.attn.c_attn.weight"),
        ("opt-plain", "embed_positions.weight"),
    ],
)
def test_a_tensor_that_cannot_be_split_is_named(variant, ending, tmp_path):
    model = shutil.copytree(FAMILIES_GOLDEN / variant, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if name.endswith(ending))
    for shape in ((), (3,), (3, 5), (3, 5, 7)):
        save_file(weights | {name: np.zeros(shape, np.float32)}, model / "model.safetensors")
        with pytest.raises(UserError) as error:
            load_backbone(ModelDirectory(model))
        assert f"{name} has shape {shape}, from which" in str(error.value)
