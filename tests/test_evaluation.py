"""Scores, metrics and predictions compared with plain arithmetic."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import example_of, write_experiment

from softprompt import SoftPrompt, UserError, load_experiment
from softprompt.data.records import Record
from softprompt.data.task import make_task
from softprompt.evaluation import scoring
from softprompt.evaluation.evaluate import evaluate, likelihood
from softprompt.evaluation.scoring import calibrated_scores, make_prefix, score
from softprompt.experiment.schema import ScoringSettings, TemplateSettings
from softprompt.inference.inspect import nearest_tokens
from softprompt.inference.prompt import TrainedPrompt
from softprompt.metrics.named import measure


def trained(base, vectors, verbalizer):
    method = SoftPrompt(vectors)
    task = make_task(
        base, TemplateSettings(input="{text}:"), verbalizer, virtual_tokens=len(vectors)
    )
    backbone = method.adapt(base.backbone)
    return TrainedPrompt(base, method, backbone, make_prefix(method, backbone), task, {})


@jax.jit
def sequence_log_probabilities(backbone, prompt, tokens):
    """Return the log-probabilities `[P + T, V]` after each position of prompt and tokens `[T]`."""
    embeddings = SoftPrompt(prompt)(backbone.embedding(tokens[None]))
    positions = jnp.arange(embeddings.shape[1])[None]
    logits = backbone.logits(backbone(embeddings, positions, jnp.zeros_like(positions)))
    return jax.nn.log_softmax(logits[0])


def text_log_probability(base, prompt, text, target):
    """Return the log-probability of a target after the prompt and a text."""

    def tokenize(text):
        return base.tokenizer(text, add_special_tokens=False).input_ids

    before, after = tokenize(text), tokenize(target)
    # Padding at the end does not change what precedes it, and all lengths share one program.
    tokens = np.zeros(40, np.int32)
    tokens[: len(before) + len(after)] = before + after
    found = np.asarray(sequence_log_probabilities(base.backbone, prompt, tokens))
    first = len(prompt) + len(before) - 1
    return sum(float(found[first + i, token]) for i, token in enumerate(after))


def test_probabilities_match_the_scores_of_whole_sequences(tiny):
    """Verbalizers have several tokens, one is a prefix of another, and lengths differ."""
    verbalizer = {"one": " ab", "two": " a", "three": "xyz"}
    vectors = jax.random.normal(jax.random.key(0), (4, 32))
    texts = ["first", "a", "the second, which is longer", "third"]
    predictions = trained(tiny, vectors, verbalizer).classify(texts, batch_size=2)
    for text, prediction in zip(texts, predictions, strict=True):
        scores = [text_log_probability(tiny, vectors, text + ":", v) for v in verbalizer.values()]
        expected = np.exp(scores) / np.exp(scores).sum()
        got = list(prediction.probabilities.values())
        np.testing.assert_allclose(got, expected, rtol=1e-4)
        assert prediction.label == list(verbalizer)[int(np.argmax(expected))]


def test_no_inputs_give_no_predictions(tiny):
    assert trained(tiny, jnp.ones((1, 32)), {"a": "a", "b": "b"}).classify([]) == []


def test_loss_and_perplexity_of_known_scores():
    examples = [example_of([1], [[5, 6], [7]], answer) for answer in (0, 1, 1)]
    scores = np.log([[0.5, 0.1], [0.2, 0.4], [0.9, 0.3]])
    loss = -np.log(0.5 * 0.4 * 0.3) / (2 + 1 + 1)
    assert likelihood("loss", examples, scores).values() == pytest.approx({"loss": loss})
    found = likelihood("perplexity", examples, scores).values()
    assert found == pytest.approx({"perplexity": np.exp(loss)})


def letters_experiment(tmp_path, *overrides):
    return load_experiment(write_experiment(tmp_path), overrides)


def records(*pairs):
    return [Record({"text": text, "label": label}, "a test") for text, label in pairs]


PAIRS = [("aaa", "low"), ("zz", "high"), ("m", "low"), ("qqqq", "high"), ("b", "low")]


def test_the_base_model_is_evaluated_without_a_prefix(tiny, tmp_path):
    experiment = letters_experiment(tmp_path, "evaluation.metrics=[macro_f1,matthews,perplexity]")
    task = make_task(tiny, experiment.template, experiment.verbalizer)
    examples = [task.example(record) for record in records(*PAIRS)]
    whole = evaluate(tiny.backbone, None, task, examples, experiment, "all")
    parts = [evaluate(tiny.backbone, None, task, [e], experiment, "one") for e in examples]
    values = whole.values()
    assert values["accuracy"] == np.mean([part.values()["accuracy"] for part in parts])
    tokens = [len(e.candidates[e.answer]) for e in examples]
    losses = [part.values()["loss"] for part in parts]
    assert values["loss"] == pytest.approx(np.average(losses, weights=tokens), rel=1e-5)
    assert values["perplexity"] == pytest.approx(np.exp(values["loss"]))
    assert list(values) == ["loss", "perplexity", "accuracy", "macro_f1", "matthews"]
    assert [sample["reference"] for sample in whole.samples] == [label for _, label in PAIRS]
    assert [sample["input"] for sample in whole.samples] == [{"text": text} for text, _ in PAIRS]
    right = [sample["prediction"] == sample["reference"] for sample in whole.samples]
    assert np.mean(right) == values["accuracy"]
    low, high = whole.intervals()["loss"]
    assert low < values["loss"] < high
    seen = [n for numbers, _ in score(tiny.backbone, None, examples, 2) for n in numbers]
    assert sorted(seen) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("settings", [{"normalize": True}, {"calibrate": "N/A"}, {}])
def test_scoring_settings_decide_how_labels_are_chosen(tiny, settings):
    verbalizer = {"one": " ab", "two": " a", "three": "xyz"}
    vectors = jax.random.normal(jax.random.key(0), (4, 32))
    prompt = dataclasses.replace(
        trained(tiny, vectors, verbalizer), scoring=ScoringSettings(**settings)
    )
    texts = ["first", "a", "the second, which is longer"]

    def scores(text):
        found = [text_log_probability(tiny, vectors, f"{text}:", v) for v in verbalizer.values()]
        return np.array(found)

    for text, prediction in zip(texts, prompt.classify(texts, batch_size=2), strict=True):
        expected = scores(text)
        if "calibrate" in settings:
            expected = expected - scores("N/A")
        if "normalize" in settings:
            expected = expected / [len(v) for v in verbalizer.values()]  # tokens are bytes
        shares = np.exp(expected) / np.exp(expected).sum()
        np.testing.assert_allclose(list(prediction.probabilities.values()), shares, rtol=1e-3)
        assert prediction.label == list(verbalizer)[int(expected.argmax())]


def test_a_batch_that_exceeds_memory_is_halved(tiny, monkeypatch, capsys):
    prompt = trained(tiny, jnp.ones((1, 32)), {"a": "a", "b": "bc"})
    texts = ["first", "a", "the second, which is longer", "four", "5"]
    expected, scores = prompt.classify(texts), scoring.candidate_scores

    def limited(backbone, prefix, batch, candidates):
        if batch.lengths.size > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return scores(backbone, prefix, batch, candidates)

    monkeypatch.setattr(scoring, "candidate_scores", limited)
    found = prompt.classify(texts, batch_size=5)
    assert "trying 2 instead of 5 inputs at a time" in capsys.readouterr().err
    for one, other in zip(found, expected, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, rel=1e-5)
    with pytest.raises(UserError, match="batch_size 0: must be 1 or more"):
        prompt.classify(texts, batch_size=0)


def test_scores_are_calibrated_before_they_are_normalized(tiny):
    scores = np.array([[-4.0, -1.5]])
    example = example_of([1, 2], [[5, 6], [7]], 0)
    task = make_task(tiny, TemplateSettings(input="{text}"), {"a": "ab", "b": "c"})
    both = ScoringSettings(normalize=True, calibrate="x")
    calibration = calibrated_scores(
        0 * scores, [example], tiny.backbone, None, task, ScoringSettings(calibrate="x")
    )
    found = calibrated_scores(scores, [example], tiny.backbone, None, task, both)
    np.testing.assert_allclose(found, (scores + calibration) / [2, 1], rtol=1e-6)


def test_perplexity_matches_the_scores_of_whole_sequences(tiny):
    vectors = jax.random.normal(jax.random.key(0), (4, 32))
    prompt = trained(tiny, vectors, None)
    texts, targets = ["first", "a"], ["abc", "q"]
    end = tiny.tokenizer.eos_token
    for text, target, found in zip(texts, targets, prompt.perplexity(texts, targets), strict=True):
        whole = text_log_probability(tiny, vectors, f"{text}:", target + end)
        assert found == pytest.approx(np.exp(-whole / (len(target) + 1)), rel=1e-4)
    assert prompt.perplexity([], []) == []
    with pytest.raises(UserError, match="2 inputs and 1 targets"):
        prompt.perplexity(texts, ["a"])
    with pytest.raises(UserError, match="perplexity needs free text"):
        trained(tiny, vectors, {"a": "a", "b": "b"}).perplexity(["a"], ["b"])


FREE = ["verbalizer=null", "evaluation.metric=rouge1.f1", "evaluation.metrics=[rouge1,exact_match]"]


def test_free_text_is_generated_and_measured(tiny, tmp_path):
    experiment = letters_experiment(tmp_path, *FREE, "generation.max_new_tokens=5")
    vectors = jax.random.normal(jax.random.key(0), (3, 32))
    task = make_task(tiny, experiment.template, None, virtual_tokens=3)
    method = SoftPrompt(vectors, task.opening)
    backbone = method.adapt(tiny.backbone)
    prefix = make_prefix(method, backbone)
    examples = [task.example(record) for record in records(*PAIRS)]
    measured = evaluate(backbone, prefix, task, examples, experiment, "all", max_generated=3)
    texts = [text for text, _ in PAIRS[:3]]
    prompt = TrainedPrompt(tiny, method, backbone, prefix, task, {})
    expected = [written.text.strip() for written in prompt.generate(texts, max_new_tokens=5)]
    assert [sample["prediction"] for sample in measured.samples] == expected
    assert [sample["reference"] for sample in measured.samples] == ["low", "high", "low"]
    assert list(measured.values())[:2] == ["loss", "rouge1.precision"]
    again = measure(["rouge1", "exact_match"], expected, ["low", "high", "low"])
    assert measured.values()["rouge1.f1"] == again["rouge1"].values()["rouge1.f1"]
    too_long = experiment.generation.model_copy(update={"max_new_tokens": 1000})
    experiment = experiment.model_copy(update={"generation": too_long})
    without_texts = evaluate(backbone, prefix, task, examples, experiment, "all", max_generated=0)
    assert list(without_texts.values()) == ["loss"]
    assert not without_texts.samples


def test_the_nearest_tokens_of_token_embeddings_are_the_tokens(tiny):
    tokens = jnp.array([40, 41])
    vectors = 3 * tiny.backbone.embedding(tokens)
    near = nearest_tokens(trained(tiny, vectors, {"a": "a", "b": "b"}), 2)
    for token, virtual, vector in zip(tokens.tolist(), near, vectors, strict=True):
        assert virtual.nearest[0][0] == tiny.tokenizer.decode([token])
        np.testing.assert_allclose(virtual.nearest[0][1], 1, rtol=1e-5)
        np.testing.assert_allclose(virtual.norm, jnp.linalg.norm(vector), rtol=1e-5)
        assert virtual.nearest[1][1] < 1
