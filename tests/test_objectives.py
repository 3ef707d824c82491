"""The losses: every value and gradient against plain formulas on the golden models.

The formulas are in NumPy with float64, on all logits of candidates that have a row each. TRL has
the same formulas at commit f2cd577: `sigmoid`, `ipo` and `sigmoid_norm` in
`trl/trainer/dpo_trainer.py`, and `beta=0` in `trl/experimental/gkd/gkd_trainer.py`. The formula of
label smoothing is also that of `torch.nn.CrossEntropyLoss`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import batch_of, example_of, golden_backbone
from flax import nnx

from softprompt import LoRA, SoftPrompt
from softprompt.backbones import head as head_module
from softprompt.experiment.objective_settings import ObjectiveSettings
from softprompt.experiment.schema import OptimizerSettings
from softprompt.methods.method import PromptParam
from softprompt.objectives.choice import objective_of
from softprompt.objectives.cross_entropy import CrossEntropy, cross_entropy
from softprompt.objectives.distillation import Distillation
from softprompt.objectives.model import Model
from softprompt.objectives.preference import Preference
from softprompt.objectives.teacher import Teacher, read
from softprompt.training.optimizers import UpdateRule, hyperparameters
from softprompt.training.step import split, train_step

VARIANTS = ["gemma2-capped", "qwen3-window", "t5-gated"]
TEXT = (40, 41)  # the text that every row begins with
PAIRS = [
    example_of([5, 6, 7, 8], [[20, 21, 22], [30, 31]], 0),
    example_of([9, 10], [[23], [24, 25, 26, 27]], 0),
    example_of([11, 12, 13], [[28, 29], [21, 22]], 0),
    example_of([14], [[26, 27, 20, 33, 34], [35]], 0),
]
CONTEXT = [50, 51, 52, 53, 54, 55]  # what a teacher reads first
KEY = jax.random.key(0)
BETA, SHARE, TEMPERATURE = 0.7, 0.2, 1.7


def prompt_on(backbone, seed: int = 0) -> SoftPrompt:
    """A soft prompt of three tokens, followed by the text."""
    table = np.asarray(backbone.embedding.table[...], np.float32)
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(3, table.shape[1])) * 2 * table.std()
    return SoftPrompt(jnp.asarray(vectors, jnp.float32), [~0, ~1, ~2, *TEXT])


def logits_of(backbone, prefix) -> list[list[jax.Array]]:
    """All logits `[n, V]` of the candidates of each pair, each candidate in a row of its own."""
    alone = [
        example_of(example.input, [candidate], 0)
        for example in PAIRS
        for candidate in example.candidates
    ]
    batch = batch_of(alone, backbone.separate_targets)
    logits = backbone.logits(backbone.target_states(batch, prefix))[0]
    ends = np.cumsum([len(example.candidates[0]) for example in alone])
    parts = [logits[end - len(e.candidates[0]) : end] for e, end in zip(alone, ends, strict=True)]
    return [parts[i : i + 2] for i in range(0, len(parts), 2)]


def policy_logits(method, backbone) -> list[list[jax.Array]]:
    return jax.jit(lambda method, backbone: logits_of(*method.apply(backbone)))(method, backbone)


def reference_logits(backbone) -> list[list[jax.Array]]:
    """The base model after the text alone, without virtual tokens."""

    def run(backbone):
        return logits_of(backbone, backbone.opening(backbone.embedding(jnp.array(TEXT))))

    return jax.jit(run)(backbone)


def in_small_chunks(monkeypatch) -> None:
    """Divide the targets of the batches into chunks."""
    monkeypatch.setattr(head_module, "_MAX_LOGITS", 1)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def plain_preference(loss: str, pairs, references) -> dict[str, float]:
    """The mean loss and metrics of pairs, by the formulas of TRL."""
    losses, margins, divergences = [], [], []
    for example, logits, expected in zip(PAIRS, pairs, references, strict=True):
        scores, kl, lengths = [], [], []
        for candidate, ours, theirs in zip(example.candidates, logits, expected, strict=True):
            log_p, log_q = (log_softmax(np.asarray(x, np.float64)) for x in (ours, theirs))
            each = np.arange(len(candidate)), candidate
            scores.append(log_p[each].sum() - log_q[each].sum())
            kl += (np.exp(log_p) * (log_p - log_q)).sum(axis=-1).tolist()
            lengths.append(len(candidate))
        if loss != "dpo":
            scores = [score / length for score, length in zip(scores, lengths, strict=True)]
        delta = scores[0] - scores[1]
        if loss == "ipo":
            losses.append((delta - 1 / (2 * BETA)) ** 2)
        else:
            losses.append(np.log1p(np.exp(-BETA * delta)))
        margins.append(BETA * delta)
        divergences.append(np.mean(kl))
    return {
        "loss": np.mean(losses),
        "reward_margin": np.mean(margins),
        "preference_accuracy": np.mean(np.array(margins) > 0),
        "kl": np.mean(divergences),
    }


def differentiable_preference(loss: str, pairs, references) -> jax.Array:
    """The same loss in JAX, on plain logits."""
    losses = []
    for example, logits, expected in zip(PAIRS, pairs, references, strict=True):
        scores = []
        for candidate, ours, theirs in zip(example.candidates, logits, expected, strict=True):
            ratio = jax.nn.log_softmax(ours) - jax.nn.log_softmax(theirs)
            chosen = ratio[jnp.arange(len(candidate)), jnp.array(candidate)]
            scores.append(chosen.sum() if loss == "dpo" else chosen.mean())
        delta = scores[0] - scores[1]
        losses.append(
            (delta - 1 / (2 * BETA)) ** 2 if loss == "ipo" else jnp.logaddexp(0, -BETA * delta)
        )
    return jnp.stack(losses).mean()


def measured(objective, method, backbone, batch, teacher=None) -> dict[str, float]:
    total, weight, metrics = jax.jit(lambda *parts: objective(Model(*parts), batch, KEY))(
        method, backbone, teacher
    )
    return {name: float(x / weight) for name, x in {"loss": total, **metrics}.items()}


def gradient(function, method) -> list[np.ndarray]:
    """The gradient of a function of a method with respect to what the method learns."""
    graphdef, learned, rest = nnx.split(method, type(method).trainable, ...)
    found = jax.jit(jax.grad(lambda learned: function(nnx.merge(graphdef, learned, rest))))(learned)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(found)]


def require_same_gradient(ours, theirs) -> None:
    assert max(np.abs(leaf).max() for leaf in theirs) > 1e-3
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * max(1, np.abs(other).max()))


def mean_loss(objective, backbone, batch, teacher=None):
    def loss(method):
        total, weight, _ = objective(Model(method, backbone, teacher), batch, KEY)
        return total / weight

    return loss


@pytest.mark.parametrize("variant", VARIANTS)
def test_preference_losses_and_metrics_match_the_formulas(variant, monkeypatch):
    in_small_chunks(monkeypatch)
    backbone = golden_backbone(variant)
    method, batch = prompt_on(backbone), batch_of(PAIRS, backbone.separate_targets)
    pairs, references = policy_logits(method, backbone), reference_logits(backbone)
    for loss in ("dpo", "ipo", "normalized"):
        expected = plain_preference(loss, pairs, references)
        found = measured(Preference(loss, BETA, TEXT), method, backbone, batch)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("variant", ["gemma2-capped", "t5-gated"])
@pytest.mark.parametrize("loss", ["dpo", "ipo", "normalized"])
def test_gradients_of_preference_losses_match_those_of_plain_logits(variant, loss, monkeypatch):
    in_small_chunks(monkeypatch)
    backbone = golden_backbone(variant)
    method, batch = prompt_on(backbone), batch_of(PAIRS, backbone.separate_targets)
    references = reference_logits(backbone)

    def plain(method):
        pairs = logits_of(*method.apply(backbone))
        return differentiable_preference(loss, pairs, references)

    ours = gradient(mean_loss(Preference(loss, BETA, TEXT), backbone, batch), method)
    require_same_gradient(ours, gradient(plain, method))


def test_the_reference_of_lora_has_no_additions(tiny, experiment):
    """When LoRA begins, the log-ratios are 0 and the loss of DPO is log 2."""
    method = LoRA.build(experiment, tiny, TEXT)
    batch, objective = batch_of(PAIRS), Preference("dpo", BETA, TEXT)
    found = measured(objective, method, tiny.backbone, batch)
    assert found == pytest.approx(
        {"loss": np.log(2), "reward_margin": 0, "preference_accuracy": 0, "kl": 0}, abs=1e-5
    )
    graphdef, learned, rest = nnx.split(method, LoRA.trainable, ...)
    changed = nnx.merge(graphdef, jax.tree.map(lambda x: x + 0.1, learned), rest)
    found = measured(objective, changed, tiny.backbone, batch)
    assert found["kl"] > 1e-3
    assert found["loss"] != pytest.approx(np.log(2), abs=1e-3)


def plain_smoothed(pairs, weights) -> tuple[float, float]:
    """The mean smoothed and plain cross-entropy of all targets."""
    smoothed, plain, counted = [], [], []
    for example, logits, weight in zip(PAIRS, pairs, weights, strict=True):
        for candidate, each in zip(example.candidates, logits, strict=True):
            log_p = log_softmax(np.asarray(each, np.float64))
            target = np.eye(log_p.shape[-1])[candidate]
            wanted = (1 - SHARE) * target + SHARE / log_p.shape[-1]
            smoothed += (-wanted * log_p).sum(axis=-1).tolist()
            plain += (-target * log_p).sum(axis=-1).tolist()
            counted += [weight] * len(candidate)
    return np.average(smoothed, weights=counted), np.average(plain, weights=counted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_smoothed_and_weighted_losses_match_the_formulas(variant, monkeypatch):
    in_small_chunks(monkeypatch)
    backbone = golden_backbone(variant)
    method, batch = prompt_on(backbone), batch_of(PAIRS, backbone.separate_targets)
    pairs = policy_logits(method, backbone)
    for weights in ([1, 1, 1, 1], [0.5, 0, 2, 1.25]):
        smoothed, plain = plain_smoothed(pairs, weights)
        weighted = with_weights(batch, weights)
        found = measured(CrossEntropy(SHARE), method, backbone, weighted)
        expected = {"loss": smoothed, "cross_entropy": plain}
        assert found == pytest.approx(expected, rel=1e-5)
        found = measured(CrossEntropy(), method, backbone, weighted)
        assert found == pytest.approx({"loss": plain}, rel=1e-5)


def with_weights(batch, weights):
    row_weights = np.zeros(batch.lengths.shape, np.float32)
    row_weights[0, : len(weights)] = weights
    return dataclasses.replace(batch, weights=row_weights)


def test_the_gradient_of_the_smoothed_loss_matches_that_of_plain_logits(monkeypatch):
    in_small_chunks(monkeypatch)
    backbone, weights = golden_backbone("gemma2-capped"), [0.5, 0, 2, 1.25]
    method, batch = prompt_on(backbone), with_weights(batch_of(PAIRS), weights)

    def plain(method):
        total, count, pairs = 0.0, 0.0, logits_of(*method.apply(backbone))
        for example, weight, pair in zip(PAIRS, weights, pairs, strict=True):
            for candidate, logits in zip(example.candidates, pair, strict=True):
                log_p = jax.nn.log_softmax(logits)
                target = log_p[jnp.arange(len(candidate)), jnp.array(candidate)]
                losses = -(1 - SHARE) * target - SHARE * log_p.mean(axis=-1)
                total, count = total + weight * losses.sum(), count + weight * len(candidate)
        return total / count

    ours = gradient(mean_loss(CrossEntropy(SHARE), backbone, batch), method)
    require_same_gradient(ours, gradient(plain, method))


def test_a_row_of_weight_2_counts_as_two_rows(tiny):
    method = prompt_on(tiny.backbone)
    twice = batch_of([PAIRS[0], PAIRS[1], PAIRS[1], PAIRS[3]])
    weighted = with_weights(batch_of(PAIRS), [1, 2, 0, 1])
    once = measured(cross_entropy, method, tiny.backbone, twice)
    assert measured(cross_entropy, method, tiny.backbone, weighted) == pytest.approx(once, rel=1e-6)


def test_a_batch_of_weight_0_has_no_loss_and_no_gradient(tiny):
    method, batch = prompt_on(tiny.backbone), with_weights(batch_of(PAIRS), [0, 0, 0, 0])
    assert measured(CrossEntropy(SHARE), method, tiny.backbone, batch)["loss"] == 0
    found = gradient(mean_loss(CrossEntropy(SHARE), tiny.backbone, batch), method)
    assert all(not leaf.any() for leaf in found)


def teacher_on(backbone) -> Teacher:
    """A teacher that reads a text before the text that every row begins with."""
    return Teacher(backbone, read(backbone, [*CONTEXT, *TEXT]))


def plain_distillation(students, teachers) -> tuple[float, float]:
    losses, agreement = [], []
    for ours, theirs in zip(students, teachers, strict=True):
        for logits, expected in zip(ours, theirs, strict=True):
            logits, expected = np.asarray(logits, np.float64), np.asarray(expected, np.float64)
            log_p, log_q = log_softmax(expected / TEMPERATURE), log_softmax(logits / TEMPERATURE)
            losses += (np.exp(log_p) * (log_p - log_q)).sum(axis=-1).tolist()
            agreement += (logits.argmax(axis=-1) == expected.argmax(axis=-1)).tolist()
    return np.mean(losses), np.mean(agreement)


@pytest.mark.parametrize("variant", VARIANTS)
def test_distillation_matches_the_formula(variant, monkeypatch):
    in_small_chunks(monkeypatch)
    backbone = golden_backbone(variant)
    method, teacher = prompt_on(backbone), teacher_on(backbone)
    batch = batch_of(PAIRS, backbone.separate_targets)
    students = policy_logits(method, backbone)
    teachers = jax.jit(logits_of)(backbone, teacher.prefix)
    loss, agreement = plain_distillation(students, teachers)
    found = measured(Distillation(TEMPERATURE), method, backbone, batch, teacher)
    assert found == pytest.approx({"loss": loss, "agreement": agreement}, rel=1e-5)


@pytest.mark.parametrize("variant", ["gemma2-capped", "t5-gated"])
def test_the_gradient_of_distillation_matches_that_of_plain_logits(variant, monkeypatch):
    in_small_chunks(monkeypatch)
    backbone = golden_backbone(variant)
    method, teacher = prompt_on(backbone), teacher_on(backbone)
    batch = batch_of(PAIRS, backbone.separate_targets)
    teachers = jax.jit(logits_of)(backbone, teacher.prefix)

    def plain(method):
        losses = []
        for pair, expected in zip(logits_of(*method.apply(backbone)), teachers, strict=True):
            for logits, other in zip(pair, expected, strict=True):
                log_p = jax.nn.log_softmax(other / TEMPERATURE)
                log_q = jax.nn.log_softmax(logits / TEMPERATURE)
                losses.append((jnp.exp(log_p) * (log_p - log_q)).sum(axis=-1))
        return jnp.concatenate(losses).mean()

    ours = gradient(mean_loss(Distillation(TEMPERATURE), backbone, batch, teacher), method)
    require_same_gradient(ours, gradient(plain, method))


@pytest.mark.parametrize(
    "objective",
    [CrossEntropy(SHARE), Preference("ipo", BETA, TEXT), Distillation(TEMPERATURE)],
    ids=["cross_entropy", "preference", "distill"],
)
def test_accumulated_passes_and_finite_differences_agree_with_the_gradient(tiny, objective):
    backbone = tiny.backbone
    method, teacher = prompt_on(backbone), teacher_on(backbone)
    before = np.asarray(method.vectors[...])
    graphdef, trainable, frozen = split(method, backbone, teacher)
    settings = OptimizerSettings(name="sgd", learning_rate=1.0, schedule="constant", clip_norm=None)
    rule = UpdateRule.of(settings)
    changes, losses = [], []
    for passes in (1, 2):
        weights = [[1, 2, 0.5, 1, 0]] if passes == 1 else [[1, 2, 0], [0.5, 1, 0]]
        batch = batch_of(PAIRS, packs=passes)
        batch = dataclasses.replace(batch, weights=np.array(weights, np.float32))
        state = rule.init(trainable, hyperparameters(settings, 10))
        arrays = jax.tree.map(jnp.copy, (trainable, state))
        after, _, results = train_step(
            *arrays,
            frozen,
            batch,
            KEY,
            graphdef=graphdef,
            optimizer=rule,
            objective=objective,
            accumulate=passes,
        )
        changes.append(before - np.asarray(jax.tree.leaves(after)[0]))
        losses.append(float(results["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    np.testing.assert_allclose(changes[0], changes[1], rtol=1e-5, atol=1e-4)

    direction = np.random.default_rng(1).normal(size=before.shape).astype(np.float32)
    batch = with_weights(batch_of(PAIRS), [1, 2, 0.5, 1])
    loss = jax.jit(mean_loss(objective, backbone, batch, teacher))

    def at(step):
        moved = SoftPrompt(jnp.asarray(before + step * direction), method.opening[...])
        return float(loss(moved))

    step = 3e-3
    slope = (at(step) - at(-step)) / (2 * step)
    assert slope == pytest.approx(float((changes[0] * direction).sum()), rel=2e-2, abs=2e-3)


@pytest.mark.parametrize(
    "objective",
    [CrossEntropy(SHARE), Preference("dpo", BETA, TEXT), Distillation(TEMPERATURE)],
    ids=["cross_entropy", "preference", "distill"],
)
def test_no_array_holds_the_logits_of_all_targets(tiny, objective, monkeypatch):
    monkeypatch.setattr(head_module, "_MAX_LOGITS", 8 * 259)
    method, teacher = prompt_on(tiny.backbone), teacher_on(tiny.backbone)
    batch = batch_of([example_of([5, 6], [[7] * 20, [8] * 11], 0) for _ in range(2)])
    loss = mean_loss(objective, tiny.backbone, batch, teacher)
    program = jax.jit(nnx.grad(loss, argnums=nnx.DiffState(0, PromptParam))).lower(method).as_text()
    assert "tensor<1x8x259xf32>" in program
    assert f"x{batch.targets.size}x259xf32>" not in program


def test_equal_settings_give_equal_objectives():
    """They are static arguments of the compiled step."""
    for settings in ({"name": "preference"}, {"label_smoothing": 0.1}):
        one, other = (
            objective_of(ObjectiveSettings.model_validate(settings), [~0, 5, 6]) for _ in range(2)
        )
        assert one == other
        assert hash(one) == hash(other)
    preference = objective_of(ObjectiveSettings.model_validate("preference"), [~0, 5, ~1, 6])
    assert preference == Preference("dpo", 0.1, (5, 6))
    assert objective_of(ObjectiveSettings(), []) == CrossEntropy()
