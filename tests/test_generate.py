"""Generation with a trained prompt, against the model run anew for every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import write_experiment
from softprompt.inference.generate import greedy

from softprompt import UserError, load_experiment, load_prompt, train


@pytest.fixture(scope="module")
def prompt(tmp_path_factory, tiny):
    """A prompt for free text."""
    folder = tmp_path_factory.mktemp("free")
    path = write_experiment(folder)
    text = path.read_text().replace('verbalizer: {low: " ab", high: " cd"}\n', "")
    path.write_text(text.replace("metric: accuracy", "metric: loss"))
    train(load_experiment(path), folder / "run")
    return load_prompt(folder / "run", tiny)


LONGEST = 24


@jax.jit
def likeliest(backbone, prefix, tokens):
    """The likeliest token behind each of a row's, `[T]`."""
    return backbone.logits(backbone(backbone.embedding(tokens), prefix=prefix))[0].argmax(axis=-1)


def one_by_one(prompt, text, count):
    """The likeliest tokens behind a text, without a cache."""
    backbone, tokenizer = prompt.base.backbone, prompt.base.tokenizer
    tokens = list(prompt.task.example(prompt.record(text, ""), with_answer=False).input)
    start = len(tokens)
    for _ in range(count):
        padded = np.pad(tokens, (0, LONGEST - len(tokens)))[None]
        token = int(likeliest(backbone, prompt.prefix, padded)[len(tokens) - 1])
        if token == tokenizer.eos_token_id:
            break
        tokens.append(token)
    return tokenizer.decode(tokens[start:])


def test_texts_of_different_lengths_are_gone_on_with_as_each_alone(prompt):
    texts = ["aaaaaaa", "z", "mm"]
    written = prompt.generate(texts, max_new_tokens=5, batch_size=2)
    assert written == [one_by_one(prompt, text, 5) for text in texts]
    assert all(written)


def test_a_row_ends_at_its_end_token(prompt):
    backbone = prompt.base.backbone
    tokens, lengths = jnp.array([[70, 71, 0], [72, 73, 74]]), jnp.array([2, 3])
    free = np.asarray(greedy(backbone, prompt.prefix, tokens, lengths, -1, count=6))
    end = int(free[0, 2])
    ended = np.asarray(greedy(backbone, prompt.prefix, tokens, lengths, end, count=6))
    for row, other in zip(free, ended, strict=True):
        stop = np.append(np.flatnonzero(row == end), 6)[0]
        np.testing.assert_array_equal(other, [*row[:stop], *[end] * (6 - stop)])


def test_an_input_that_leaves_no_room_is_cut(prompt, capsys):
    (written,) = prompt.generate(["a" * 200], max_new_tokens=100)
    room = prompt.base.backbone.arch.context_length - prompt.prefix.length - 100
    assert f"inputs: 1 cut to {room} tokens" in capsys.readouterr().err
    assert isinstance(written, str)


@pytest.mark.parametrize("count", [0, 1000])
def test_more_than_the_model_has_room_for_is_refused(prompt, count):
    with pytest.raises(UserError, match=f"max_new_tokens {count}: the base model has room for 128"):
        prompt.generate(["a"], max_new_tokens=count)
