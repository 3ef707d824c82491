"""Prompt compression: prefixes that start from the teacher's text, and partly frozen prefixes."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, REPOSITORY

from softprompt import UserError, load_experiment, load_prompt, train
from softprompt.experiment.schema import Experiment
from softprompt.methods.prefix_tuning import PartlyFrozenPrefix, ReparametrizedPrefix
from softprompt.training.preparation import Preparation

DOCUMENT = "The old mill was built in 1843. It grinds rye on Mondays and oats on Fridays.\n"
EXPERIMENT = f"""\
base: {GOLDEN / "llama-grouped"}
data: {{train: train.jsonl, validation: train.jsonl}}
template: {{input: "{{question}}:", target: " {{answer}}"}}
method: prefix
prefix: {{length: 6, init: teacher, frozen: 2}}
objective: {{name: distill, teacher: {{context: mill.txt}}}}
optimizer: {{learning_rate: 0.05}}
training: {{steps: 4, batch_size: 4, log_every: 1}}
evaluation: {{every: 2, samples: 0}}
"""


@pytest.fixture
def path(tmp_path):
    (tmp_path / "mill.txt").write_text(DOCUMENT)
    questions = [{"question": f"day {n}", "answer": "rye" if n % 2 else "oats"} for n in range(12)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    path = tmp_path / "mill.yaml"
    path.write_text(EXPERIMENT)
    return path


def document_prefix(base, length: int):
    """Return the keys and values that the model computes for the first tokens of the document."""
    tokens = base.tokenizer(DOCUMENT, add_special_tokens=False).input_ids[:length]
    prefix = base.backbone.prefill(base.backbone.embedding(jnp.asarray(tokens)))
    return np.asarray(prefix.keys), np.asarray(prefix.values)


def prepared(experiment: Experiment):
    preparation = Preparation().prepare(experiment)
    return preparation.method, preparation.base


@pytest.mark.parametrize("frozen", [0, 2])
def test_a_prefix_starts_from_the_keys_and_values_of_what_the_teacher_reads_first(path, frozen):
    method, base = prepared(load_experiment(path, [f"prefix.frozen={frozen}"]))
    start = method.folded()
    keys, values = document_prefix(base, 6)
    np.testing.assert_allclose(start.keys[...], keys, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(start.values[...], values, rtol=1e-5, atol=1e-6)


def test_a_prefix_as_long_as_the_document_has_the_distributions_of_the_teacher(path, tmp_path):
    tokens = len(DOCUMENT.encode())  # the tokenizer has a token per byte
    overrides = [f"prefix.length={tokens}", "optimizer.learning_rate=1e-30"]
    train(load_experiment(path, overrides), tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    first = next(r for r in map(json.loads, lines) if r["split"] == "validation")
    assert first["objective_loss"] < 1e-8
    assert first["agreement"] == 1.0


def test_a_prefix_starts_from_solved_examples_that_the_teacher_reads(path):
    shots = ["objective.teacher={shots: 2}", "prefix.length=9", "prefix.frozen=0"]
    method, base = prepared(load_experiment(path, shots))
    found = np.asarray(method.keys[...])
    texts = [f"day {n}: {'rye' if n % 2 else 'oats'}\n\n" for n in range(12)]
    ids = [base.tokenizer(text).input_ids[:9] for text in texts]
    expected = [base.backbone.prefill(base.backbone.embedding(jnp.asarray(i))).keys for i in ids]
    assert any(np.allclose(found, keys, rtol=1e-5, atol=1e-6) for keys in expected)


def test_a_soft_prompt_starts_from_the_embeddings_of_what_the_teacher_reads_first(path):
    overrides = ["method=prompt", "prompt={length: 5, init: teacher}"]
    method, base = prepared(load_experiment(path, overrides))
    tokens = base.tokenizer(DOCUMENT, add_special_tokens=False).input_ids[:5]
    np.testing.assert_array_equal(method.vectors[...], base.backbone.embedding(jnp.asarray(tokens)))


def test_a_run_with_frozen_positions_is_an_ordinary_prefix_and_resumes_bit_for_bit(path, tmp_path):
    experiment, folder = load_experiment(path), tmp_path / "run"
    train(experiment, folder)
    start = prepared(experiment)[0].folded()
    prompt = load_prompt(folder)
    method = prompt.method
    assert type(method).__name__ == "PrefixTuning"
    for before, after in ((start.keys, method.keys), (start.values, method.values)):
        np.testing.assert_array_equal(before[...][:, :2], after[...][:, :2])
        assert np.all(np.any(before[...][:, 2:] != after[...][:, 2:], axis=(0, 2, 3)))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["trainable_parameters"] == 2 * method.keys[...][:, 2:].size
    arrays, config = method.peft_adapter(prompt.base, prompt.prefix)
    assert (config["peft_type"], config["num_virtual_tokens"]) == ("PREFIX_TUNING", 6)
    assert all(len(array) == 6 for array in arrays.values())

    resumed = tmp_path / "resumed"
    shutil.copytree(folder, resumed)
    (resumed / "summary.json").unlink()
    shutil.rmtree(resumed / "checkpoints" / "4")
    train(experiment, resumed)
    again = load_prompt(resumed).method
    np.testing.assert_array_equal(method.keys[...], again.keys[...])
    np.testing.assert_array_equal(method.values[...], again.values[...])


def test_the_network_of_a_partly_frozen_prefix_changes_only_the_other_positions(path):
    method, base = prepared(load_experiment(path, ["prefix.size=3"]))
    assert isinstance(method, PartlyFrozenPrefix)
    assert isinstance(method.trained, ReparametrizedPrefix)
    assert method.trained.inputs.shape == (4, 3)
    assert repr(method) == (
        "PartlyFrozenPrefix(2 frozen virtual tokens, "
        "ReparametrizedPrefix(4 virtual tokens, network of size 3))"
    )
    method.trained.up.set_value(jnp.ones_like(method.trained.up[...]))
    keys, _ = document_prefix(base, 6)
    changed = np.abs(np.asarray(method.folded().keys[...]) - keys).max(axis=(0, 2, 3)) > 1e-3
    assert changed.tolist() == [False, False, True, True, True, True]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prefix.frozen=6"], "frozen: 6 of 6 virtual tokens are frozen, so nothing is trained"),
        (
            ["objective=cross_entropy"],
            "prefix.init: teacher needs objective.teacher with context or shots",
        ),
        (
            ["objective=cross_entropy", "prefix.init=vocabulary", "prompt.init=teacher"],
            "prompt.init: teacher needs objective.teacher with context or shots",
        ),
    ],
)
def test_settings_that_do_not_fit_are_rejected_in_one_line(path, overrides, message):
    with pytest.raises(UserError) as error:
        load_experiment(path, overrides)
    (line,) = str(error.value).splitlines()
    assert message in line


def test_a_prefix_longer_than_what_the_teacher_reads_is_rejected(path):
    experiment = load_experiment(path, ["prefix.length=79"])
    with pytest.raises(UserError, match="the teacher reads only 78 tokens before every row"):
        prepared(experiment)


def test_an_encoder_decoder_has_no_keys_and_values_of_the_document(path, t5_folder):
    experiment = load_experiment(path, [f"base={t5_folder}"])
    with pytest.raises(UserError, match=r"prefix\.init: teacher needs a causal base model"):
        prepared(experiment)


@pytest.mark.parametrize(
    ("name", "fields", "overrides"),
    [
        ("shots", ("en", "fr"), ["objective.teacher.shots=1", "evaluation.metrics=[]"]),
        ("document", ("question", "answer"), ["template.chat=false", "template.max_tokens=40"]),
    ],
)
def test_the_experiments_of_the_repository_train(name, fields, overrides, path, tmp_path):
    data = tmp_path / "train.jsonl"
    if name == "document":
        overrides = [*overrides, f"objective.teacher.context={tmp_path / 'mill.txt'}"]
    small = ["training={steps: 2, batch_size: 2}", "evaluation.every=1", "evaluation.samples=0"]
    small += [f"base={GOLDEN / 'llama-grouped'}", f"data={{train: {data}, validation: {data}}}"]
    experiment = load_experiment(
        REPOSITORY / "experiments" / f"compress-{name}.yaml",
        [*small, "prefix.length=6", "optimizer.warmup_steps=0", *overrides],
    )
    records = [dict(zip(fields, (f"{n} days", f"{n} jours"), strict=True)) for n in range(4)]
    split = {"train": records, "validation": records}
    summary = train(experiment, tmp_path / "run", records=split)
    assert summary["steps"] == 2
    assert summary["validation"]["objective_loss"] >= 0
    assert load_prompt(tmp_path / "run").prefix.length >= 6
