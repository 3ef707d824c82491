"""A custom objective and optimizer that Python code passes to `train`."""

import dataclasses
import json

import jax.numpy as jnp
import optax
import pytest
from conftest import write_experiment
from test_training import outcome

from softprompt import Callback, UserError, cross_entropy, load_experiment, train
from softprompt.backbones.batch import target_log_probabilities
from softprompt.objectives.model import RowObjective
from softprompt.storage.run_folder import read_metrics

EVEN = ["training.log_every=1", "optimizer.clip_norm=null"]


@dataclasses.dataclass(frozen=True)
class MeanLoss(RowObjective):
    """Cross-entropy times a factor, by row. Each row has one target of two tokens and an end."""

    factor: float = 2.0

    def of_rows(self, model, batch, key):
        losses = -target_log_probabilities(*model.apply(key), batch)  # [G, M]
        losses = batch.target_rows.to_rows(jnp.where(batch.target_candidates >= 0, losses, 0.0))
        is_row = (batch.target_lengths > 0).astype(jnp.float32).ravel()
        loss = self.factor * losses.sum(axis=-1)
        return {"loss": loss, "half": loss / 2}, is_row


def doubled(model, batch, key):
    total, weight, _ = cross_entropy(model, batch, key)
    return 2 * total, weight, {"plain": total}


class FailAfter(Callback):
    def __init__(self, last):
        self.last = last

    def on_step(self, step, measured):
        if step == self.last:
            raise OSError("the disk is full")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_experiment(tmp_path_factory.mktemp("custom"), 5, 5)


@pytest.fixture(scope="module")
def free_text(tmp_path_factory):
    file = write_experiment(tmp_path_factory.mktemp("free"), 5, 5)
    text = file.read_text().replace('verbalizer: {low: " ab", high: " cd"}\n', "")
    text = text.replace(", metric: accuracy", ", samples: 0")
    file.write_text(text.replace('input: "{text} is"', 'input: "{text}", target: " {label}"'))
    return file


def train_losses(folder):
    return [r["loss"] for r in read_metrics(folder) if r["split"] == "train"]


def test_an_objective_replaces_the_loss(file, tmp_path, call):
    experiment = load_experiment(file, ["training.steps=4", "training.log_every=1"])
    folder = tmp_path / "run"
    train(experiment, folder, objective=doubled)
    for record in read_metrics(folder):
        if record["split"] == "train":
            assert record["loss"] == pytest.approx(2 * record["plain"])
    assert load_experiment(folder / "config.yaml").objective.custom
    status, printed, _ = call("eval", folder)
    assert status == 0
    (validation,) = (r for r in read_metrics(folder) if r["split"] == "validation")
    assert json.loads(printed)["loss"] > 0
    assert {"loss", "accuracy"} <= validation.keys()
    status, _, errors = call("train", folder / "config.yaml", "--run-dir", tmp_path / "other")
    assert (status, "pass it in Python: train" in errors.splitlines()[-1]) == (1, True)


def test_an_objective_of_rows_is_measured_and_selects_the_best_step(free_text, tmp_path, call):
    experiment, folder = load_experiment(free_text), tmp_path / "run"
    summary = train(experiment, folder, objective=MeanLoss())
    validations = [r for r in read_metrics(folder) if r["split"] == "validation"]
    for record in (*validations, summary["test"]):
        assert record["objective_loss"] == pytest.approx(2 * record["half"])
    best = min(validations, key=lambda record: record["objective_loss"])
    assert summary["best_step"] == best["step"]
    assert load_experiment(folder / "config.yaml").evaluation.metric == "objective_loss"
    status, printed, errors = call("eval", folder)
    assert status == 0, errors
    assert json.loads(printed)["loss"] == pytest.approx(summary["test"]["loss"], rel=1e-5)


def test_a_custom_loss_is_given_pairs_if_the_section_asks_for_them(tmp_path):
    """The section decides what a batch holds, and the function computes the loss."""
    pairs = [{"prompt": c, "chosen": c * 2, "rejected": "no"} for c in "abcdefgh"]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    file = write_experiment(tmp_path, 5, 5)
    text = file.read_text().replace('verbalizer: {low: " ab", high: " cd"}\n', "")
    text = text.replace(", metric: accuracy", ", samples: 0").replace("train.jsonl", "pairs.jsonl")
    text = text.replace('"{text} is"', '"{record[prompt]}", target: "{chosen}"')
    text = text.replace("validation.jsonl, test: test.jsonl", "pairs.jsonl")
    file.write_text(text + "objective: preference\n")
    seen = []

    def likely(model, batch, key):
        seen.append(batch.segments is not None)
        return cross_entropy(model, batch, key)

    train(load_experiment(file, ["training.steps=1"]), tmp_path / "run", objective=likely)
    assert seen
    assert all(seen)


def test_an_optax_optimizer_gives_what_the_section_gives(file, tmp_path):
    """Both are AdamW at a constant rate, in the section and in Optax."""
    section = ["optimizer.warmup_steps=0", "optimizer.schedule=constant", *EVEN]
    train(load_experiment(file, section), tmp_path / "section")
    train(
        load_experiment(file, EVEN), tmp_path / "optax", optimizer=optax.adamw(0.1, weight_decay=0)
    )
    expected = train_losses(tmp_path / "section")
    assert train_losses(tmp_path / "optax") == pytest.approx(expected, rel=1e-5)
    record = read_metrics(tmp_path / "optax")[0]
    assert "learning_rate" not in record
    written = (tmp_path / "optax" / "config.yaml").read_text()
    assert "optimizer:\n  name: custom\n" in written
    assert "schedule" not in written


def interrupted(experiment, folder, **arguments):
    """Train in a folder until a callback fails after a step."""
    with pytest.raises(OSError, match="the disk is full"):
        train(experiment, folder, callbacks=[FailAfter(6)], **arguments)


def test_a_run_with_an_optimizer_resumes_and_gives_the_same_result(file, tmp_path, capsys):
    experiment = load_experiment(file, EVEN)

    def optimizer():
        return optax.chain(optax.clip(1.0), optax.sgd(optax.linear_schedule(0.3, 0, 12), 0.9))

    train(experiment, tmp_path / "whole", optimizer=optimizer())
    interrupted(experiment, tmp_path / "run", optimizer=optimizer())
    capsys.readouterr()
    train(experiment, tmp_path / "run", optimizer=optimizer())
    messages = capsys.readouterr().err
    assert "resuming from step 7" in messages
    assert "optimizer" not in messages
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_another_optimizer_is_noticed(file, tmp_path, capsys):
    experiment, folder = load_experiment(file, EVEN), tmp_path / "run"
    interrupted(experiment, folder, optimizer=optax.sgd(0.1, momentum=0.9))
    with pytest.raises(UserError) as error:
        train(experiment, folder, optimizer=optax.adam(0.1))
    (line,) = str(error.value).splitlines()
    assert "its optimizer has changed since the run began" in line
    with pytest.raises(UserError, match=r"optimizer.name: was 'custom', is now 'adamw'"):
        train(experiment, folder)
    capsys.readouterr()
    train(experiment, folder, optimizer=optax.sgd(0.2, momentum=0.9))
    assert "the optimizer computes other updates than before" in capsys.readouterr().err


class Unhashable:
    __hash__ = None

    def __call__(self, model, batch, key):
        return cross_entropy(model, batch, key)


@pytest.mark.parametrize(
    ("arguments", "overrides", "message"),
    [
        ({"objective": "distill"}, [], "objective: must be a function"),
        ({"objective": Unhashable()}, [], "objective: Unhashable has no hash"),
        ({"optimizer": 0.1}, [], "optimizer: must be an Optax optimizer"),
        ({"optimizer": optax.sgd}, [], "optimizer: must be an Optax optimizer"),
        ({"optimizer": optax.noisy_sgd(0.1, key=0)}, [], "is a random key, which a checkpoint"),
        (
            {"objective": doubled},
            ["objective.custom=true", "evaluation.metric=objective_loss"],
            "evaluation.metric: objective_loss is not measured with this objective",
        ),
        ({}, ["objective.custom=true"], "pass it in Python: train"),
        ({}, ["optimizer={name: custom}"], "pass it in Python: train"),
    ],
)
def test_what_cannot_be_used_is_rejected_in_one_line(file, tmp_path, arguments, overrides, message):
    with pytest.raises(UserError) as error:
        train(load_experiment(file, overrides), tmp_path / "run", **arguments)
    (line,) = str(error.value).splitlines()
    assert message in line
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer={name: custom, schedule: linear}"], "schedule cannot be used with a custom"),
        (
            ["objective={name: preference, custom: true}", "evaluation.metric=kl"],
            "kl is not measured with a custom objective",
        ),
    ],
)
def test_settings_that_do_not_fit_are_rejected(free_text, overrides, message):
    with pytest.raises(UserError, match=message):
        load_experiment(free_text, overrides)
