"""Forgetting: the loss on plain text with what is trained, minus the loss without."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from softprompt import LoRA, SoftPrompt, UserError
from softprompt.evaluation.forgetting import forgetting

TEXTS = ["The river is long.", "Snow!", "Birds sing in the early morning."]


def losses(base, vectors) -> list[np.ndarray]:
    """The loss of each token but the first, one text at a time, from all logits."""
    found = []
    for text in TEXTS:
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
