"""Weights are read straight to the devices of a mesh that hold them."""

import gc
import json
import math
import os
import re
import resource
import shutil
import socket
from pathlib import Path

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import FAMILIES_GOLDEN
from flax import nnx
from jax.sharding import Mesh
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

VARIANTS = [
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
INT4_SIZES = {  # a mesh also divides their groups
    **dict.fromkeys(SIZES, 128),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head"), 8),
    **{"head_dim": 16, "d_kv": 16, "num_key_value_heads": 4},
}


def random_backbone(config: dict, names: set[str]) -> nnx.Module:
    """Make a backbone whose parameters are NumPy arrays of random numbers."""
    arch = architecture_of(config, names)
    module = t5.T5 if config["model_type"] == "t5" else decoder.Decoder
    graphdef, state = nnx.split(nnx.eval_shape(lambda: module(arch)))
    random = np.random.default_rng(0)
    state = jax.tree.map(lambda p: random.standard_normal(p.shape, np.float32), state)
    return nnx.merge(graphdef, state)


def write_directory(variant: str, folder: Path, sizes=SIZES) -> ModelDirectory:
    """Write a model of a golden model's family, in two files, with sizes that a mesh divides."""
    folder.mkdir()
    golden = ModelDirectory(FAMILIES_GOLDEN / variant)
    config = golden.config | {key: n for key, n in sizes.items() if golden.config.get(key)}
    names = FAMILIES[config["model_type"]].names
    tensors = dict(stored_tensors(random_backbone(config, golden.names), names))
    shards = ["first.safetensors", "second.safetensors"]
    for number, shard in enumerate(shards):
        save_file({name: tensors[name] for name in list(tensors)[number::2]}, folder / shard)
    index = {"weight_map": dict(zip(shards, shards, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return ModelDirectory(folder)


def write_gguf(path: Path, kind: gguf.GGMLQuantizationType, sizes=SIZES) -> GGUFFile:
    """Write a Llama model in a GGUF file with sizes that a mesh divides."""
    config = ModelDirectory(FAMILIES_GOLDEN / "llama-linear").config | sizes
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


def meshes() -> list[Mesh]:
    """Divide all weights over two processes, and over the devices of this process alone."""
    devices = np.array(jax.devices()).reshape(2, 2, 2)
    return [
        make_mesh({"fsdp": 8}),  # each process holds half of the columns
        make_mesh({"fsdp": 2, "model": 4}),  # also strips of the embedding
        make_mesh({"fsdp": 2, "model": 4}, devices.swapaxes(0, 1).ravel()),  # half of the rows
        make_mesh({"fsdp": 2, "model": 2}, jax.local_devices()),
    ]


def differences(file: ModelFile, meshes: list[Mesh], **options) -> list[str]:
    """Load a model on one device and on each mesh, and list what differs on local devices."""
    whole, digest = load_backbone(file, **options)
    expected = dict(nnx.to_flat_state(nnx.state(whole)))
    found = []
    for mesh in meshes:
        divided, digest_on_mesh = load_backbone(file, **options, mesh=mesh)
        parameters = dict(nnx.to_flat_state(nnx.state(divided)))
        for path, variable in parameters.items():
            array, one = variable[...], np.asarray(expected[path][...])
            same = array.dtype == one.dtype and all(
                np.asarray(shard.data).tobytes() == one[shard.index].tobytes()
                for shard in array.addressable_shards
            )
            if not same or array.sharding != sharding_of(path, array.ndim, mesh):
                found.append(f"{mesh} {path}")
        if parameters.keys() != expected.keys() or digest_on_mesh != digest:
            found.append(f"{mesh}: the parameters or the digest")
    return found


def compare_on_meshes(folder: Path) -> dict[str, list[str]]:
    """Compare small models of all kinds, and return the differences of each."""
    found = {}
    for variant in VARIANTS:
        file = write_directory(variant, folder / variant)
        found[variant] = differences(file, meshes()[1:3])
        if variant in ("gpt_neox-quarter", "phi3-window", "qwen3_moe-plain"):
            found[variant] += differences(file, meshes(), quantize="int8")
            found[variant] += differences(file, meshes()[-2:], dtype="bfloat16")
            file = write_directory(variant, folder / f"{variant}-int4", INT4_SIZES)
            found[variant] += differences(file, meshes()[1:], quantize="int4")
    for kind in ("F32", "F16", "Q8_0", "Q4_1"):
        file = write_gguf(folder / f"{kind}.gguf", gguf.GGMLQuantizationType[kind])
        found[kind] = differences(file, meshes())
        if kind == "Q4_1":
            file = write_gguf(folder / "int4.gguf", gguf.GGMLQuantizationType[kind], INT4_SIZES)
            found[kind] += differences(file, meshes()[1:], quantize="int4")
    return found


class CountingDirectory(ModelDirectory):
    """A model directory that counts the bytes that are read."""

    count = 0

    def read(self, name, part=()):
        array = super().read(name, part)
        self.count += array.nbytes
        return array


def write_large(folder: Path) -> int:
    """Write a model of 400 MB with 28 layers of 7 equal matrices, and return its size in bytes."""
    hidden, layers = 1024, 28
    config = ModelDirectory(FAMILIES_GOLDEN / "llama-linear").config | SIZES
    config |= {"hidden_size": hidden, "intermediate_size": hidden, "num_hidden_layers": layers}
    config |= {"num_key_value_heads": 8, "head_dim": hidden // 8, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"embed_tokens": (config["vocab_size"], hidden), "norm": (hidden,)}
    for layer in range(layers):
        for matrix in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o"):
            shapes[f"layers.{layer}.{matrix}_proj"] = hidden, hidden
        for matrix in ("mlp.gate", "mlp.up", "mlp.down"):
            shapes[f"layers.{layer}.{matrix}_proj"] = hidden, hidden
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"layers.{layer}.{norm}"] = (hidden,)
    random = np.random.default_rng(0)
    tensors = {}
    for name, shape in shapes.items():
        bits = np.frombuffer(random.bytes(2 * math.prod(shape)), np.uint16) & 0x3FFF  # finite
        tensors[f"model.{name}.weight"] = bits.view(ml_dtypes.bfloat16).reshape(shape)
    save_file(tensors, folder / "model.safetensors")
    os.utime(folder / "model.safetensors", (1, 1))  # so long ago that the digest is remembered
    return sum(tensor.nbytes for tensor in tensors.values())


def load_twice(folder: Path, size: int) -> list[tuple[str, int]]:
    """Load a large model twice, with memory for only three quarters of it.

    Returns:
      The digest and the number of bytes read, each time.
    """
    mesh = make_mesh({"fsdp": 2, "model": 4})
    text_of_main("")  # starts threads, which need memory
    status = Path("/proc/self/status").read_text()
    used = 1024 * int(re.search(r"VmData:\s+(\d+) kB", status)[1])
    resource.setrlimit(resource.RLIMIT_DATA, (used + size * 3 // 4, resource.RLIM_INFINITY))
    results = []
    for _ in range(2):
        file = CountingDirectory(folder)
        digest = load_backbone(file, dtype="bfloat16", mesh=mesh)[1]
        results.append((digest, file.count))
        gc.collect()  # modules contain cycles
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return results


def run_process(folder: Path, address: str, number: int, size: int) -> None:
    """Run one of two processes with four devices each, and write its results to a file."""
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(address, num_processes=2, process_id=number)
    results = {"large": load_twice(folder / "large", size)}
    (folder / f"small-{number}").mkdir()
    results["small"] = compare_on_meshes(folder / f"small-{number}")
    (folder / f"{number}.json").write_text(json.dumps(results))


CODE = """if True:
    import sys
    from pathlib import Path
    from test_sharded_loading import run_process
    run_process(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of two processes that load models together, and the size of the large model."""
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "large").mkdir()
    size = write_large(folder / "large")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    processes = [
        ForkedProcess(CODE, [str(folder), address, str(number), str(size)]) for number in range(2)
    ]
    for process in processes:
        errors = process.communicate()[1]
        assert process.returncode == 0, errors
    shutil.rmtree(folder / "large")
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(2)], size


def test_parameters_on_a_mesh_equal_those_on_one_device(results):
    for process in results[0]:
        found = process["small"]
        assert {name: differing for name, differing in found.items() if differing} == {}
        assert found.keys() == {*VARIANTS, "F32", "F16", "Q8_0", "Q4_1"}


def test_every_family_is_compared():
    configs = [ModelDirectory(FAMILIES_GOLDEN / variant).config for variant in VARIANTS]
    assert {config["model_type"] for config in configs} == set(FAMILIES)


def test_a_process_reads_and_holds_only_its_part_of_a_model(results):
    (main, other), size = results
    (digest, read_first), (remembered, read_again) = main["large"]
    assert read_first == size  # to compute the digest
    assert remembered == digest
    assert other["large"][0][0] == other["large"][1][0] == digest
    for read in (read_again, other["large"][0][1], other["large"][1][1]):
        assert size / 2 < read < size * 0.51  # norms are read by all


def test_reads_cover_the_parts_that_are_needed():
    left, right = ((0, 4), (0, 2)), ((0, 4), (2, 5))
    assert covering([left, right, left]) == [((0, 4), (0, 5))]
    corner = ((4, 8), (2, 5))
    assert covering([left, corner]) == [left, corner]
