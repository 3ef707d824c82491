"""The experiments in the repository: their data, and a short run on SmolLM2."""

import itertools

import pytest
from conftest import REPOSITORY

from softprompt import load_experiment, load_prompt, train
from softprompt.data.records import read_records
from softprompt.experiment.reading import ExperimentFile
from softprompt.experiment.templates import template_fields
from softprompt.storage.run_folder import read_metrics

EXPERIMENTS = sorted((REPOSITORY / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_the_splits_of_every_experiment_are_complete_and_disjoint(file):
    experiment = ExperimentFile(file).experiment()
    template, inputs = experiment.template, {}
    for split, source in experiment.data.model_dump(exclude_none=True).items():
        records = read_records(source)
        fields = template_fields(template.input)
        inputs[split] = {tuple(record.text(field) for field in fields) for record in records}
        for record in records:
            (target,) = template_fields(template.target)
            assert not experiment.verbalizer or record.text(target) in experiment.verbalizer
    assert {"train", "validation"} <= inputs.keys()
    for one, other in itertools.combinations(inputs.values(), 2):
        assert not one & other


@pytest.mark.usefixtures("optimized")
def test_the_loss_falls_on_movie_reviews_and_the_prompt_loads(smollm2, tmp_path):
    overrides = ["training.steps=12", "training.log_every=2", "training.batch_size=8"]
    overrides += ["optimizer.warmup_steps=2", "evaluation.examples=32"]
    overrides += ["template.max_tokens=24"]  # short rows, and few shapes to compile
    experiment = load_experiment(REPOSITORY / "experiments" / "sentiment.yaml", overrides)
    data = experiment.data.model_copy(update={"test": None})
    records = {"train": read_records(data.train)[:1000]}
    train(experiment.model_copy(update={"data": data}), tmp_path / "run", records=records)
    losses = [r["loss"] for r in read_metrics(tmp_path / "run") if r["split"] == "train"]
    assert len(losses) == 6
    assert sum(losses[-2:]) < 0.6 * sum(losses[:2])
    prompt = load_prompt(tmp_path / "run", smollm2)
    probabilities = [p.probabilities for p in prompt.classify(["Wonderful!", "Dreadful."])]
    assert probabilities[0]["positive"] > probabilities[1]["positive"]
