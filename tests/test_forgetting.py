"""Forgetting: the loss on plain text with what is trained, minus the loss without."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from softprompt import LoRA, SoftPrompt, UserError, load_experiment, load_prompt, train
from softprompt.cli.compare import table_rows
from softprompt.evaluation import forgetting as module
from softprompt.evaluation.forgetting import forgetting, plain_texts
from softprompt.evaluation.scoring import prepare_model
from softprompt.experiment.methods import method_class
from softprompt.sweep.comparison import compare
from softprompt.sweep.runner import sweep
from softprompt.training.preparation import Preparation

TEXTS = ["The river is long.", "Snow!", "Birds sing in the early morning."]


def losses(base, vectors, texts=TEXTS) -> list[np.ndarray]:
    """The loss of each token but the first, one text at a time, from all logits."""
    found = []
    for text in texts:
        ids = jnp.array(base.tokenizer(text).input_ids)
        embeddings = SoftPrompt(vectors)(base.backbone.embedding(ids[None]))
        logits = np.asarray(base.backbone.logits(base.backbone(embeddings)), np.float64)
        logits = logits[0, len(vectors) : -1]
        chosen = logits[np.arange(len(ids) - 1), np.asarray(ids[1:])]
        found.append(np.log(np.exp(logits).sum(axis=-1)) - chosen)
    return found


@pytest.mark.parametrize("text", [[], [40, 41]])
def test_it_is_the_difference_of_the_mean_losses(tiny, text):
    """The text of a template is not read."""
    vectors = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    prompt = SoftPrompt(jnp.asarray(vectors), [~0, ~1, ~2, *text])
    found = forgetting(prompt, tiny.backbone, tiny, TEXTS)
    with_prompt, without = losses(tiny, vectors), losses(tiny, vectors[:0])
    expected = np.concatenate(with_prompt).mean() - np.concatenate(without).mean()
    assert abs(expected) > 0.01
    assert found.values() == pytest.approx({"forgetting": expected}, abs=1e-5)
    low, high = found.intervals()["forgetting"]
    assert low <= expected <= high
    assert prompt.opening[...].tolist() == [~0, ~1, ~2, *text]


def test_untrained_lora_forgets_nothing_and_changed_lora_does(tiny, experiment):
    method = LoRA.build(experiment, tiny, [])
    assert forgetting(method, tiny.backbone, tiny, TEXTS).values()["forgetting"] == 0
    graphdef, learned, rest = nnx.split(method, LoRA.trainable, ...)
    learned = nnx.map_state(lambda path, value: value + 0.3, learned)
    changed = nnx.merge(graphdef, learned, rest)
    assert abs(forgetting(changed, tiny.backbone, tiny, TEXTS).values()["forgetting"]) > 1e-3


def test_a_text_of_one_token_is_rejected(tiny):
    prompt = SoftPrompt(jnp.zeros((1, 32)))
    with pytest.raises(UserError, match="text 2: has fewer than two tokens"):
        forgetting(prompt, tiny.backbone, tiny, ["Some text.", ""])


def test_virtual_tokens_inside_rows_come_before_each_text(tiny):
    vectors = jnp.asarray(np.random.default_rng(0).normal(size=(3, 32)), jnp.float32)
    before, inside = (
        forgetting(SoftPrompt(vectors, opening), tiny.backbone, tiny, TEXTS).values()
        for opening in ([~0, ~1, ~2], [])
    )
    assert before == inside
    assert abs(before["forgetting"]) > 0.01


@pytest.mark.parametrize("name", ["prefix", "dept", "full"])
def test_other_methods_are_measured_with_what_they_changed(tiny, experiment, name):
    """The reference reads one text at a time and computes all logits."""
    method = method_class(name).build(experiment, tiny, [~0, ~1, ~2] if name == "dept" else [])
    graphdef, learned, rest = nnx.split((method, tiny.backbone), method.trainable, ...)
    key = jax.random.key(0)
    learned = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), learned)
    method, backbone = nnx.merge(graphdef, learned, rest)

    def total(model, prefix) -> float:
        found = 0.0
        for text in TEXTS:
            ids = jnp.array(tiny.tokenizer(text).input_ids)
            states = model(model.embedding.with_offsets(ids[None]), prefix=prefix)
            logits = np.asarray(model.logits(states), np.float64)[0, :-1]
            chosen = logits[np.arange(len(ids) - 1), np.asarray(ids[1:])]
            found += (np.log(np.exp(logits).sum(axis=-1)) - chosen).sum()
        return found

    tokens = sum(len(tiny.tokenizer(text).input_ids) - 1 for text in TEXTS)
    with_it, without = total(*prepare_model(method, backbone)), total(tiny.backbone, None)
    expected = (with_it - without) / tokens
    assert abs(expected) > 0.01
    found = forgetting(method, backbone, tiny, TEXTS)
    assert found.values() == pytest.approx({"forgetting": expected}, abs=1e-5)


def test_a_run_measures_its_best_prompt_and_eval_measures_the_same(experiment_file, tmp_path, call):
    overrides = ["evaluation.forgetting=true", "training.steps=1", "data.test=null"]
    run = tmp_path / "runs" / "one"
    summary = train(load_experiment(experiment_file, overrides), run)
    prompt = load_prompt(run)
    expected = forgetting(prompt.method, prompt.backbone, prompt.base, plain_texts())
    low, high = summary["forgetting_interval"]
    assert low < summary["forgetting"] < high
    assert summary["forgetting"] == pytest.approx(expected.values()["forgetting"], abs=1e-6)
    status, out, _ = call("eval", run, "--split", "validation")
    assert (status, json.loads(out)["forgetting"]) == (0, pytest.approx(summary["forgetting"]))
    status, out, _ = call("runs", tmp_path / "runs", "--json")
    assert json.loads(out)["forgetting"] == summary["forgetting"]


def test_every_trial_of_a_sweep_measures_its_own_prompt(space):
    section = "  points: [{seed: 1}, {prompt.length: 2}]\n  at_once: 2\n"
    settings = "evaluation.forgetting=true", "training.steps=2", "evaluation.every=2"
    found = []
    for trial in sweep(space(section, *settings)):
        prompt = load_prompt(trial.folder)
        expected = forgetting(prompt.method, prompt.backbone, prompt.base).values()["forgetting"]
        summary = json.loads((trial.folder / "summary.json").read_text())
        assert summary["forgetting"] == pytest.approx(expected, abs=1e-6)
        found.append(expected)
    assert abs(found[0] - found[1]) > 1e-3


def test_a_comparison_has_a_column_for_it(experiment_file, tmp_path):
    def write_summary(file, overrides, folder):
        folder.mkdir(parents=True)
        values = {"steps": 1, "trainable_parameters": 1, "train_seconds": 1.0}
        values |= {"examples_per_second": 1.0, "peak_memory_bytes": 1, "validation": {}}
        values |= {"test": {"accuracy": 0.5}, "forgetting": 0.1 * len(str(folder.parent.name))}
        (folder / "summary.json").write_text(json.dumps(values))

    rows = compare(experiment_file, ["prompt", "lora"], [0, 1], [], tmp_path, write_summary)
    assert [row["forgetting"] for row in table_rows(rows)] == ["0.600", "0.400"]


def test_an_encoder_decoder_is_rejected_before_training(experiment_file, t5_folder):
    overrides = [f"base={t5_folder}", "evaluation.forgetting=true"]
    with pytest.raises(UserError, match=r"needs a causal base model.*is an encoder-decoder"):
        Preparation().prepare(load_experiment(experiment_file, overrides))


def test_prompts_of_several_tasks_are_rejected(experiment_file):
    tasks = ["prompt.reparametrization=multitask", "prompt.tasks=[a, b]"]
    with pytest.raises(UserError, match=r"evaluation.forgetting cannot be used with prompt.tasks"):
        load_experiment(experiment_file, [*tasks, "evaluation.forgetting=true"])


def test_the_texts_of_the_package_name_their_source_and_license():
    lines = (Path(module.__file__).parent / "plain_text.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert {record["license"] for record in records} == {"public domain", "Apache-2.0"}
    assert all(record["kind"] and record["source"] for record in records)
    assert len({*plain_texts()}) == len(records) == 34
    about = (Path(module.__file__).parent / "plain_text.md").read_text()
    for source in {record["source"].split(",")[0] for record in records}:
        assert source.replace("softprompt", "this package") in about
