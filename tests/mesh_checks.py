"""Tests that need eight devices. `test_mesh` runs this file in a process with eight virtual ones.

The environment variable ALL_MESHES=1 adds every combination of family, mesh and method.

Axis letters: B batch, T tokens, P virtual tokens, D hidden, M target positions, V vocabulary,
H heads, K key-value heads, h head size.
"""

import dataclasses
import functools
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import FAMILIES_GOLDEN, example_of, greedy
from flax import nnx
from programs import Program

from softprompt.backbones import decoder, t5
from softprompt.backbones.config import architecture_of
from softprompt.backbones.prefix import Prefix
from softprompt.data.batches import Layout
from softprompt.evaluation.scoring import candidate_scores, prepare_model
from softprompt.experiment.schema import GenerationSettings
from softprompt.generation import beams, decoding
from softprompt.generation.sampling import Sampling
from softprompt.methods.dept import DecomposedPrompt
from softprompt.methods.full import FullFineTuning
from softprompt.methods.lora import LoRA, find_targets, initial_matrices
from softprompt.methods.prefix_tuning import PrefixTuning
from softprompt.methods.soft_prompt import SoftPrompt
from softprompt.objectives.cross_entropy import cross_entropy
from softprompt.parallel.mesh import axis_size, make_mesh
from softprompt.parallel.sharding import axes_of, place
from softprompt.training.step import split, train_step

# The sizes, and their parts on each mesh, differ from each other. A shape in a compiled program
# therefore says what the array is.
SIZES = {
    "vocab_size": 264,
    "hidden_size": 24,
    "intermediate_size": 56,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 10,
    "sliding_window": 9,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama-biased", SIZES),
    "gemma3": ("gemma3_text-pattern", SIZES),
    "qwen3_moe": ("qwen3_moe-normed", SIZES | {"moe_intermediate_size": 28}),
    "gpt_neox": ("gpt_neox-quarter", SIZES | {"hidden_size": 96}),
    "t5": ("t5-gated", {"vocab_size": 264, "d_model": 24, "d_ff": 56, "num_heads": 12, "d_kv": 10}),
}
MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "model": {"model": 4},  # as many as there are key-value heads
    "all": {"data": 2, "fsdp": 2, "model": 2},
}
METHODS = ["prefix", "lora", "dept", "full"]
VIRTUAL, COUNT, END = 5, 6, 1  # P, the number of generated tokens, and an id that ends a text

EVERYTHING = bool(os.environ.get("ALL_MESHES"))
FAMILIES_ON_MESHES = [
    (family, mesh)
    for family in FAMILIES
    for mesh in MESHES
    if EVERYTHING or family == "llama" or mesh == "all"
]


@functools.cache
def backbone_of(family: str, mesh: str | None, dtype: str = "float32", int8: bool = False):
    """Return a backbone with random weights. They do not depend on the mesh."""
    variant, changes = FAMILIES[family]
    config = json.loads((FAMILIES_GOLDEN / variant / "config.json").read_text()) | changes
    names = set() if config.get("tie_word_embeddings") else {"lm_head.weight"}
    arch, devices = architecture_of(config, names), mesh_of(mesh)
    kind: Any = t5.T5 if isinstance(arch, t5.T5Architecture) else decoder.Decoder
    graphdef, state = nnx.split(nnx.eval_shape(lambda: kind(arch, int8=int8, mesh=devices)))
    random = np.random.default_rng(0)

    def values(path, parameter):
        name = jax.tree_util.keystr(path)
        if parameter.dtype == jnp.int8:
            return random.integers(-127, 128, parameter.shape).astype(np.int8)
        drawn = random.normal(size=parameter.shape) * 0.2
        if "norm" in name and "scale" in name:
            return (1 + drawn).astype(np.float32)
        return jnp.asarray(abs(drawn) / 100 if "scale" in name else drawn, dtype)

    state = jax.tree_util.tree_map_with_path(values, state)
    return nnx.merge(graphdef, place(jax.tree.map(jnp.asarray, state), devices))


def mesh_of(name: str | None):
    return None if name is None else make_mesh(MESHES[name])


@functools.cache
def batch_of(separate_targets: bool):
    """Return a batch of eight rows with two candidates each."""
    random = np.random.default_rng(1)

    def tokens(count):
        return random.integers(3, 260, count).tolist()

    examples = [
        example_of(tokens(length), [tokens(4), tokens(3)], 0)
        for length in (11, 9, 11, 4, 7, 11, 10, 8)
    ]
    return Layout.of(examples, separate_targets).batch(examples, 8)


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


# Updates nothing. The gradient becomes the state of the optimizer.
RECORDER = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradient, _, params: (jax.tree.map(jnp.zeros_like, gradient), gradient),
)


@dataclasses.dataclass
class Step:
    """A training step: its loss, the gradient of each array, and the compiled program."""

    loss: float
    gradient: list[np.ndarray]
    program: Program


@functools.cache
def step_of(family: str, mesh: str | None, method: str = "prompt", accumulate=1, **compute) -> Step:
    backbone = backbone_of(family, mesh, **compute)
    graphdef, trainable, frozen = split(method_of(method, backbone), backbone)
    trainable = jax.tree.map(jnp.copy, place(trainable, backbone.mesh))  # it is donated
    arguments = (
        trainable,
        place(RECORDER.init(trainable), backbone.mesh),
        frozen,
        batch_of(backbone.separate_targets),
        jax.random.key(0),
    )
    static = {"graphdef": graphdef, "optimizer": RECORDER, "objective": cross_entropy}
    compiled = train_step.lower(*arguments, **static, accumulate=accumulate).compile()
    new, gradient, measured = compiled(*arguments)
    for array in jax.tree.leaves(new) if mesh else ():  # what is learned stays as it was placed
        assert array.sharding.is_fully_replicated or method == "full"
    gradient = [np.asarray(array, np.float32) for array in jax.tree.leaves(gradient)]
    return Step(float(measured["loss"]), gradient, Program.of(compiled))


def assert_equal_steps(step: Step, expected: Step, tolerance: float = 1e-5) -> None:
    """Loss and gradient are equal, relative to the largest element of each array."""
    assert expected.loss > 0
    assert abs(step.loss - expected.loss) <= tolerance * expected.loss
    for gradient, wanted in zip(step.gradient, expected.gradient, strict=True):
        largest = abs(wanted).max()
        assert largest > 0
        assert abs(gradient - wanted).max() <= tolerance * largest


@pytest.mark.parametrize(("family", "mesh"), FAMILIES_ON_MESHES)
def test_loss_and_gradient_are_those_of_one_device(family, mesh):
    assert_equal_steps(step_of(family, mesh), step_of(family, None))


@pytest.mark.parametrize(("family", "mesh"), FAMILIES_ON_MESHES)
def test_a_step_holds_no_whole_weight_and_moves_little(family, mesh):
    backbone, program = backbone_of(family, mesh), step_of(family, mesh).program
    batch = batch_of(backbone.separate_targets)
    assert_weights_stay_divided(program, backbone)
    size, (rows, length) = backbone.arch.hidden_size, batch.tokens.shape
    if mesh == "data":  # the gradient, the loss and its weight, once
        (moved,) = program.collectives
        assert moved.elements == VIRTUAL * size + 2
        return
    rows //= axis_size(backbone.mesh, "data")
    activations = rows * (length + VIRTUAL * backbone.separate_targets) * size
    for moved in program.collectives:
        if moved.opcode == "all-gather" and moved.in_inner_loop:
            assert moved.shapes <= gathered_weights(backbone)  # one layer's
        else:
            assert moved.largest <= activations


def assert_weights_stay_divided(program: Program, backbone) -> None:
    """No array of a program is a divided matrix in one piece, in or outside of a loop.

    The matrices that `fsdp` divides are gathered only inside the loops over layers.
    """
    whole = {
        tuple(sorted(parameter.shape[first:]))
        for parameter, axes in matrices_of(backbone)
        for first in range(parameter.ndim - 1)  # with and without layers and experts in front
        if axis_size(backbone.mesh, [a for each in axes for a in flat(each) if a == "model"]) > 1
        or (first == 0 and parameter.addressable_shards[0].data.shape != parameter.shape)
    }
    assert whole or axis_size(backbone.mesh, ("fsdp", "model")) == 1
    assert not program.shapes & whole
    gathered = {shape for shape in gathered_weights(backbone) if len(shape) > 1}
    assert not program.shapes_outside_inner_loops & gathered


def gathered_weights(backbone) -> set[tuple[int, ...]]:
    """Return the shapes of one layer's weights after they are gathered over `fsdp`."""
    shapes = set()
    for parameter, axes in matrices_of(backbone, everything=True):
        if "fsdp" in axes:
            shape = [
                size // axis_size(backbone.mesh, [a for a in flat(each) if a == "model"])
                for size, each in zip(parameter.shape[1:], axes[1:], strict=True)
            ]
            shapes.add(tuple(sorted(shape)))
    return shapes if axis_size(backbone.mesh, "fsdp") > 1 else set()


def matrices_of(backbone, everything: bool = False):
    """Yield the matrices that the mesh divides, and the axes that divide them."""
    for path, parameter in nnx.to_flat_state(nnx.state(backbone, nnx.Param)):
        axes = axes_of(".".join(map(str, path)), parameter.ndim)
        is_matrix = path[-1] in ("kernel", "table")
        if any(axes) and (is_matrix or (everything and parameter.ndim > 1)):
            yield parameter[...], axes


def flat(axes):
    return [axes] if isinstance(axes, str) else axes or []


@pytest.mark.parametrize("family", FAMILIES if EVERYTHING else ["llama", "t5"])
@pytest.mark.parametrize("mesh", MESHES if EVERYTHING else ["all"])
def test_scores_and_generated_tokens_are_those_of_one_device(family, mesh):
    scores, tokens = answers(family, mesh)
    expected_scores, expected_tokens = answers(family, None)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5)
    assert (scores.argmax(axis=1) == expected_scores.argmax(axis=1)).all()
    assert len(np.unique(expected_tokens)) > 8
    np.testing.assert_array_equal(tokens, expected_tokens)


@functools.cache
def answers(family: str, mesh: str | None):
    """Return the scores of candidates `[B, 2]`, and greedily decoded tokens `[B, COUNT]`."""
    backbone = backbone_of(family, mesh)
    batch = batch_of(backbone.separate_targets)
    adapted, prefix = prepare_model(method_of("prompt", backbone), backbone)
    scores = candidate_scores(adapted, prefix, batch, 2)
    lengths = np.minimum(batch.lengths, 11)
    tokens = greedy(backbone, prefix, batch.tokens[:, :11], lengths, END, count=COUNT)
    return np.asarray(scores), tokens


@pytest.mark.parametrize("family", FAMILIES if EVERYTHING else ["llama"])
def test_decoding_keeps_the_cache_divided(family):
    backbone = backbone_of(family, "all")
    batch = batch_of(backbone.separate_targets)
    _, prefix = prepare_model(method_of("prompt", backbone), backbone)
    state = decoding.start(*decoding_arguments(backbone, prefix, batch.tokens), capacity=COUNT)
    _, rows, _, heads, _ = state.cache.keys.shape
    assert state.cache.keys.sharding.shard_shape(state.cache.keys.shape)[1:4:2] == (
        rows // 4,
        heads // 2,
    )
    arguments = backbone, prefix, state, np.full(rows, COUNT)
    program = Program.of(decoding.continue_decoding.lower(*arguments).compile())
    assert_weights_stay_divided(program, backbone)
    for moved in program.collectives:
        if moved.opcode == "all-gather" and moved.in_inner_loop:
            assert moved.shapes <= gathered_weights(backbone)
        else:  # hidden states of one token in each row
            assert moved.largest <= rows // 2 * backbone.arch.hidden_size


def decoding_arguments(backbone, prefix, tokens):
    rows, length = tokens.shape
    sampling = Sampling.from_settings(GenerationSettings(), rows)
    lengths, seeds = np.full(rows, length), np.zeros(rows, np.uint32)
    return backbone, prefix, tokens, lengths, seeds, None, sampling, np.full((rows, 1), END)


def test_three_rows_with_prompts_of_their_own_on_a_mesh_that_does_not_divide_them():
    def tokens(mesh):
        backbone = backbone_of("llama", mesh)
        prefixes = [
            prepare_model(SoftPrompt(method_of("prompt", backbone).vectors[...][:n]), backbone)[1]
            for n in (VIRTUAL, 2)
        ]
        prefix = Prefix.packed(prefixes, [1, None, 0])
        batch = batch_of(False)
        rows = batch.tokens[:3, :11], np.minimum(batch.lengths[:3], 11)
        return greedy(backbone, prefix, *rows, END, count=COUNT)

    np.testing.assert_array_equal(tokens("all"), tokens(None))


@pytest.mark.parametrize("family", ["llama", "t5"] if EVERYTHING else ["llama"])
def test_beam_search_finds_the_texts_of_one_device_and_keeps_the_cache_divided(family):
    def search(mesh):
        backbone = backbone_of(family, mesh)
        tokens = batch_of(backbone.separate_targets).tokens[:, :11]
        rows, length = tokens.shape
        one = np.float32(1)
        rest = np.ones(rows * 2, np.float32), np.full((rows, 1), END), one, np.array(COUNT)
        lengths = np.full(rows, length)
        state = beams.start(backbone, None, tokens, lengths, None, *rest, capacity=COUNT, beams=2)
        compiled = beams.continue_search.lower(backbone, None, state, *rest).compile()
        return compiled(backbone, None, state, *rest).finished, Program.of(compiled)

    (expected, _), (texts, program) = search(None), search("all")
    np.testing.assert_array_equal(texts.tokens, expected.tokens)
    np.testing.assert_allclose(texts.scores, expected.scores, rtol=1e-5)
    logits = 8 // 4 * 2 * 264  # of the two beams of a device's rows
    assert max(moved.largest for moved in program.collectives) <= logits


@pytest.mark.parametrize("method", METHODS if EVERYTHING else ["full"])
@pytest.mark.parametrize("family", FAMILIES if EVERYTHING else ["llama"])
def test_other_methods_learn_the_same(family, method):
    step, expected = (step_of(family, mesh, method, accumulate=2) for mesh in ("all", None))
    assert_equal_steps(step, expected)
    assert_weights_stay_divided(step.program, backbone_of(family, "all"))


@pytest.mark.parametrize("mesh", MESHES if EVERYTHING else [])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("compute", "tolerance"), [({"int8": True}, 1e-5), ({"dtype": "bfloat16"}, 0.05)], ids=str
)
def test_other_types_of_weights_learn_the_same(family, mesh, compute, tolerance):
    expected = step_of(family, None, **compute)
    assert_equal_steps(step_of(family, mesh, **compute), expected, tolerance)
