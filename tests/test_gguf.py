"""Models in GGUF files match llama.cpp, whose logits are in tests/golden/gguf."""

import json

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from transformers import AutoConfig

from softprompt import UserError
from softprompt.backbones.families import FAMILIES
from softprompt.backbones.formats.gguf import GGUFFile
from softprompt.backbones.loading import load_backbone

FILES = sorted((GOLDEN / "gguf").glob("*.gguf"))


def test_every_supported_architecture_has_reference_results():
    kinds = {GGUFFile(path).config["model_type"] for path in FILES}
    assert kinds == {kind for kind, family in FAMILIES.items() if family.gguf_names}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_logits_match_llama_cpp(path):
    golden = np.load(path.with_suffix(".npz"))
    backbone, _ = load_backbone(GGUFFile(path))
    tokens = jnp.asarray(golden["tokens"])[None]
    logits = backbone.logits(backbone(backbone.embedding(tokens)))[0]
    # llama.cpp looks up GELU in a float16 table.
    exact = 2e-3 if path.stem == "gemma3" else 1e-5
    assert np.abs(logits - golden["logits"]).max() < exact * golden["logits"].std()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_transformers_reads_the_config_as_we_do(path, tmp_path):
    config = GGUFFile(path).config
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = AutoConfig.from_pretrained(tmp_path).to_dict()
    architecture = FAMILIES[config["model_type"]].architecture
    assert architecture(theirs) == architecture(config)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert theirs[key] == config[key]


def write_tensor(path, kind):
    writer = gguf.GGUFWriter(path, "llama")
    array = np.linspace(-1, 1, 512, dtype=np.float32).reshape(2, 256)
    writer.add_tensor("x", gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return array


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_1"])
def test_stored_types_are_read(tmp_path, kind):
    array = write_tensor(tmp_path / "x.gguf", gguf.GGMLQuantizationType[kind])
    read = GGUFFile(tmp_path / "x.gguf").read("x")
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, array, atol=0.08)


def test_an_unsupported_storage_type_is_named(tmp_path):
    path = tmp_path / "x.gguf"
    write_tensor(path, gguf.GGMLQuantizationType.Q8_0)
    file = GGUFFile(path)
    file._tensors["x"] = file._tensors["x"].__class__((2, 256), 15, 0)  # Q8_K
    with pytest.raises(UserError, match="tensor x is stored as Q8_K, which is not supported"):
        file.read("x")


def test_a_truncated_tensor_is_rejected(tmp_path):
    path = tmp_path / "x.gguf"
    write_tensor(path, gguf.GGMLQuantizationType.F32)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="tensor x is damaged"):
        GGUFFile(path).read("x")


def test_invalid_metadata_is_rejected(tmp_path):
    for key, value in (("llama.embedding_length", "wide"), ("general.alignment", "32")):
        writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
        writer.add_head_count(2)
        writer.add_string(key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        with pytest.raises(UserError, match="not a readable GGUF file"):
            GGUFFile(tmp_path / "x.gguf")


def test_an_unsupported_rope_scaling_is_named(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes((GOLDEN / "gguf" / "llama.gguf").read_bytes())
    file = GGUFFile(path)
    file.config["rope_scaling"] = {"rope_type": "dynamic"}
    with pytest.raises(UserError, match="rope type 'dynamic' is not supported"):
        load_backbone(file)
