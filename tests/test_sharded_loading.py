"""Weights are read straight to the devices of a mesh that hold them."""

import json
import re
import resource
import socket
import sys
from pathlib import Path

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import FAMILIES_GOLDEN
from flax import nnx
from processes import ForkedProcess
from safetensors.numpy import save_file

from softprompt.backbones import decoder, t5
from softprompt.backbones.config import architecture_of
from softprompt.backbones.families import FAMILIES
from softprompt.backbones.formats.directory import ModelDirectory, ModelFile
from softprompt.backbones.formats.gguf import GGUFFile
from softprompt.backbones.formats.parts import covering
from softprompt.backbones.formats.storing import stored_tensors
from softprompt.backbones.loading import load_backbone
from softprompt.parallel.hosts import text_of_main
from softprompt.parallel.mesh import make_mesh
from softprompt.parallel.sharding import sharding_of

MODEL_TYPES = [
    *("gemma-gelu", "gemma2-capped", "gemma3_text-pattern", "gpt2-inner", "gpt_neox-quarter"),
    *("granite-biased", "llama-biased", "mistral-window", "olmo2-grouped", "opt-plain"),
    *("phi3-window", "qwen2-tied", "qwen3-window", "qwen3_moe-plain", "smollm3-window"),
    *("stablelm-biased", "t5-gated"),
]
SIZES = {  # the sizes in configs, changed so that the meshes below divide them
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "n_inner"), 96),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head"), 8),
    **dict.fromkeys(("head_dim", "d_kv"), 8),
    **{"vocab_size": 64, "num_key_value_heads": 4, "moe_intermediate_size": 16},
}
MESHES = [{"fsdp": 8}, {"fsdp": 2, "model": 4}, {"data": 2, "fsdp": 2, "model": 2}]
INT8_AND_BFLOAT16 = [{"int8": True}, {"dtype": "bfloat16"}, {"int8": True, "dtype": "bfloat16"}]


def random_backbone(config: dict, names: set[str]) -> nnx.Module:
    """Make a backbone whose parameters are NumPy arrays of random numbers."""
    arch = architecture_of(config, names)
    module = t5.T5 if config["model_type"] == "t5" else decoder.Decoder
    graphdef, state = nnx.split(nnx.eval_shape(lambda: module(arch)))
    random = np.random.default_rng(0)
    state = jax.tree.map(lambda p: random.standard_normal(p.shape, np.float32), state)
    return nnx.merge(graphdef, state)


def write_directory(variant: str, folder: Path) -> ModelDirectory:
    """Write a model of a golden model's family, in two files, with sizes that a mesh divides."""
    golden = ModelDirectory(FAMILIES_GOLDEN / variant)
    config = golden.config | {key: n for key, n in SIZES.items() if golden.config.get(key)}
    names = FAMILIES[config["model_type"]].names
    tensors = dict(stored_tensors(random_backbone(config, golden.names), names))
    shards = ["first.safetensors", "second.safetensors"]
    for number, shard in enumerate(shards):
        save_file({name: tensors[name] for name in list(tensors)[number::2]}, folder / shard)
    index = {"weight_map": dict(zip(shards, shards, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return ModelDirectory(folder)


def write_gguf(path: Path, kind: gguf.GGMLQuantizationType) -> GGUFFile:
    """Write a Llama model in a GGUF file with sizes that a mesh divides."""
    config = ModelDirectory(FAMILIES_GOLDEN / "llama-linear").config | SIZES
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(64)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(config["head_dim"])
    for name, tensor in stored_tensors(
        random_backbone(config, set()), FAMILIES["llama"].gguf_names
    ):
        stored = gguf.GGMLQuantizationType.F32 if "norm" in name else kind
        writer.add_tensor(name, gguf.quants.quantize(tensor, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(path)


def differences(file: ModelFile, **options) -> list[str]:
    """Load a model on one device and on each mesh, and list what differs."""
    whole, digest = load_backbone(file, **options)
    expected = dict(nnx.to_flat_state(nnx.state(whole)))
    found = []
    for sizes in MESHES:
        mesh = make_mesh(sizes)
        divided, digest_on_mesh = load_backbone(file, **options, mesh=mesh)
        parameters = dict(nnx.to_flat_state(nnx.state(divided)))
        for path, variable in parameters.items():
            array, one = variable[...], np.asarray(expected[path][...])
            same = array.dtype == one.dtype and np.asarray(array).tobytes() == one.tobytes()
            if not same or array.sharding != sharding_of(path, array.ndim, mesh):
                found.append(f"{sizes} {path}")
        if parameters.keys() != expected.keys() or digest_on_mesh != digest:
            found.append(f"{sizes} the parameters or the digest")
    return found


def compare_on_meshes(folder: Path) -> None:
    """Compare all models on 8 devices, and write the differences to a file."""
    jax.config.update("jax_num_cpu_devices", 8)
    found = {}
    for variant in MODEL_TYPES:
        (folder / variant).mkdir()
        file = write_directory(variant, folder / variant)
        found[variant] = differences(file)
        if variant in ("gpt_neox-quarter", "phi3-window", "qwen3_moe-plain", "t5-gated"):
            for options in INT8_AND_BFLOAT16:
                found[variant] += differences(file, **options)
    for kind in ("F32", "F16", "Q8_0", "Q4_1"):
        file = write_gguf(folder / f"{kind}.gguf", gguf.GGMLQuantizationType[kind])
        found[kind] = differences(file) + differences(file, int8=True)
    (folder / "differences.json").write_text(json.dumps(found))


def test_parameters_on_a_mesh_equal_those_on_one_device(tmp_path):
    code = """if True:
        import sys
        from pathlib import Path
        from test_sharded_loading import compare_on_meshes
        compare_on_meshes(Path(sys.argv[1]))
    """
    process = ForkedProcess(code, [str(tmp_path)])
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    found = json.loads((tmp_path / "differences.json").read_text())
    assert found.pop("F32") == []
    assert {name: differing for name, differing in found.items() if differing} == {}
    assert found.keys() == {*MODEL_TYPES, "F16", "Q8_0", "Q4_1"}


def test_every_family_is_compared():
    kinds = {
        ModelDirectory(FAMILIES_GOLDEN / variant).config["model_type"] for variant in MODEL_TYPES
    }
    assert kinds == set(FAMILIES)
