"""T5 through the same method, step, evaluator and prompt as causal models."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import example_of, write_experiment

from softprompt import SoftPrompt, UserError, load_base, load_experiment, load_prompt, train
from softprompt.backbones.batch import target_log_probabilities
from softprompt.data.batches import Layout


@pytest.fixture(scope="session")
def base(t5_folder):
    return load_base(str(t5_folder))


def scores(base, prefix, examples):
    layout = Layout.of(examples, separate_targets=True)
    batch = layout.batch(examples, len(examples))
    return np.asarray(target_log_probabilities(base.backbone, prefix, batch))


def test_candidates_side_by_side_score_as_each_alone(base):
    candidates = [[20, 21, 22], [23], [24, 25, 1]]
    prefix = base.backbone.prefill(jnp.ones((3, 16)))
    together = scores(base, prefix, [example_of([5, 6, 7, 1], candidates, 0)])[0]
    alone = []
    for candidate in candidates:
        alone += scores(base, prefix, [example_of([5, 6, 7, 1], [candidate], 0)])[0].tolist()
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_a_row_does_not_depend_on_its_padding(base):
    examples = [
        example_of([5, 6, 7, 8, 9, 10, 11, 1], [[20, 21, 22]], 0),
        example_of([12, 1], [[23]], 0),
    ]
    together = scores(base, None, examples)
    np.testing.assert_allclose(together[1, 0], scores(base, None, examples[1:])[0, 0], atol=1e-5)


def test_a_target_is_predicted_from_those_before_it_alone(base):
    def states(targets):
        example = example_of([5, 6, 1], [targets], 0)
        batch = Layout.of([example], separate_targets=True).batch([example], 1)
        return np.asarray(base.backbone.target_states(batch, None))[0]

    before = states([20, 21, 22, 23])
    for changed in range(4):
        targets = [20, 21, 22, 23]
        targets[changed] = 30
        moved = (states(targets) != before).any(axis=-1)
        np.testing.assert_array_equal(moved, np.arange(4) > changed)


def test_the_prompt_stands_in_front_of_the_encoder(base):
    vectors = jnp.asarray(np.random.default_rng(0).normal(size=(3, 16)), jnp.float32)
    example = example_of([5, 6, 1], [[20, 21]], 0)
    backbone, prefix = SoftPrompt(vectors).apply(base.backbone)
    got = scores(base, prefix, [example])

    prepended = SoftPrompt(vectors)(backbone.embedding(jnp.array([[5, 6, 1]])))
    encoded, _ = backbone.encode(prepended, jnp.array([6]), None)
    ours, _ = backbone.encode(backbone.embedding(jnp.array([[5, 6, 1]])), jnp.array([3]), prefix)
    np.testing.assert_allclose(ours, encoded, atol=1e-6)
    assert np.abs(got - scores(base, None, [example])).max() > 1e-3


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if record["split"] == "train"]


def test_training_evaluation_and_prediction_are_those_of_causal_models(t5_folder, tmp_path):
    overrides = [f"base={t5_folder}", "training.steps=40", "evaluation.every=40"]
    summary = train(load_experiment(write_experiment(tmp_path), overrides), tmp_path / "run")
    assert summary["trainable_parameters"] == 3 * 16
    train_losses = losses(tmp_path / "run")
    assert train_losses[-1] < train_losses[0] - 0.2
    prompt = load_prompt(tmp_path / "run")
    (prediction,) = prompt.classify(["aaaa"])
    example = prompt.task.example(prompt.record("aaaa", ""), with_answer=False)
    log_probabilities = scores(prompt.base, prompt.prefix, [example])[0]
    low, high = log_probabilities[:3].sum(), log_probabilities[3:].sum()
    np.testing.assert_allclose(
        prediction.probabilities["low"], 1 / (1 + np.exp(high - low)), rtol=1e-4
    )


def test_free_text_is_learned_and_written(t5_folder, tmp_path):
    path = write_experiment(tmp_path)
    text = path.read_text().replace('verbalizer: {low: " ab", high: " cd"}\n', "")
    text = text.replace("metric: accuracy", "metric: loss")
    path.write_text(text)
    overrides = [f"base={t5_folder}", "training.steps=40", "evaluation.every=40"]
    train(load_experiment(path, overrides), tmp_path / "run")
    train_losses = losses(tmp_path / "run")
    assert train_losses[-1] < train_losses[0] - 0.2
    prompt = load_prompt(tmp_path / "run")
    generated = prompt.generate(["aaaa", "zz"], max_new_tokens=8)
    for one, source in zip(generated, ["aaaa", "zz"], strict=True):
        written = prompt.base.tokenizer(one.text).input_ids  # the end-of-text token is added
        example = prompt.task.example(prompt.record(source, ""), with_answer=False)
        example = dataclasses.replace(example, candidates=[written])
        layout = Layout.of([example], separate_targets=True)
        states = prompt.base.backbone.target_states(layout.batch([example], 1), prompt.prefix)
        likeliest = prompt.base.backbone.logits(states)[0].argmax(axis=-1).tolist()
        assert likeliest[: len(written) - 1] == written[:-1]


def test_a_target_longer_than_the_model_takes_is_refused(t5_folder, tmp_path):
    path = write_experiment(tmp_path)
    overrides = [f"base={t5_folder}", "template.max_tokens=2"]
    with pytest.raises(UserError, match="its target has 3 tokens, more than 2"):
        train(load_experiment(path, overrides), tmp_path / "run")
