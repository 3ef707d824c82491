"""T5 uses the same methods, training step, evaluation and saved prompts as causal models."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import batch_of, example_of, rows_of, write_experiment

from softprompt import SoftPrompt, UserError, load_base, load_experiment, load_prompt, train
from softprompt.backbones.batch import target_log_probabilities


@pytest.fixture(scope="session")
def base(t5_folder):
    return load_base(str(t5_folder))


quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@quick
def encode(backbone, embeddings, lengths, prefix):
    return backbone.encode(embeddings, lengths, prefix)[0]


@quick
def target_states(backbone, prefix, batch):
    return backbone.target_states(batch, prefix)


log_probabilities = quick(target_log_probabilities)


def scores(base, prefix, examples):
    batch = batch_of(examples, separate_targets=True)
    return rows_of(batch, log_probabilities(base.backbone, prefix, batch))


def test_candidates_in_one_row_score_the_same_as_separately(base):
    candidates = [[20, 21, 22], [23], [24, 25, 1]]
    prefix = base.backbone.prefill(jnp.ones((3, 16)))
    together = scores(base, prefix, [example_of([5, 6, 7, 1], candidates, 0)])[0]
    separate = []
    for candidate in candidates:
        example = example_of([5, 6, 7, 1], [candidate], 0)
        separate += scores(base, prefix, [example])[0, : len(candidate)].tolist()
    np.testing.assert_allclose(together, separate, atol=1e-5)


def test_padding_does_not_change_the_scores(base):
    examples = [
        example_of([5, 6, 7, 8, 9, 10, 11, 1], [[20, 21, 22]], 0),
        example_of([12, 1], [[23]], 0),
    ]
    prefix = base.backbone.prefill(jnp.ones((3, 16)))
    together = scores(base, prefix, examples)
    alone = scores(base, prefix, examples[1:])
    np.testing.assert_allclose(together[1, 0], alone[0, 0], atol=1e-5)


def test_a_target_depends_only_on_earlier_targets(base):
    def states(targets):
        batch = batch_of([example_of([5, 6, 1], [targets], 0)], separate_targets=True, padding=0)
        return np.asarray(target_states(base.backbone, None, batch))[0]

    before = states([20, 21, 22, 23])
    for changed in range(4):
        targets = [20, 21, 22, 23]
        targets[changed] = 30
        moved = (states(targets) != before).any(axis=-1)
        np.testing.assert_array_equal(moved, np.arange(4) > changed)


def test_the_prompt_is_prepended_to_the_input_of_the_encoder(base):
    vectors = jnp.asarray(np.random.default_rng(0).normal(size=(3, 16)), jnp.float32)
    example = example_of([5, 6, 1], [[20, 21]], 0)
    backbone, prefix = SoftPrompt(vectors).apply(base.backbone)
    got = scores(base, prefix, [example])

    prepended = SoftPrompt(vectors)(backbone.embedding(jnp.array([[5, 6, 1]])))
    expected = encode(backbone, prepended, jnp.array([6]), None)
    embeddings = backbone.embedding(jnp.array([[5, 6, 1]]))
    encoded = encode(backbone, embeddings, jnp.array([3]), prefix)
    np.testing.assert_allclose(encoded, expected, atol=1e-6)
    assert np.abs(got - scores(base, None, [example])).max() > 1e-3


LENGTHS = 2, 4  # range of text lengths: rows are padded, but all batches have one shape


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if record["split"] == "train"]


def test_training_evaluation_and_prediction_work_as_for_causal_models(t5_folder, tmp_path):
    overrides = [f"base={t5_folder}", "training.steps=40", "evaluation.every=40"]
    summary = train(
        load_experiment(write_experiment(tmp_path, *LENGTHS), overrides), tmp_path / "run"
    )
    assert summary["trainable_parameters"] == 3 * 16
    train_losses = losses(tmp_path / "run")
    assert train_losses[-1] < train_losses[0] - 0.2
    prompt = load_prompt(tmp_path / "run")
    (prediction,) = prompt.classify(["aaaa"])
    example = prompt.task.example(prompt.record("aaaa", ""), with_answer=False)
    target_scores = scores(prompt.base, prompt.prefix, [example])[0]
    low, high = target_scores[:3].sum(), target_scores[3:6].sum()
    np.testing.assert_allclose(
        prediction.probabilities["low"], 1 / (1 + np.exp(high - low)), rtol=1e-4
    )


def test_free_text_is_learned_and_generated(t5_folder, tmp_path):
    path = write_experiment(tmp_path, *LENGTHS)
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
        written = prompt.base.tokenizer(one.text).input_ids  # adds the end-of-text token
        example = prompt.task.example(prompt.record(source, ""), with_answer=False)
        example = dataclasses.replace(example, candidates=[written])
        batch = batch_of([example], separate_targets=True)
        states = target_states(prompt.base.backbone, prompt.prefix, batch)
        most_likely = prompt.base.backbone.logits(states)[0].argmax(axis=-1).tolist()
        assert most_likely[: len(written) - 1] == written[:-1]


def test_a_target_longer_than_the_context_window_is_rejected(t5_folder, tmp_path):
    path = write_experiment(tmp_path)
    overrides = [f"base={t5_folder}", "template.max_tokens=2"]
    with pytest.raises(UserError, match="its target has 3 tokens, but at most 2 fit"):
        train(load_experiment(path, overrides), tmp_path / "run")
