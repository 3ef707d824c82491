"""LoRA: initial matrices, merging, dropout, and patterns of targets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import batch_of, example_of, golden_backbone

from softprompt import Base, UserError, load_experiment
from softprompt.experiment.schema import ComputeSettings
from softprompt.methods.lora import LoRA, find_targets, initial_matrices


def lora_of(base, patterns=("*",), dropout=0.0):
    """Return a LoRA of rank 2 whose matrices are all random."""
    paths = find_targets(base.backbone, patterns)
    matrices = initial_matrices(base.backbone, paths, 2, jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), len(paths))
    matrices = {
        path: (down, 0.3 * jax.random.normal(key, up.shape))
        for key, (path, (down, up)) in zip(keys, matrices.items(), strict=True)
    }
    return LoRA(matrices, dict.fromkeys(paths, 1.5), dropout)


def test_lora_starts_from_the_base_model(tiny, experiment_file):
    method = LoRA.build(load_experiment(experiment_file, ["method=lora"]), tiny, [])
    tokens = tiny.tokenizer("hello", add_special_tokens=False).input_ids
    rows = tiny.backbone.embedding(jnp.array([tokens]))
    np.testing.assert_array_equal(method.adapt(tiny.backbone)(rows), tiny.backbone(rows))
    assert sorted(method.matrices) == ["layers.attention.query", "layers.attention.value"]


@pytest.mark.parametrize("variant", ["llama-biased", "gpt2-inner", "t5-gated", "qwen3_moe-normed"])
def test_merged_matrices_give_the_same_states_as_separate_ones(variant):
    base = Base(variant, "", {}, golden_backbone(variant), None, ComputeSettings())
    method = lora_of(base)
    before = [np.array(leaf) for leaf in jax.tree.leaves(base.backbone)]
    examples = [example_of([5, 6, 7], [[8, 9]], 0)]
    batch = batch_of(examples, base.backbone.separate_targets)

    @jax.jit
    def states(backbone):
        return backbone.target_states(batch, None)

    separate, merged = states(method.adapt(base.backbone)), states(method.merge(base.backbone))
    np.testing.assert_allclose(merged, separate, atol=1e-5 * float(jnp.abs(separate).max()))
    assert float(jnp.abs(merged - states(base.backbone)).max()) > 1e-2
    for one, other in zip(before, jax.tree.leaves(base.backbone), strict=True):
        np.testing.assert_array_equal(one, other)  # the given backbone is unchanged


def test_dropout_needs_a_key_and_keeps_the_mean(tiny):
    method = lora_of(tiny, ["attention.query"], dropout=0.5)
    x = jnp.ones((2000, tiny.backbone.arch.hidden_size))

    def addition(key):
        backbone = method.adapt(tiny.backbone, key)
        linear = jax.tree.map(lambda leaf: leaf[0], backbone.layers.attention.query)
        return np.asarray(linear.low_rank(x))

    plain, dropped = addition(None), addition(jax.random.key(3))
    assert (plain == plain[:1]).all()
    assert dropped.std(axis=0).min() > 0
    np.testing.assert_allclose(dropped.mean(axis=0), plain[0], atol=0.1 * np.abs(plain).max())
    assert (addition(jax.random.key(4)) != dropped).any()


def test_a_pattern_that_matches_no_matrix_is_rejected(tiny):
    with pytest.raises(UserError, match=r"lora\.targets: .* matches none of layers\.attention"):
        find_targets(tiny.backbone, ["q_proj"])
    named = find_targets(tiny.backbone, ["feed_forward.*", "value"])
    assert named == [f"layers.{n}" for n in (
        "attention.value", "feed_forward.down", "feed_forward.gate", "feed_forward.up"
    )]  # fmt: skip
