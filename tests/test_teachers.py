"""Teachers of distillation: rows of their own, trained runs, other base models, resumption."""

import json

import jax
import numpy as np
import pytest
from conftest import GOLDEN, batch_of, example_of, golden_backbone

from softprompt import SoftPrompt, TrainingBatches, UserError, load_experiment, train
from softprompt.backbones import head as head_module
from softprompt.cli.main import main
from softprompt.data.examples import Examples
from softprompt.generation.engine import Engine
from softprompt.objectives import teacher as teacher_module
from softprompt.objectives.distillation import Distillation
from softprompt.objectives.model import Model
from softprompt.objectives.teacher import Teacher, read

EXPERIMENT = f"""\
base: {GOLDEN / "llama-grouped"}
data: {{train: train.jsonl, validation: train.jsonl}}
template: {{input: "Say {{word}}:", target: " {{answer}}"}}
prompt: {{length: 3}}
objective: {{name: distill, teacher: {{TEACHER}}}}
training: {{steps: 2, batch_size: 4, log_every: 1}}
evaluation: {{every: 2, samples: 0}}
"""
STUDENT = [
    example_of([5, 6, 7, 8], [[20, 21, 22], [30, 31]], 0),
    example_of([9, 10], [[23], [24, 25, 26, 27]], 0),
]
TAUGHT = [  # the same targets after other inputs
    example_of([40, 5, 6, 41, 7, 8, 42], [[20, 21, 22], [30, 31]], 0),
    example_of([43, 9], [[23], [24, 25, 26, 27]], 0),
]


def experiment_with(folder, teacher: str, *overrides: str):
    records = [{"word": letter * 3, "answer": letter.upper() * 2} for letter in "abcdefgh"]
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "train.jsonl").write_text("".join(lines))
    path = folder / "case.yaml"
    path.write_text(EXPERIMENT.replace("TEACHER", teacher))
    return load_experiment(path, overrides)


def records_in(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def losses_of(folder) -> list[float]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["split"] == "train"]


@jax.jit
def all_logits(backbone, prefix, batch):
    return backbone.logits(backbone.target_states(batch, prefix))[0]


def logits_of(backbone, prefix, examples) -> list[np.ndarray]:
    """The logits `[n, V]` of each candidate, which has a row of its own."""
    alone = [
        example_of(example.input, [candidate], 0)
        for example in examples
        for candidate in example.candidates
    ]
    logits = all_logits(backbone, prefix, batch_of(alone, backbone.separate_targets))
    ends = np.cumsum([len(example.candidates[0]) for example in alone])
    return np.split(np.asarray(logits, np.float64)[: ends[-1]], ends[:-1])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


@pytest.mark.parametrize("variant", ["gemma2-capped", "t5-gated"])
def test_a_teacher_with_rows_of_its_own_matches_the_formula(variant, monkeypatch):
    """The batch is the one that training makes, in which rows are shuffled."""
    monkeypatch.setattr(head_module, "_MAX_LOGITS", 1)
    backbone = golden_backbone(variant)
    vectors = np.random.default_rng(0).normal(size=(3, backbone.arch.hidden_size))
    method = SoftPrompt(jax.numpy.asarray(vectors, "float32"), [~0, ~1, ~2])
    teacher = Teacher(backbone, read(backbone, [50, 51]))
    batch = TrainingBatches(
        STUDENT,
        2,
        0,
        all_candidates=True,
        separate_targets=backbone.separate_targets,
        teacher=Examples(TAUGHT),
    )[0]
    students = logits_of(*method.apply(backbone), STUDENT)
    teachers = logits_of(backbone, teacher.prefix, TAUGHT)
    divergences, agreement = [], []
    for ours, theirs in zip(students, teachers, strict=True):
        log_p, log_q = log_softmax(theirs), log_softmax(ours)
        divergences += (np.exp(log_p) * (log_p - log_q)).sum(axis=-1).tolist()
        agreement += (ours.argmax(axis=-1) == theirs.argmax(axis=-1)).tolist()
    model = Model(method, backbone, teacher)
    total, weight, metrics = jax.jit(Distillation())(model, batch, jax.random.key(0))
    assert weight == len(divergences)
    assert float(total / weight) == pytest.approx(np.mean(divergences), rel=1e-5)
    assert float(metrics["agreement"] / weight) == pytest.approx(np.mean(agreement))


def test_other_targets_of_the_teacher_are_rejected():
    changed = [TAUGHT[0], example_of([43, 9], [[23], [24, 25, 26, 28]], 0)]
    shorter = [TAUGHT[0], example_of([43, 9], [[23], [24, 25]], 0)]
    with pytest.raises(UserError, match="tokens of a target differ"):
        TrainingBatches(STUDENT, 2, 0, all_candidates=True, teacher=Examples(changed))[0]
    with pytest.raises(UserError, match="tokens of a target differ"):
        TrainingBatches(STUDENT, 2, 0, all_candidates=True, teacher=Examples(shorter))


def test_a_long_text_is_read_in_parts(monkeypatch):
    backbone, tokens = golden_backbone("qwen3-window"), list(range(5, 45))
    whole = read(backbone, tokens)
    monkeypatch.setattr(teacher_module, "_MOST_TOKENS", 16)
    parts = read(backbone, tokens)
    assert parts.length == whole.length == 40
    for one, other in zip(*map(jax.tree.leaves, (whole, parts)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_student_that_starts_from_its_teacher_has_no_loss(tmp_path):
    """The teacher is a trained prompt. Its text is not in the student's template."""
    first = experiment_with(tmp_path, "input: 'Tell me {word}'", "template.input='{word}={prompt}'")
    train(first, tmp_path / "first")
    start = f"prompt={{length: 3, init: prompts, init_prompts: [{tmp_path / 'first'}]}}"
    run, same = f"run: {tmp_path / 'first'}", "template.input='{word}={prompt}'"
    train(experiment_with(tmp_path, run, start, same), tmp_path / "same")
    assert losses_of(tmp_path / "same")[0] == pytest.approx(0, abs=1e-5)
    train(experiment_with(tmp_path, run, start), tmp_path / "other")
    assert losses_of(tmp_path / "other")[0] > 1e-3


def test_a_teacher_of_another_base_model_has_its_own_weights(tmp_path):
    """LoRA begins as the base model, so its loss is 0 if the teacher is the same model."""
    lora, base = "method=lora", f"base: {GOLDEN / 'llama-grouped'}"
    train(experiment_with(tmp_path, base, lora), tmp_path / "same")
    assert losses_of(tmp_path / "same")[0] == pytest.approx(0, abs=1e-5)


def test_a_teacher_with_another_vocabulary_is_rejected(tmp_path):
    experiment = experiment_with(tmp_path, "base: smollm2-135m-instruct")
    with pytest.raises(UserError, match="has another vocabulary than"):
        train(experiment, tmp_path / "run")


def test_eval_measures_the_objective(tmp_path, capsys):
    experiment = experiment_with(tmp_path, "input: 'Repeat {word}.'")
    summary = train(experiment, tmp_path / "run")
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), "--split", "validation"]) == 0
    printed = json.loads(capsys.readouterr().out)
    for name in ("objective_loss", "agreement"):
        assert printed[name] == pytest.approx(summary["validation"][name], rel=1e-5)


def test_a_changed_teacher_is_noticed_on_resumption(tmp_path):
    manual = tmp_path / "manual.txt"
    manual.write_text("Say it twice.")
    experiment = experiment_with(tmp_path, f"context: {manual}")
    train(experiment, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    manual.write_text("Say it once.")
    with pytest.raises(UserError, match="its teacher has changed since the run began"):
        train(experiment, tmp_path / "run")
    manual.write_text("Say it twice.")
    train(experiment, tmp_path / "run")


def test_changed_weights_are_noticed_on_resumption(tmp_path):
    override = "objective={weights: weight}"
    experiment = experiment_with(tmp_path, "shots: 1", override)
    rows = [
        {"word": letter, "answer": letter, "weight": number + 1}
        for number, letter in enumerate("abcdefgh")
    ]
    train(experiment, tmp_path / "run", records={"train": rows})
    (tmp_path / "run" / "summary.json").unlink()
    changed = [{**row, "weight": 1} for row in rows]
    with pytest.raises(UserError, match="its data has changed since the run began"):
        train(experiment, tmp_path / "run", records={"train": changed})


def test_a_teacher_writes_the_targets_once(tmp_path, monkeypatch, capsys):
    """A killed run keeps what is written. A finished file is not written again."""
    overrides = "objective.teacher.writes_targets=true", "generation.max_new_tokens=4"
    experiment = experiment_with(tmp_path, "input: 'Repeat {word}:'", *overrides)
    experiment = experiment.model_copy(
        update={"evaluation": experiment.evaluation.model_copy(update={"batch_size": 1})}
    )
    train(experiment, tmp_path / "whole")
    path = tmp_path / "whole" / "targets-train.jsonl"
    head, *lines = path.read_text().splitlines()
    teacher_rows = [
        {"word": record["word"], "answer": json.loads(line)["target"]}
        for record, line in zip(records_in(tmp_path), lines, strict=True)
    ]
    assert len({row["answer"] for row in teacher_rows}) > 1

    same = experiment_with(tmp_path, "input: 'Repeat {word}:'")
    rows = {"train": teacher_rows, "validation": teacher_rows}
    train(same, tmp_path / "given", records=rows)
    assert losses_of(tmp_path / "given") == losses_of(tmp_path / "whole")

    stopped = tmp_path / "stopped" / path.name
    stopped.parent.mkdir()
    stopped.write_text("\n".join([head, *lines[:4], lines[4][:-3]]))
    generated = []
    generate = Engine.generate

    def counted(self, requests, *arguments, **options):
        generated.append(len(requests))
        return generate(self, requests, *arguments, **options)

    monkeypatch.setattr(Engine, "generate", counted)
    train(experiment, stopped.parent)
    assert generated[0] == 4
    assert stopped.read_text() == path.read_text()
    generated.clear()
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "whole"), "--split", "validation"]) == 0
    assert generated == [0]  # no targets, and no samples
    printed = json.loads(capsys.readouterr().out)
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert printed["objective_loss"] == pytest.approx(summary["validation"]["objective_loss"])

    (tmp_path / "whole" / "summary.json").unlink()
    path.write_text("\n".join(['{"digest": "of another teacher"}', *lines, ""]))
    with pytest.raises(UserError, match="its teacher or data has changed since the run began"):
        train(experiment, tmp_path / "whole")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("verbalizer={AA: A, BB: B}", "needs free text"),
        ("generation.temperature=0.5", "targets are greedy"),
        ("template.target='{answer} {word}'", "needs a template.target with one {field}"),
    ],
)
def test_targets_that_a_teacher_cannot_write_are_rejected(tmp_path, override, message):
    with pytest.raises(UserError) as error:
        experiment_with(tmp_path, "shots: 1, writes_targets: true", override)
    assert message in str(error.value)
