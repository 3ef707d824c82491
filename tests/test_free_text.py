"""Runs on free text: generated texts are measured, saved and used by commands."""

import dataclasses
import json

import pytest
from conftest import write_experiment

from softprompt import UserError, load_experiment, load_prompt, train
from softprompt.experiment.schema import GenerationSettings
from softprompt.generation.engine import Engine
from softprompt.metrics.named import measure
from softprompt.storage.run_folder import read_metrics, write_samples

FREE = [
    "verbalizer=null",
    "evaluation.metrics=[rouge1,bleu,perplexity]",
    "evaluation.metric=rouge1.f1",
    "evaluation.samples=4",
    "generation.max_new_tokens=6",
    'generation.stop=["q"]',
]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("free")
    summary = train(load_experiment(write_experiment(folder, 5, 5), FREE), folder / "run")
    return folder / "run", summary


def test_samples_of_every_evaluation_are_saved(run):
    folder, summary = run
    samples = lines(folder / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [4] * 4 + [8] * 4 + [12] * 4
    assert list(samples[0]) == ["step", "input", "reference", "prediction"]
    first = lines(folder.parent / "validation.jsonl")[:4]
    assert [sample["input"]["text"] for sample in samples[:4]] == [r["text"] for r in first]
    best = [sample for sample in samples if sample["step"] == summary["best_step"]]
    answers = [sample["prediction"] for sample in best], [sample["reference"] for sample in best]
    assert measure(["rouge1"], *answers)["rouge1"].values().items() <= summary["validation"].items()


def test_the_prompt_with_the_best_generated_texts_is_kept(run):
    folder, summary = run
    by_step = {r["step"]: r for r in read_metrics(folder) if r["split"] == "validation"}
    best = max(by_step.values(), key=lambda r: (r["rouge1.f1"], -r["loss"]))
    assert summary["best_step"] == best["step"]


def test_all_test_examples_are_answered_and_scored(run, call):
    folder, summary = run
    answers = lines(folder / "predictions.jsonl")
    assert len(answers) == 7
    _, out, _ = call("score", "--metrics", "rouge1,bleu", "--json", folder / "predictions.jsonl")
    scored = json.loads(out)
    for name in ("rouge1.f1", "rouge1.precision", "rouge1.recall", "bleu"):
        assert summary["test"][name] == pytest.approx(scored[name])
        assert summary["test_intervals"][name] == pytest.approx(scored["intervals"][name])
    low, high = summary["test_intervals"]["loss"]
    assert low <= summary["test"]["loss"] <= high


def test_eval_agrees_with_the_summary_and_writes_predictions(run, call, tmp_path):
    folder, summary = run
    status, out, _ = call("eval", folder, "--output", tmp_path / "answers.jsonl")
    assert status == 0
    assert json.loads(out) == pytest.approx({"split": "test", "examples": 7, **summary["test"]})
    assert lines(tmp_path / "answers.jsonl") == lines(folder / "predictions.jsonl")
    _, out, _ = call("eval", folder, "--metrics", "exact_match")
    assert set(json.loads(out)) == {"split", "examples", "loss", "exact_match"}


def test_eval_generates_nothing_if_no_metric_needs_texts(run, call, monkeypatch):
    folder, _ = run
    monkeypatch.setattr(Engine, "_run_batch", None)
    _, out, _ = call("eval", folder, "--metrics", "perplexity")
    assert set(json.loads(out)) == {"split", "examples", "loss", "perplexity"}


def test_generate_uses_the_saved_settings_and_its_own_options(run, call, tiny):
    folder, _ = run
    prompt = load_prompt(folder, tiny)
    assert prompt.generation.max_new_tokens == 6
    texts = [written.text for written in prompt.generate(["aaa", "zz"])]
    status, out, _ = call("generate", folder, "aaa", "zz")
    assert (status, out) == (0, "".join(f"{text}\n" for text in texts))
    _, out, _ = call("generate", folder, "--json", "--max-new-tokens", "2", "aaa", "zz")
    shorter = prompt.generate(["aaa", "zz"], max_new_tokens=2)
    assert [json.loads(line) for line in out.splitlines()] == [
        {"input": {"text": text}, "texts": each.texts, "ended": each.ended}
        for text, each in zip(["aaa", "zz"], shorter, strict=True)
    ]
    drawing = dataclasses.replace(prompt, generation=GenerationSettings(temperature=1.0, top_k=3))
    greedy = prompt.generate(["aaa"], max_new_tokens=6, stop=[])
    assert drawing.generate(["aaa"], max_new_tokens=6, temperature=0) == greedy
    drawn = ["--temperature", "1", "--samples", "2", "--seed", "3", "--stop", "a", "--stop", "b"]
    _, out, _ = call("generate", folder, "--json", *drawn, "aaa")
    settings = {"temperature": 1.0, "samples": 2, "seed": 3, "stop": ["a", "b"]}
    assert json.loads(out)["texts"] == prompt.generate(["aaa"], **settings)[0].texts


def test_a_terminal_shows_a_text_while_it_is_generated(run, call, tiny, monkeypatch):
    folder, _ = run
    (written,) = load_prompt(folder, tiny).generate(["aaa"])
    pieces = []
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("builtins.print", lambda *p, end="\n", **_: pieces.append(*p or [end]))
    assert call("generate", folder, "aaa")[0] == 0
    assert "".join(pieces) == f"{written.text}\n"
    assert len(pieces) > 2


def test_samples_of_steps_that_will_be_repeated_are_removed(tmp_path):
    sample = {"input": {"text": "a"}, "reference": "b", "prediction": "c"}
    for step in (4, 8, 4):
        write_samples(tmp_path, step, [sample])
    assert [line["step"] for line in lines(tmp_path / "samples.jsonl")] == [4]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.metrics=[rogue]"], "no metric 'rogue'"),
        (["evaluation.metric=bleu", "evaluation.metrics=[rouge]"], "metric: 'bleu' is not one of"),
        (["evaluation.metric=accuracy"], "accuracy needs a verbalizer"),
        (["evaluation.samples=0"], "rouge1.f1 needs evaluation.samples"),
        (["scoring.normalize=true"], "scoring needs a verbalizer"),
        (["generation.top_k=4"], "top_k needs a temperature"),
        (["generation.samples=4"], "samples: several samples need a temperature"),
        (["scoring.calibrate=' '", "verbalizer={low: a, high: b}"], "should match pattern"),
        (["generation.beams=4", "generation.temperature=1.0"], "beams: beam search cannot use"),
    ],
)
def test_invalid_combinations_are_rejected(experiment_file, overrides, message):
    with pytest.raises(UserError, match=message):
        load_experiment(experiment_file, [*FREE, *overrides])
