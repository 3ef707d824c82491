"""Checks of a mesh that need eight devices: `test_mesh` runs this file in a process with eight.

Axis letters: B batch, T tokens, P virtual tokens, D hidden, M target positions, V vocabulary.
"""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import FAMILIES_GOLDEN, example_of, greedy
from flax import nnx

from softprompt.backbones import decoder, t5
from softprompt.backbones.config import architecture_of
from softprompt.data.batches import TrainingBatches
from softprompt.evaluation.scoring import candidate_scores
from softprompt.methods.soft_prompt import SoftPrompt
from softprompt.objectives.cross_entropy import cross_entropy
from softprompt.parallel.mesh import make_mesh
from softprompt.parallel.sharding import place
from softprompt.training.step import split, train_step

# The sizes differ from each other and from the numbers of devices, so that a shape in a compiled
# program says what an array is.
SIZES = {
    "vocab_size": 136,
    "hidden_size": 24,
    "intermediate_size": 56,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 10,
    "sliding_window": 9,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama-biased", SIZES),
    "gemma3": ("gemma3_text-pattern", SIZES),
    "qwen3_moe": ("qwen3_moe-normed", SIZES | {"moe_intermediate_size": 28}),
    "gpt_neox": ("gpt_neox-quarter", SIZES | {"hidden_size": 64}),
    "t5": (
        "t5-gated",
        {"vocab_size": 136, "d_model": 24, "d_ff": 56, "num_heads": 8, "d_kv": 10},
    ),
}
MESHES = [{"data": 8}, {"fsdp": 8}, {"model": 4}, {"data": 2, "fsdp": 2, "model": 2}]
ROWS, VIRTUAL = 8, 5


def backbone_of(family: str, mesh=None, dtype: str = "float32", int8: bool = False):
    """Return a backbone of a family with random weights. A mesh does not change their values."""
    variant, changes = FAMILIES[family]
    config = json.loads((FAMILIES_GOLDEN / variant / "config.json").read_text()) | changes
    names = set() if config.get("tie_word_embeddings") else {"lm_head.weight"}
    arch = architecture_of(config, names)
    kind = t5.T5 if isinstance(arch, t5.T5Architecture) else decoder.Decoder
    graphdef, state = nnx.split(nnx.eval_shape(lambda: kind(arch, int8=int8, mesh=mesh)))
    random = np.random.default_rng(0)

    def values(path, shape):
        name = jax.tree_util.keystr(path)
        if shape.dtype == jnp.int8:
            return random.integers(-127, 128, shape.shape).astype(np.int8)
        drawn = random.normal(size=shape.shape) * 0.2
        if "norm" in name and "scale" in name:
            return jnp.asarray(1 + drawn, jnp.float32)
        return jnp.asarray(abs(drawn) / 100 if "scale" in name else drawn, dtype)

    return nnx.merge(graphdef, place(jax.tree_util.tree_map_with_path(values, state), mesh))


@functools.cache
def batch_of(separate_targets: bool):
    """Return a batch of `ROWS` rows with two candidates each."""
    random = np.random.default_rng(1)
    tokens = lambda count: random.integers(3, 130, count).tolist()  # noqa: E731
    examples = [
        example_of(tokens(length), [tokens(2), tokens(1)], 0)
        for length in (11, 9, 11, 4, 7, 11, 10, 8)
    ]
    from softprompt.data.batches import evaluation_batches

    batches = []
    list(
        evaluation_batches(
            examples,
            ROWS,
            lambda batch: batches.append(batch) or np.zeros((ROWS, 2)),
            separate_targets=separate_targets,
        )
    )
    return batches[0]


def prompt_of(backbone) -> SoftPrompt:
    random = np.random.default_rng(2)
    vectors = random.normal(size=(VIRTUAL, backbone.arch.hidden_size)) * 0.5
    return SoftPrompt(jnp.asarray(vectors, jnp.float32))


def measured(family, sizes):
    mesh = sizes and make_mesh(sizes)
    backbone = backbone_of(family, mesh)
    prompt = prompt_of(backbone)
    batch = batch_of(backbone.separate_targets)
    optimizer = optax.sgd(1.0)
    graphdef, trainable, frozen = split(prompt, backbone)
    trainable = place(trainable, mesh)
    before = np.array(jax.tree.leaves(trainable)[0])
    import time

    t = time.time()
    new, _, m = train_step(
        trainable,
        optimizer.init(trainable),
        frozen,
        batch,
        jax.random.key(0),
        graphdef=graphdef,
        optimizer=optimizer,
        objective=cross_entropy,
    )
    loss = float(m["loss"])
    t1 = time.time()
    gradient = before - np.array(jax.tree.leaves(new)[0])
    prompt = prompt_of(backbone)
    adapted, prefix = prompt.apply(backbone)
    t2 = time.time()
    scores = np.asarray(candidate_scores(backbone, prefix, batch, 2))
    t3 = time.time()
    tokens = greedy(
        backbone, prefix, batch.tokens[:, :11], np.minimum(batch.lengths, 11), 1, count=6
    )
    t4 = time.time()
    print(
        family,
        sizes,
        f"step {t1 - t:.2f} prefix {t2 - t1:.2f} score {t3 - t2:.2f} generate {t4 - t3:.2f}",
    )
    return loss, gradient, scores, tokens


if __name__ == "__main__":
    import sys

    for family in sys.argv[1:] or FAMILIES:
        ref = measured(family, None)
        for sizes in MESHES:
            got = measured(family, sizes)
            print("   ", *(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(got, ref)))
