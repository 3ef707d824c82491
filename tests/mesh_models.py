"""Models, methods and a batch for `mesh_checks`, on meshes of eight devices.

Axis letters: P virtual tokens.
"""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from conftest import FAMILIES_GOLDEN, batch_of, example_of
from flax import nnx

from softprompt.backbones import decoder, t5
from softprompt.backbones.batch import Batch
from softprompt.backbones.config import architecture_of
from softprompt.methods.dept import DecomposedPrompt
from softprompt.methods.full import FullFineTuning
from softprompt.methods.lora import LoRA, find_targets, initial_matrices
from softprompt.methods.prefix_tuning import PrefixTuning
from softprompt.methods.soft_prompt import SoftPrompt
from softprompt.parallel.mesh import ROWS, axis_size, make_mesh
from softprompt.parallel.sharding import place

# The sizes, and their parts on each mesh, differ from each other. A shape in a compiled program
# therefore says what the array is.
SIZES = {
    "vocab_size": 264,
    "hidden_size": 24,
    "intermediate_size": 88,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 10,
    "sliding_window": 9,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama-biased", SIZES),
    "gemma3": ("gemma3_text-pattern", SIZES),
    "qwen3_moe": ("qwen3_moe-normed", SIZES | {"moe_intermediate_size": 104}),
    "gpt_neox": ("gpt_neox-quarter", SIZES | {"hidden_size": 96}),
    "t5": ("t5-gated", {"vocab_size": 264, "d_model": 24, "d_ff": 88, "num_heads": 12, "d_kv": 10}),
}
INT4_SIZES = {"hidden_size": 64, "intermediate_size": 320, "head_dim": 16}  # whole groups of 32
INT4_FAMILIES = {
    "llama_int4": ("llama-biased", SIZES | INT4_SIZES),
    "qwen3_moe_int4": ("qwen3_moe-normed", SIZES | INT4_SIZES | {"moe_intermediate_size": 320}),
    "t5_int4": (
        "t5-gated",
        {"vocab_size": 264, "d_model": 64, "d_ff": 320, "num_heads": 12, "d_kv": 16},
    ),
}
MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "model": {"model": 4},  # as many as there are key-value heads
    "all": {"data": 2, "fsdp": 2, "model": 2},
}
LAYERS = 3, 2  # of all families, and of the decoder of t5
VIRTUAL, COUNT, END = 5, 6, 1  # P, the number of generated tokens, and an id that ends a text


@functools.cache
def backbone_of(family: str, mesh: str | None, dtype: str = "float32", quantize: str | None = None):
    """Return a backbone with random weights. They do not depend on the mesh."""
    variant, changes = (FAMILIES | INT4_FAMILIES)[family]
    config = json.loads((FAMILIES_GOLDEN / variant / "config.json").read_text()) | changes
    names = set() if config.get("tie_word_embeddings") else {"lm_head.weight"}
    arch, devices = architecture_of(config, names), mesh_of(mesh)
    kind: Any = t5.T5 if isinstance(arch, t5.T5Architecture) else decoder.Decoder
    graphdef, state = nnx.split(nnx.eval_shape(lambda: kind(arch, quantize=quantize, mesh=devices)))
    random = np.random.default_rng(0)

    def values(path, parameter):
        name = jax.tree_util.keystr(path)
        if parameter.dtype == jnp.int8:
            return random.integers(-127, 128, parameter.shape).astype(np.int8)
        if parameter.dtype == jnp.uint8:
            return random.integers(0, 256, parameter.shape).astype(np.uint8)
        drawn = random.normal(size=parameter.shape) * 0.2
        if "norm" in name and "scale" in name:
            return (1 + drawn).astype(np.float32)
        if parameter.dtype == jnp.float16:
            return (drawn / 20).astype(np.float16)
        return jnp.asarray(abs(drawn) / 100 if "scale" in name else drawn, dtype)

    state = jax.tree_util.tree_map_with_path(values, state)
    return nnx.merge(graphdef, place(jax.tree.map(jnp.asarray, state), devices))


def mesh_of(name: str | None):
    return None if name is None else make_mesh(MESHES[name])


@functools.cache
def examples():
    """Return eight examples with two candidates each."""
    random = np.random.default_rng(1)

    def tokens(count):
        return random.integers(3, 260, count).tolist()

    return [
        example_of(tokens(length), [tokens(4), tokens(3)], 0)
        for length in (11, 9, 11, 4, 7, 11, 10, 8)
    ]


@functools.cache
def batch_on(separate_targets: bool, mesh: str | None, passes: int = 1, weighted: bool = False):
    """Return a batch of `examples` with as many packs as the mesh and the passes need."""
    packs = passes * (1 if mesh is None else axis_size(mesh_of(mesh), ROWS))
    batch = batch_of(examples(), separate_targets, packs)
    if not weighted:
        return batch
    weights = np.zeros(batch.lengths.shape, np.float32)
    of_packs = np.zeros((packs, weights.shape[1] - 1), np.float32)
    of_packs.flat[:8] = [1, 2, 0.5, 0, 3, 1, 1, 0.25]
    weights[:, :-1] = of_packs  # the last row of a pack is padding
    return dataclasses.replace(batch, weights=weights)


def with_top_tokens(batch: Batch, vocabulary: int) -> Batch:
    """Return a batch with three likely tokens at each target, which depend on the target."""
    ids = (batch.targets[..., None] + np.arange(3)) % vocabulary
    shares = np.log(np.array([0.5, 0.2, 0.1, 0.2], np.float32))
    log_probabilities = np.broadcast_to(shares, (*batch.targets.shape, 4))
    return dataclasses.replace(
        batch, top_tokens=ids.astype(np.int32), top_log_probabilities=log_probabilities
    )


def inputs():
    """Return the inputs of `examples` as rows `[8, 11]`, and their lengths."""
    ids = [example.input for example in examples()]
    tokens = np.array([[*row, *[0] * (11 - len(row))] for row in ids], np.int32)
    return tokens, np.array(list(map(len, ids)))


def method_of(name: str, backbone):
    random = np.random.default_rng(2)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape) * 0.5, jnp.float32)

    size = backbone.arch.hidden_size
    if name == "prompt":
        return SoftPrompt(normal(VIRTUAL, size))
    if name == "prefix":
        shape = backbone.prefix_shape(VIRTUAL)
        return PrefixTuning(normal(*shape), normal(*shape))
    if name == "dept":
        opening = ~jnp.arange(VIRTUAL)
        return DecomposedPrompt(normal(VIRTUAL, size), normal(9, 2), normal(2, size), opening)
    if name == "lora":
        paths = find_targets(backbone, ["*"])
        matrices = initial_matrices(backbone, paths, 2, jax.random.key(0))
        matrices = {path: (down, normal(*up.shape)) for path, (down, up) in matrices.items()}
        return LoRA(matrices, dict.fromkeys(paths, 0.5))
    return FullFineTuning()
