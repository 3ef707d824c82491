"""Scores, metrics and predictions, against plain arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
from conftest import example_of

from softprompt import SoftPrompt
from softprompt.config import Template
from softprompt.data.task import make_task
from softprompt.evaluation.evaluate import evaluate, make_prefix, score, target_metrics
from softprompt.inference.inspect import nearest_tokens
from softprompt.inference.prompt import TrainedPrompt


def trained(base, vectors, verbalizer):
    method = SoftPrompt(vectors)
    task = make_task(base, Template(input="{text}:"), verbalizer, virtual_tokens=len(vectors))
    backbone = method.adapt(base.backbone)
    return TrainedPrompt(base, method, backbone, make_prefix(method, backbone), task, {})


def text_log_probability(base, prompt, text, continuation):
    """Log-probability of a continuation behind prompt and text, by the whole sequence."""

    def tokenize(text):
        return base.tokenizer(text, add_special_tokens=False).input_ids

    tokens = jnp.array([tokenize(text) + tokenize(continuation)])
    embeddings = SoftPrompt(prompt)(base.backbone.embedding(tokens))
    positions = jnp.arange(embeddings.shape[1])[None]
    logits = base.backbone.logits(base.backbone(embeddings, positions, jnp.zeros_like(positions)))
    log_probabilities = jax.nn.log_softmax(logits[0])
    first = len(prompt) + len(tokenize(text)) - 1
    return sum(float(log_probabilities[first + i, t]) for i, t in enumerate(tokenize(continuation)))


def test_probabilities_are_those_of_the_whole_texts(tiny):
    """Verbalizers of several tokens, one a beginning of another, texts of many lengths."""
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


def test_no_text_gives_no_prediction(tiny):
    assert trained(tiny, jnp.ones((1, 32)), {"a": "a", "b": "b"}).classify([]) == []


def test_metrics_of_known_scores():
    examples = [example_of([1], [[5, 6], [7]], answer) for answer in (0, 1, 1)]
    scores = np.log([[0.5, 0.1], [0.2, 0.4], [0.9, 0.3]])
    metrics = target_metrics(examples, scores)
    assert metrics["accuracy"] == 2 / 3
    np.testing.assert_allclose(metrics["loss"], -np.log(0.5 * 0.4 * 0.3) / (2 + 1 + 1))


def test_the_base_model_alone_is_evaluated_without_a_prefix(tiny):
    examples = [example_of([9 + i, 8], [[20, 21], [22]], i % 2) for i in range(5)]
    whole = evaluate(tiny.backbone, None, examples, 5, "all")
    parts = [evaluate(tiny.backbone, None, [e], 1, "one") for e in examples]
    assert whole["accuracy"] == np.mean([p["accuracy"] for p in parts])
    tokens = [2, 1, 2, 1, 2]
    np.testing.assert_allclose(
        whole["loss"], np.average([p["loss"] for p in parts], weights=tokens), rtol=1e-5
    )
    seen = [n for numbers, _ in score(tiny.backbone, None, examples, 2) for n in numbers]
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_nearest_tokens_of_token_embeddings_are_these_tokens(tiny):
    tokens = jnp.array([40, 41])
    vectors = 3 * tiny.backbone.embedding(tokens)
    near = nearest_tokens(trained(tiny, vectors, {"a": "a", "b": "b"}), 2)
    for token, virtual, vector in zip(tokens.tolist(), near, vectors, strict=True):
        assert virtual.nearest[0][0] == tiny.tokenizer.decode([token])
        np.testing.assert_allclose(virtual.nearest[0][1], 1, rtol=1e-5)
        np.testing.assert_allclose(virtual.norm, jnp.linalg.norm(vector), rtol=1e-5)
        assert virtual.nearest[1][1] < 1
