"""The most likely tokens of a teacher, stored before training, instead of its pass in a step."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden_backbone
from test_teachers import STUDENT, TAUGHT, experiment_with, log_softmax, logits_of

from softprompt import SoftPrompt, TrainingBatches, UserError, train
from softprompt.cli.main import main
from softprompt.data.batches import evaluation_batches, side_by_side
from softprompt.data.examples import AnswerOnly, Examples
from softprompt.data.top_tokens import TopTokens
from softprompt.errors import FolderError
from softprompt.objectives.distillation import Distillation, top_distillation_loss
from softprompt.objectives.divergence import with_others
from softprompt.objectives.model import Model
from softprompt.objectives.teacher import Teacher, read
from softprompt.training import top_tokens
from softprompt.training.preparation import Preparation

TEMPERATURE = 1.7


def exact(teacher: np.ndarray, student: np.ndarray, count: int) -> np.ndarray:
    """KL of the `count` most likely tokens and all others together, in float64."""
    log_p, log_q = (log_softmax(np.float64(each) / TEMPERATURE) for each in (teacher, student))
    order = np.argsort(-log_p, axis=-1)
    p, q = (np.exp(np.take_along_axis(each, order, axis=-1)) for each in (log_p, log_q))
    kept = p[..., :count], q[..., :count]
    rest = p[..., count:].sum(axis=-1), q[..., count:].sum(axis=-1)
    total = (kept[0] * np.log(kept[0] / kept[1])).sum(axis=-1)
    return total if count == p.shape[-1] else total + rest[0] * np.log(rest[0] / rest[1])


def test_the_divergence_of_top_tokens_rises_to_the_divergence_of_all_tokens():
    random = np.random.default_rng(0)
    teacher, student = (random.normal(0, 3, (2, 5, 40)).astype(np.float32) for _ in range(2))
    exact_values, gradient = [], None
    for count in (1, 2, 8, 39, 40):
        ids = jax.lax.top_k(teacher, count)[1]
        expected = with_others(teacher / TEMPERATURE, ids)

        def loss(student, ids=ids, expected=expected):
            return jnp.sum(top_distillation_loss(student, ids, expected, TEMPERATURE))

        found = top_distillation_loss(student, ids, expected, TEMPERATURE)
        exact_values.append(exact(teacher, student, count))
        np.testing.assert_allclose(found, exact_values[-1], rtol=1e-5, atol=1e-6)
        gradient = jax.grad(loss)(student)
        assert np.isfinite(gradient).all()
    assert (np.diff(exact_values, axis=0) >= -1e-12).all()
    # The gradient of the whole divergence is (q - p) / T.
    p, q = (np.exp(log_softmax(np.float64(each) / TEMPERATURE)) for each in (teacher, student))
    np.testing.assert_allclose(gradient, (q - p) / TEMPERATURE, atol=1e-6)


def test_a_sure_student_has_the_exact_mass_of_all_other_tokens():
    """1 minus the mass of the other tokens would be 1 in float32."""
    student, teacher = np.zeros((2, 30), np.float32)
    student[3] = 40
    teacher[:4] = 1
    expected = with_others(teacher / TEMPERATURE, jnp.arange(4))
    found = top_distillation_loss(student, jnp.arange(4), expected, TEMPERATURE)
    order = np.argsort(-log_softmax(teacher), kind="stable")
    assert order[:4].tolist() == [0, 1, 2, 3]
    assert found == pytest.approx(exact(teacher, student, 4), rel=1e-5)


@pytest.mark.parametrize("variant", ["gemma2-capped", "t5-gated"])
@pytest.mark.parametrize("all_candidates", [True, False])
def test_batches_with_top_tokens_match_the_formula(variant, all_candidates):
    """Training and evaluation make the batches, so rows are shuffled and packed."""
    backbone = golden_backbone(variant)
    vectors = np.random.default_rng(0).normal(size=(3, backbone.arch.hidden_size))
    method = SoftPrompt(jnp.asarray(vectors, jnp.float32), [~0, ~1, ~2])
    teacher = Teacher(backbone, read(backbone, [50, 51]))
    seen = (lambda each: each) if all_candidates else AnswerOnly
    student, taught = seen(Examples(STUDENT)), seen(Examples(TAUGHT))
    tokens = TopTokens.empty(student.lengths.targets, 4)
    for numbers, results in evaluation_batches(
        student,
        1,
        lambda batch: [
            np.asarray(each)[batch.target_candidates >= 0]
            for each in top_tokens._of_batch(
                teacher, batch, 4, backbone.arch.vocab_size, TEMPERATURE
            )
        ],
        separate_targets=backbone.separate_targets,
        teacher=taught,
    ):
        places = tokens.places(numbers)
        tokens.ids[places], tokens.log_probabilities[places] = results
    batch = TrainingBatches(
        STUDENT,
        2,
        0,
        all_candidates=all_candidates,
        separate_targets=backbone.separate_targets,
        teacher=tokens,
    )[0]
    pairs = zip(
        logits_of(backbone, teacher.prefix, taught),
        logits_of(*method.apply(backbone), student),
        strict=True,
    )
    losses = np.concatenate([exact(theirs, ours, 4) for theirs, ours in pairs])
    objective, key = Distillation(TEMPERATURE), jax.random.key(0)
    total, weight, _ = jax.jit(objective)(Model(method, backbone), batch, key)
    assert weight == len(losses)
    assert float(total / weight) == pytest.approx(np.mean(losses), rel=1e-4)
    # Trials of a sweep have batches side by side, which are padded along the targets.
    longer = dataclasses.replace(
        batch, top_tokens=np.pad(batch.top_tokens, [(0, 0), (0, 8), (0, 0)])
    )
    assert side_by_side([batch, longer]).top_tokens.shape == (2, *longer.top_tokens.shape)


def test_a_run_with_all_tokens_is_a_run_with_a_teacher(tiny, tmp_path, monkeypatch, capsys):
    manual, run = tmp_path / "manual.txt", tmp_path / "stored"
    manual.write_text("Say it twice.")
    teacher = f"context: {manual}, input: 'Repeat {{word}}:'"
    read_each_step = train(experiment_with(tmp_path, teacher), tmp_path / "plain")
    size = tiny.backbone.arch.vocab_size
    experiment = experiment_with(tmp_path, f"{teacher}, top_tokens: {size}")
    stored = train(experiment, run)
    for name in ("objective_loss", "agreement", "loss"):
        expected = read_each_step["validation"][name]
        assert stored["validation"][name] == pytest.approx(expected, rel=1e-4)

    capsys.readouterr()
    assert main(["eval", str(run), "--split", "train"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["objective_loss"] == pytest.approx(stored["validation"]["objective_loss"], 1e-4)

    with monkeypatch.context() as patch:
        patch.setattr(top_tokens, "_of_batch", lambda *_: pytest.fail("reads again"))
        (run / "summary.json").unlink()
        assert train(experiment, run)["validation"] == stored["validation"]
    (run / "summary.json").unlink()
    manual.write_text("Say it once.")
    with pytest.raises(FolderError, match="its teacher or data has changed since the run began"):
        train(experiment, run)


def test_experiments_share_top_tokens_and_damaged_ones_are_made_again(tmp_path, caplog):
    """Another temperature or number of tokens needs others, but not another teacher."""
    teacher, run = "input: 'Repeat {word}:', top_tokens: 3", tmp_path / "run"
    run.mkdir()
    preparation = Preparation()
    first, second, third, fourth = (
        preparation.prepare(experiment_with(tmp_path, teacher, *overrides), folder=run)
        for overrides in (
            [],
            ["seed=1"],
            ["objective.temperature=2.0"],
            ["evaluation.examples=3"],
        )
    )
    assert first.teacher is None
    assert second.taught["train"] is first.taught["train"]
    assert third.taught["train"] is not first.taught["train"]
    assert len(fourth.taught["validation"].targets) == 3
    assert fourth.teacher_digest == first.teacher_digest
    (run / "top-tokens-train" / "SHA256SUMS").unlink()
    again = Preparation().prepare(
        experiment_with(tmp_path, teacher, "evaluation.examples=3"), folder=run
    )
    assert "the teacher reads the examples again" in caplog.text
    np.testing.assert_array_equal(again.taught["train"].ids, fourth.taught["train"].ids)


def test_more_tokens_than_the_vocabulary_are_rejected(tmp_path):
    with pytest.raises(UserError, match=r"99999 is more than the \d+ tokens of the vocabulary"):
        Preparation().prepare(experiment_with(tmp_path, "shots: 1, top_tokens: 99999"))
