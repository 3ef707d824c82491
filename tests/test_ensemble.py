"""Several prompts of one task together, compared with each of them alone."""

import dataclasses

import jax
import numpy as np
import pytest

from softprompt import SoftPrompt, TrainedPrompt, UserError, load_experiment
from softprompt.data.datasets import make_examples
from softprompt.data.records import read_records
from softprompt.data.task import make_task
from softprompt.evaluation.evaluate import evaluate
from softprompt.experiment.schema import TemplateSettings
from softprompt.inference.ensemble import evaluate_ensemble, shared_task

D = 32

_TEXT_AND_LABELS = TemplateSettings(input="{text} is"), {"low": " ab", "high": " cd"}


def test_an_ensemble_gives_the_scores_of_each_prompt_alone(experiment_file, tiny):
    """Prompts may have different lengths. Votes and mean probabilities are counted by hand."""
    prompts = []
    for seed, length in ((0, 3), (1, 5), (2, 3)):
        vectors = jax.random.normal(jax.random.key(seed), (length, D))
        task = make_task(tiny, *_TEXT_AND_LABELS, virtual_tokens=length)
        prompts.append(TrainedPrompt.from_method(SoftPrompt(vectors), tiny, task))
    experiment = load_experiment(experiment_file)
    examples = make_examples(prompts[0].task, read_records(experiment.data.train), "train")
    together = evaluate_ensemble(prompts, examples, 8, "train")
    every = []
    for number, prompt in enumerate(prompts, 1):
        model = prompt.backbone, prompt.prefix, prompt.task
        alone = evaluate(*model, examples, experiment, "train").values()
        np.testing.assert_allclose(together[str(number)]["loss"], alone["loss"], rtol=1e-5)
        predictions = prompt.classify(read_records(experiment.data.train), 8)
        every.append([[p.probabilities[label] for label in ("low", "high")] for p in predictions])
    chances, answers = np.array(every), np.array([e.answer for e in examples])
    votes = (chances.argmax(axis=-1).sum(axis=0) >= 2).astype(int)
    assert together["vote"]["accuracy"] == (votes == answers).mean()
    mean = chances.mean(axis=0).argmax(axis=-1)
    assert together["mean"]["accuracy"] == (mean == answers).mean()
    limits = [prompt.task.max_tokens for prompt in prompts]
    assert shared_task(prompts).max_tokens == min(limits) < max(limits)
    template = prompts[1].task.template.model_copy(update={"target": "It is {label}"})
    other = dataclasses.replace(
        prompts[1], task=dataclasses.replace(prompts[1].task, template=template)
    )
    with pytest.raises(UserError, match="prompt 2: its task differs from the first prompt's"):
        shared_task([prompts[0], other])
