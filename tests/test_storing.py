"""A backbone's parameters become the tensors that they were read from."""

import json

import numpy as np
import pytest
from conftest import FAMILIES_GOLDEN, GOLDEN, golden_backbone
from flax import nnx
from safetensors.numpy import save_file

from softprompt.backbones.directory import ModelDirectory
from softprompt.backbones.families import FAMILIES
from softprompt.backbones.gguf import GGUFFile
from softprompt.backbones.loading import load_backbone
from softprompt.backbones.storing import stored_tensors

VARIANTS = sorted(path.name for path in FAMILIES_GOLDEN.iterdir() if path.is_dir())


@pytest.mark.parametrize("variant", VARIANTS)
def test_stored_tensors_are_those_that_were_read(variant):
    file = ModelDirectory(FAMILIES_GOLDEN / variant)
    backbone = golden_backbone(variant)
    names = FAMILIES[file.config["model_type"]].names
    head = str(names["head"]) + ".weight"
    tensors = dict(stored_tensors(backbone, names))
    first = str(names["embedding"]).split(".")[0] + "."
    whole = any(name.startswith(first) for name in file.names)
    theirs = {name if whole or name == head else first + name: name for name in file.names}
    if backbone.arch.tied_head:
        theirs.pop(head, None)
    assert tensors.keys() == theirs.keys()
    for name, tensor in tensors.items():
        expected = file.read(theirs[name]).astype(np.float32)
        if name.endswith("embed_positions.weight"):
            expected[:2] = 0  # of padding
        np.testing.assert_allclose(tensor, expected, rtol=0, atol=1e-7 if "norm" in name else 0)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3", "phi3"])
def test_a_gguf_file_stored_as_a_directory_is_the_same_model(name, tmp_path):
    file = GGUFFile(GOLDEN / "gguf" / f"{name}.gguf")
    backbone, _ = load_backbone(file)
    tensors = dict(stored_tensors(backbone, FAMILIES[file.config["model_type"]].names))
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(file.config))
    again, _ = load_backbone(ModelDirectory(tmp_path))
    assert again.arch == backbone.arch
    for path, variable in nnx.to_flat_state(nnx.state(again)):
        expected = dict(nnx.to_flat_state(nnx.state(backbone)))[path]
        np.testing.assert_allclose(variable[...], expected[...], atol=1e-7)
