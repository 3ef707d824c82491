"""Infinity and NaN are never saved, loaded or shown as results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt import SoftPrompt, UserError, load_experiment, make_task, train
from softprompt.experiment.schema import TemplateSettings
from softprompt.inference.prompt import TrainedPrompt
from softprompt.methods import soft_prompt
from softprompt.runtime.finite import NotFiniteError
from softprompt.storage import arrays
from softprompt.storage.arrays import load_arrays, load_description, save_arrays
from softprompt.training.session import Session


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_arrays_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path, monkeypatch, value):
    folder, good = tmp_path / "saved", {"x": jnp.ones(3), "n": jnp.arange(2)}
    bad = good | {"x": good["x"].at[1].set(value)}
    save_arrays(folder, good, {}, "about.json")
    with pytest.raises(NotFiniteError, match="saved: not saved: infinite or NaN values in x"):
        save_arrays(folder, bad, {}, "about.json")
    load_description(folder, "about.json")
    np.testing.assert_array_equal(load_arrays(folder, good)["x"], 1)
    with monkeypatch.context() as patched:
        patched.setattr(arrays, "require_finite", lambda *_: None)
        save_arrays(folder, bad, {}, "about.json")
    with pytest.raises(NotFiniteError, match="infinite or NaN values in x"):
        load_arrays(folder, good)


@pytest.fixture
def broken(tiny):
    """Make a prompt that makes the model compute NaN."""

    def broken(verbalizer):
        task = make_task(tiny, TemplateSettings(input="{text}"), verbalizer, virtual_tokens=3)
        return TrainedPrompt.from_method(SoftPrompt(jnp.full((3, 32), jnp.nan)), tiny, task)

    return broken


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 1.0, "samples": 2},
        {"temperature": 1.0, "top_p": 0.9},
        {"repetition_penalty": 1.3},
        {"stop": ["a"]},
        {"beams": 2},
    ],
)
def test_generation_refuses_logits_that_are_not_finite(broken, settings):
    with pytest.raises(NotFiniteError, match="infinite or NaN logits"):
        broken(None).generate(["abc", "abcdefgh"], max_new_tokens=4, **settings)


def test_streaming_refuses_logits_that_are_not_finite(broken):
    with pytest.raises(NotFiniteError, match="infinite or NaN logits"):
        list(broken(None).stream("abc", max_new_tokens=4))


def test_labels_and_perplexities_refuse_scores_that_are_not_finite(broken):
    with pytest.raises(NotFiniteError, match="infinite or NaN scores"):
        broken({"low": "ab", "high": "cd"}).classify(["abc"])
    with pytest.raises(NotFiniteError, match="infinite or NaN scores"):
        broken(None).perplexity(["abc"], ["d"])


def test_initial_values_that_are_not_finite_are_refused(experiment, tmp_path, monkeypatch):
    vectors = jnp.full((3, 32), jnp.inf)
    monkeypatch.setattr(soft_prompt, "initial_vectors", lambda *_: vectors)
    with pytest.raises(NotFiniteError, match=r"initial values of method.vectors .* method prompt"):
        train(experiment, tmp_path / "run")


def test_an_update_that_is_not_finite_is_not_saved(experiment_file, tmp_path, monkeypatch):
    """A NaN in the optimizer's state does not change the loss of the same step."""
    experiment = load_experiment(experiment_file, ["checkpoints.every=2"])
    real = Session.accept

    def accept(self, trainable, opt_state, measured, **others):
        if self.run.step == 5:
            opt_state = jax.tree.map(lambda x: x * jnp.nan if x.ndim else x, opt_state)
        real(self, trainable, opt_state, measured, **others)

    monkeypatch.setattr(Session, "accept", accept)
    with pytest.raises(NotFiniteError, match=r"step 6: .* optimizer.* lower optimizer"):
        train(experiment, tmp_path / "run")
    assert max(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()) == 4
    assert isinstance(NotFiniteError("x"), UserError)
