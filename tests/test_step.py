"""The training step: what it computes, what it changes and what it does not change."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import batch_of, example_of, golden_backbone
from flax import nnx

from softprompt import FullFineTuning, SoftPrompt, cross_entropy
from softprompt.backbones.batch import target_log_probabilities
from softprompt.experiment.schema import OptimizerSettings
from softprompt.objectives.teacher import Teacher, read
from softprompt.training.optimizers import UpdateRule, hyperparameters, learning_rate
from softprompt.training.step import split, train_step

EXAMPLES = [
    example_of([5, 6, 7, 8], [[20, 21, 22]], 0),
    example_of([9, 10], [[23]], 0),
    example_of([11, 12, 13], [[24, 25]], 0),
    example_of([14], [[26, 27]], 0),
]
BATCH = batch_of(EXAMPLES)
KEY = jax.random.key(0)
VECTORS = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)


ADAMW = OptimizerSettings()


def setup(base, settings=ADAMW, steps=10):
    graphdef, trainable, frozen = split(SoftPrompt(jnp.array(VECTORS)), base.backbone)
    optimizer = UpdateRule.of(settings)
    opt_state = optimizer.init(trainable, hyperparameters(settings, steps))
    program = {"graphdef": graphdef, "optimizer": optimizer, "objective": cross_entropy}
    return trainable, opt_state, frozen, program


def one_by_one(base, vectors):
    """Mean loss per target token: each example alone, with the prompt prepended."""
    losses = []
    for example in EXAMPLES:
        tokens = jnp.array([[*example.input, *example.candidates[0]]])
        embeddings = SoftPrompt(vectors)(base.backbone.embedding(tokens))
        positions = jnp.arange(embeddings.shape[1])[None]
        hidden = base.backbone(embeddings, positions, jnp.zeros_like(positions))
        log_probabilities = jax.nn.log_softmax(base.backbone.logits(hidden))[0]
        first = len(vectors) + len(example.input) - 1
        for i, target in enumerate(example.candidates[0]):
            losses.append(-log_probabilities[first + i, target])
    return jnp.stack(losses).mean()


@pytest.fixture(scope="module")
def expected(tiny):
    """Loss and gradient at VECTORS, computed one example at a time."""
    return jax.jit(jax.value_and_grad(lambda v: one_by_one(tiny, v)))(VECTORS)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_a_step_follows_the_gradient_of_the_mean_loss_per_target_token(tiny, expected, accumulate):
    """Accumulated passes have different numbers of targets."""
    plain = OptimizerSettings(name="sgd", learning_rate=0.5, schedule="constant", clip_norm=None)
    trainable, opt_state, frozen, fixed = setup(tiny, plain)
    loss, gradient = expected
    batch = batch_of(EXAMPLES, packs=accumulate)
    after, _, measured = train_step(
        trainable, opt_state, frozen, batch, KEY, accumulate=accumulate, **fixed
    )
    np.testing.assert_allclose(measured["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(measured["gradient_norm"], jnp.linalg.norm(gradient), rtol=1e-5)
    (vectors,) = jax.tree.leaves(after)
    np.testing.assert_allclose(vectors, VECTORS - 0.5 * gradient, atol=1e-6)


def test_a_step_changes_only_the_prompt(tiny):
    trainable, opt_state, frozen, fixed = setup(tiny)
    before = [np.array(leaf).tobytes() for leaf in jax.tree.leaves(frozen)]
    for _ in range(3):
        trainable, opt_state, _ = train_step(trainable, opt_state, frozen, BATCH, KEY, **fixed)
    assert [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(frozen)] == before
    (vectors,) = jax.tree.leaves(trainable)
    assert vectors.shape == VECTORS.shape
    assert np.abs(vectors - VECTORS).min() > 0


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd", "lion"])
def test_every_optimizer_lowers_the_loss_and_keeps_state_only_for_the_prompt(tiny, name):
    rate = 1.0 if name == "sgd" else 0.1
    settings = OptimizerSettings(name=name, learning_rate=rate, weight_decay=1e-4)
    trainable, opt_state, frozen, fixed = setup(tiny, settings, 30)
    shapes = {leaf.shape for leaf in jax.tree.leaves(opt_state)}
    assert shapes <= {VECTORS.shape, (), (1,)}
    losses = []
    for _ in range(30):
        trainable, opt_state, measured = train_step(
            trainable, opt_state, frozen, BATCH, KEY, **fixed
        )
        losses.append(float(measured["loss"]))
    assert losses[-1] < losses[0] - 1


def test_the_base_model_is_an_argument_of_the_compiled_program(tiny):
    trainable, opt_state, frozen, fixed = setup(tiny)
    lowered = train_step.lower(trainable, opt_state, frozen, BATCH, KEY, **fixed)
    arguments = lowered.as_text().split("func.func public @main(")[1].split("->")[0]
    assert "tensor<259x32xf32>" in arguments
    assert "tensor<3x32x50xf32>" in arguments
    constants = [line for line in lowered.as_text().splitlines() if "stablehlo.constant" in line]
    assert not any("259x32" in line or "3x32x50" in line for line in constants)


def test_logits_are_computed_at_target_positions_only(tiny):
    trainable, opt_state, frozen, fixed = setup(tiny)
    program = train_step.lower(trainable, opt_state, frozen, BATCH, KEY, **fixed).as_text()
    targets, tokens = BATCH.targets.size, BATCH.tokens.size
    assert f"tensor<1x{targets}x259xf32>" in program
    assert f"tensor<1x{tokens}x259xf32>" not in program


def test_each_batch_shape_is_compiled_once(tiny):
    trainable, opt_state, frozen, fixed = setup(tiny)
    before = train_step._cache_size()
    for _ in range(3):
        for padding in (4, 5):
            batch = batch_of(EXAMPLES, padding=padding)
            trainable, opt_state, _ = train_step(trainable, opt_state, frozen, batch, KEY, **fixed)
    assert train_step._cache_size() == before + 2


def test_candidates_in_one_row_score_the_same_as_separately(tiny):
    candidates = [[20, 21, 22], [23], [24, 25]]
    example = example_of([5, 6, 7, 8], candidates, 0)
    together = batch_of([example])
    got = np.asarray(target_log_probabilities(tiny.backbone, None, together))[0]
    alone = []
    for candidate in candidates:
        one = [example_of([5, 6, 7, 8], [candidate], 0)]
        batch = batch_of(one)
        scores = target_log_probabilities(tiny.backbone, None, batch)
        alone += np.asarray(scores)[0, : len(candidate)].tolist()
    np.testing.assert_allclose(got[: len(alone)], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_schedules_warm_up_and_decay(schedule, expected):
    warm = hyperparameters(OptimizerSettings(learning_rate=1.0, warmup_steps=2), 6)
    rates = [learning_rate(schedule, warm, i) for i in range(6)]
    np.testing.assert_allclose(rates, expected, atol=1e-6)
    assert learning_rate(schedule, hyperparameters(OptimizerSettings(learning_rate=1.0), 6), 0) == 1


def test_an_update_rule_equals_optax_with_constant_hyperparameters():
    """Ours keeps hyperparameters in the optimizer state; the reference compiles them in."""
    settings = OptimizerSettings(
        learning_rate=0.3, warmup_steps=3, weight_decay=0.05, clip_norm=0.5
    )
    schedule = optax.warmup_cosine_decay_schedule(0.1, 0.3, 2, 12)  # its warm-up skips rate 0
    schedule = optax.join_schedules([schedule, optax.cosine_decay_schedule(0.3, 9)], [3])
    reference = optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(schedule, weight_decay=0.05)
    )
    ours, theirs = jnp.array(VECTORS), jnp.array(VECTORS)
    rule, numbers = UpdateRule.of(settings), hyperparameters(settings, 12)
    state, their_state = rule.init(ours, numbers), reference.init(theirs)
    for i in range(12):
        gradient = jnp.cos(ours * (i + 1))
        updates, state = rule.update(gradient, state, ours)
        ours = optax.apply_updates(ours, updates)
        updates, their_state = reference.update(jnp.cos(theirs * (i + 1)), their_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_clipping_bounds_the_update(tiny):
    settings = OptimizerSettings(name="sgd", learning_rate=1.0, schedule="constant", clip_norm=1e-3)
    trainable, opt_state, frozen, fixed = setup(tiny, settings)
    after, _, measured = train_step(trainable, opt_state, frozen, BATCH, KEY, **fixed)
    assert measured["gradient_norm"] > 1e-2
    change = jnp.linalg.norm(jax.tree.leaves(after)[0] - VECTORS)
    np.testing.assert_allclose(change, 1e-3, rtol=1e-3)


def test_a_step_takes_any_optax_optimizer(tiny, expected):
    graphdef, trainable, frozen = split(SoftPrompt(jnp.array(VECTORS)), tiny.backbone)
    optimizer = optax.sgd(0.5)
    after, _, _ = train_step(
        trainable,
        optimizer.init(trainable),
        frozen,
        BATCH,
        KEY,
        graphdef=graphdef,
        optimizer=optimizer,
        objective=cross_entropy,
    )
    np.testing.assert_allclose(jax.tree.leaves(after)[0], VECTORS - 0.5 * expected[1], atol=1e-6)


def test_an_objective_decides_what_is_differentiated_and_logged(tiny, expected):
    """A custom objective: half of the loss, weighted by rows, with a metric."""

    def half_of_the_loss(model, batch, key):
        total, _, _ = cross_entropy(model, batch, key)
        rows = jnp.sum(batch.lengths > 0).astype(jnp.float32)
        return total / 2, rows, {"rows": rows}

    plain = OptimizerSettings(name="sgd", learning_rate=0.5, schedule="constant", clip_norm=None)
    trainable, opt_state, frozen, program = setup(tiny, plain)
    after, _, measured = train_step(
        trainable, opt_state, frozen, BATCH, KEY, **{**program, "objective": half_of_the_loss}
    )
    targets = sum(len(example.candidates[0]) for example in EXAMPLES)
    loss, gradient = expected
    np.testing.assert_allclose(measured["loss"], loss * targets / 2 / 4, rtol=1e-6)
    assert measured["rows"] == 1
    vectors = VECTORS - 0.5 * gradient * targets / 2 / 4
    np.testing.assert_allclose(jax.tree.leaves(after)[0], vectors, atol=1e-6)


def test_a_teacher_on_the_base_shares_its_arrays(tiny):
    """The frozen state holds each array of the backbone once, and the teacher's own prefix."""
    prefix = read(tiny.backbone, [5, 6, 7])
    method, teacher = SoftPrompt(jnp.array(VECTORS)), Teacher(tiny.backbone, prefix)
    alone = split(method, tiny.backbone)
    graphdef, trainable, frozen = split(method, tiny.backbone, teacher)
    own = len(jax.tree.leaves(prefix))
    assert len(jax.tree.leaves(frozen[1])) == len(jax.tree.leaves(alone[2][1])) + own
    _, backbone, merged = nnx.merge(graphdef, trainable, *frozen)
    assert merged.backbone is backbone


def test_nothing_in_a_teacher_is_trained():
    backbone = golden_backbone("gemma2-capped")
    other = nnx.clone(backbone)
    method = FullFineTuning()
    alone, whole = split(method, backbone), split(method, backbone, Teacher(other))
    assert whole[1] == alone[1]
    assert len(jax.tree.leaves(whole[2][1])) == len(jax.tree.leaves(nnx.state(other)))
