"""Every method through the same run; and what each makes of the backbone, by plain arithmetic."""

import json

import pytest
from conftest import write_experiment

from softprompt import load_experiment, load_prompt, train
from softprompt.data.examples import make_examples
from softprompt.data.records import read_records
from softprompt.evaluation.evaluate import evaluate

D, P = 32, 3

METHODS = {  # overrides, and the number of parameters learned
    "prompt": ([], P * D),
    "mlp": (["prompt.reparametrization=mlp", "prompt.size=5"], None),
    "lstm": (["prompt.reparametrization=lstm", "prompt.size=5"], None),
    "residual": (["prompt.reparametrization=residual", "prompt.size=5"], None),
    "low_rank": (["prompt.reparametrization=low_rank", "prompt.size=2"], 2 * (P + D)),
    "dept": (["method=dept", "dept.rank=2", "dept.positions=7"], P * D + 2 * (7 + D)),
    "prefix": (["method=prefix", "prefix.length=4"], 2 * 3 * 4 * 2 * 8),
    "prefix-network": (["method=prefix", "prefix.length=4", "prefix.size=6"], None),
    "lora": (["method=lora", "lora.rank=2", "lora.dropout=0.1"], None),
    "lora-int8": (["method=lora", "lora.targets=['*']", "compute.int8=true"], None),
    "full": (["method=full", "optimizer.learning_rate=3e-3"], None),
    "after-text": (["template.input='Letters: {prompt}{text} is'"], P * D),
    "in-place": (["template.input='{text}{prompt} is'"], P * D),
    "shots": (["shots=2", "template.max_tokens=40"], P * D),
    "prefix-shots": (["method=prefix", "prefix.length=4", "shots=2"], None),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_learns_and_is_loaded_as_it_was_measured(name, tmp_path):
    overrides, count = METHODS[name]
    if "optimizer.learning_rate" not in str(overrides):
        overrides = [*overrides, "optimizer.learning_rate=0.03"]
    path = write_experiment(tmp_path)
    experiment = load_experiment(path, ["training.steps=16", *overrides])
    summary = train(experiment, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [r["loss"] for r in map(json.loads, lines) if r["split"] == "train"]
    assert losses[-1] < losses[0]
    assert count is None or summary["trainable_parameters"] == count
    prompt = load_prompt(tmp_path / "run")
    examples = make_examples(prompt.task, read_records(experiment.data.test), "test")
    measured = evaluate(prompt.backbone, prompt.prefix, examples, 32, "test")
    assert measured == summary["test"]
