"""Teachers of distillation: rows of their own, trained runs, other base models, resumption."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, batch_of, example_of, golden_backbone
from flax import nnx
from test_conversations import base_with_turn_end, recorded_stops

from softprompt import (
    LoRA,
    SoftPrompt,
    TemplateSettings,
    TrainingBatches,
    UserError,
    load_experiment,
    make_task,
    train,
)
from softprompt.backbones import head as head_module
from softprompt.cli.main import main
from softprompt.data.examples import Examples
from softprompt.generation.engine import Engine
from softprompt.objectives import teacher as teacher_module
from softprompt.objectives.distillation import Distillation
from softprompt.objectives.model import Model
from softprompt.objectives.teacher import Teacher, read
from softprompt.training.preparation import Preparation
from softprompt.training.step import split

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


@jax.jit
def all_logits(backbone, prefix, batch):
    return backbone.logits(backbone.target_states(batch, prefix))[0]


def logits_of(backbone, prefix, examples) -> list[np.ndarray]:
    """The logits `[n, V]` of each candidate, in its own row."""
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
    method = SoftPrompt(jnp.asarray(vectors, jnp.float32), [~0, ~1, ~2])
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
    with pytest.raises(UserError, match="target tokens of the teacher differ"):
        TrainingBatches(STUDENT, 2, 0, all_candidates=True, teacher=Examples(changed))[0]
    with pytest.raises(UserError, match="target tokens of the teacher differ"):
        TrainingBatches(STUDENT, 2, 0, all_candidates=True, teacher=Examples(shorter))


def test_a_teacher_with_lora_holds_the_weights_of_the_base_once(tiny, experiment):
    """Apart from the matrices that LoRA adds, every array is the same object."""
    method = LoRA.build(experiment, tiny, [])
    _, _, frozen = split(method, tiny.backbone, Teacher(method.adapt(tiny.backbone)))
    own = {id(leaf): leaf.nbytes for leaf in jax.tree.leaves(nnx.state(tiny.backbone))}
    added = {id(leaf): leaf.nbytes for leaf in jax.tree.leaves(nnx.state(method))}
    held = {id(leaf): leaf.nbytes for leaf in jax.tree.leaves(frozen)}
    assert sum(held.values()) <= sum(own.values()) + sum(added.values())
    assert own.keys() <= held.keys()


def test_logits_beyond_the_vocabulary_of_the_other_model_are_left_out():
    """Some models of a family have more rows in the table than tokens in the vocabulary."""
    backbone = golden_backbone("gemma2-capped")
    larger = nnx.clone(backbone)
    table = larger.embedding.table  # of the head too
    table.set_value(jnp.pad(table[...], [(0, 5), (0, 0)], constant_values=3.0))
    method = SoftPrompt(jnp.ones((3, backbone.arch.hidden_size)), [~0, ~1, ~2])
    batch, losses = batch_of(STUDENT), []
    for other in (backbone, larger):
        model = Model(method, backbone, Teacher(other, read(backbone, [50, 51])))
        losses.append(float(jax.jit(Distillation())(model, batch, jax.random.key(0))[0]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_long_text_is_read_in_parts(monkeypatch):
    backbone, tokens = golden_backbone("qwen3-window"), list(range(5, 45))
    whole = read(backbone, tokens)
    monkeypatch.setattr(teacher_module, "_MOST_TOKENS", 16)
    parts = read(backbone, tokens)
    assert parts.length == whole.length == 40
    for one, other in zip(*map(jax.tree.leaves, (whole, parts)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def first_loss(experiment) -> float:
    """The loss before the first step."""
    prepared = Preparation().prepare(experiment)
    taught = prepared.taught.get("train")
    batch = TrainingBatches(prepared.examples["train"], 4, 0, teacher=taught)[0]
    model = Model(prepared.method, prepared.base.backbone, prepared.teacher)
    total, weight, _ = jax.jit(Distillation())(model, batch, jax.random.key(0))
    return float(total / weight)


@pytest.mark.parametrize("template", ["{word}={prompt}", "Tell me {word}:"])
def test_a_student_that_starts_from_its_teacher_has_no_loss(tiny, tmp_path, template):
    """The teacher is a trained prompt. Virtual tokens after a field are in the teacher's rows."""
    settings = TemplateSettings(input=template, target=" {answer}")
    task = make_task(tiny, settings, None, virtual_tokens=3)
    SoftPrompt.from_vocabulary(tiny, 3, jax.random.key(5)).save(tmp_path / "first", tiny, task)
    start = f"prompt={{length: 3, init: prompts, init_prompts: [{tmp_path / 'first'}]}}"
    run = f"run: {tmp_path / 'first'}"
    same = experiment_with(tmp_path, run, start, f"template.input='{template}'")
    assert first_loss(same) == pytest.approx(0, abs=1e-5)
    if template != "{word}={prompt}":
        assert first_loss(experiment_with(tmp_path, run, start)) > 1e-3


def test_a_teacher_of_the_same_base_model_begins_without_loss_for_lora(tmp_path):
    base = f"base: {GOLDEN / 'llama-grouped'}"
    found = first_loss(experiment_with(tmp_path, base, "method=lora"))
    assert found == pytest.approx(0, abs=1e-5)


def test_a_teacher_with_another_vocabulary_is_rejected(tmp_path):
    experiment = experiment_with(tmp_path, "base: smollm2-135m-instruct")
    with pytest.raises(UserError) as error:
        train(experiment, tmp_path / "run")
    (line,) = str(error.value).splitlines()
    assert "'smollm2-135m-instruct' does not have the vocabulary of" in line


def test_a_changed_teacher_is_noticed_and_a_missing_one_reported(tmp_path, capsys):
    manual = tmp_path / "manual.txt"
    manual.write_text("Say it twice.")
    experiment = experiment_with(tmp_path, f"context: {manual}")
    train(experiment, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    manual.write_text("Say it once.")
    with pytest.raises(UserError, match="its teacher has changed since the run began"):
        train(experiment, tmp_path / "run")

    manual.unlink()
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), "--split", "validation"]) == 0
    printed = capsys.readouterr()
    assert "objective_loss and agreement are not measured: " in printed.err
    assert json.loads(printed.out).keys() == {"split", "examples", "loss"}


def test_the_digest_of_an_objective_depends_on_the_teacher_and_the_weights(tmp_path):
    def digest(teacher, weights=None):
        prepared = Preparation().prepare(experiment_with(tmp_path, teacher))
        return prepared.objective_digest(weights)

    weights = np.ones(8, np.float32)
    digests = [digest("shots: 1"), digest("shots: 2"), digest("input: 'Tell {word}'")]
    digests += [digest("input: 'Say {word}'"), digest("shots: 1", weights)]
    digests.append(digest("shots: 1", 2 * weights))
    assert len(set(digests)) == 6
    assert digest("shots: 1", weights) == digests[4]


def test_a_teacher_writes_the_targets_once(tmp_path, monkeypatch, capsys):
    """A stopped run keeps the written targets. A complete file is not written again."""
    overrides = "objective.teacher.writes_targets=true", "generation.max_new_tokens=4"
    overrides += ("evaluation.batch_size=1",)
    experiment = experiment_with(tmp_path, "input: 'Repeat {word}:'", *overrides)
    summary = train(experiment, tmp_path / "whole")
    path = tmp_path / "whole" / "targets-train.jsonl"
    head, *lines = path.read_text().splitlines()
    written = [json.loads(line)["target"] for line in lines]
    records = map(json.loads, (tmp_path / "train.jsonl").read_text().splitlines())
    rows = [{**record, "answer": text} for record, text in zip(records, written, strict=True)]
    assert len(set(written)) > 1
    given = experiment_with(tmp_path, "input: 'Repeat {word}:'")
    given = Preparation().prepare(given, {"train": rows, "validation": rows})

    stopped = tmp_path / "stopped" / path.name
    stopped.parent.mkdir()
    stopped.write_text("\n".join([head, *lines[:4], lines[4][:-3]]))
    generated, generate = [], Engine.generate

    def counted(self, requests, *arguments, **options):
        generated.append(len(requests))
        return generate(self, requests, *arguments, **options)

    monkeypatch.setattr(Engine, "generate", counted)
    again = Preparation().prepare(experiment, folder=stopped.parent)
    assert generated[0] == 4
    assert stopped.read_text() == path.read_text()
    assert again.examples["train"].digest == given.examples["train"].digest
    generated.clear()
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "whole"), "--split", "validation"]) == 0
    assert sum(generated) == 0
    printed = json.loads(capsys.readouterr().out)
    for name in ("objective_loss", "agreement"):
        assert printed[name] == pytest.approx(summary["validation"][name], rel=1e-5)

    (tmp_path / "whole" / "summary.json").unlink()
    path.write_text("\n".join(['{"digest": "of another teacher"}', *lines, ""]))
    with pytest.raises(UserError, match="its teacher or data has changed since the run began"):
        train(experiment, tmp_path / "whole")


def test_a_run_that_stops_while_the_teacher_writes_goes_on(tmp_path, monkeypatch):
    overrides = "objective.teacher.writes_targets=true", "generation.max_new_tokens=2"
    overrides += ("evaluation.batch_size=1",)
    experiment = experiment_with(tmp_path, "input: 'Repeat {word}:'", *overrides)
    calls, generate = [], Engine.generate

    def interrupted(self, *arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "generate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(experiment, tmp_path / "run")
    written = (tmp_path / "run" / "targets-train.jsonl").read_text()
    assert len(written.splitlines()) == 5  # the first is about the teacher
    assert train(experiment, tmp_path / "run")["steps"] == 2
    assert (tmp_path / "run" / "targets-train.jsonl").read_text().startswith(written)


def test_written_targets_are_in_the_field_that_the_student_reads(tiny, tmp_path):
    """The template of the teacher has a target of two fields."""
    settings = TemplateSettings(input="Say {word}:", target="{word} {answer}")
    task = make_task(tiny, settings, None, virtual_tokens=3)
    SoftPrompt.from_vocabulary(tiny, 3, jax.random.key(5)).save(tmp_path / "first", tiny, task)
    run = f"run: {tmp_path / 'first'}, writes_targets: true"
    prepared = Preparation().prepare(experiment_with(tmp_path, run, "generation.max_new_tokens=4"))
    records = [example.record.fields for example in prepared.examples["train"]]
    assert all(record["answer"] != record["word"][:2].upper() for record in records)


def test_a_target_that_a_teacher_writes_ends_with_its_turn(tmp_path, monkeypatch):
    """In some chat templates, turns end with another token than texts."""
    base = base_with_turn_end(tmp_path)
    stops = recorded_stops(monkeypatch)
    chat = f"base={base}", "template={input: 'Say {word}', target: '{answer}', chat: true}"
    teacher = "input: 'Repeat {word}', writes_targets: true"
    Preparation().prepare(experiment_with(tmp_path, teacher, *chat, "generation.max_new_tokens=2"))
    assert stops
    assert all(stop == ["<|pad|>"] for stop in stops)


def test_experiments_with_the_same_teacher_share_it_and_its_targets(tmp_path):
    overrides = "objective.teacher.writes_targets=true", "generation.max_new_tokens=2"
    preparation = Preparation()
    first, second, third = (
        preparation.prepare(experiment_with(tmp_path, teacher, *overrides, *more))
        for teacher, more in (
            ("input: 'Repeat {word}:'", []),
            ("input: 'Repeat {word}:'", ["seed=1", "objective.temperature=2.0"]),
            ("shots: 1", []),
        )
    )
    assert second.teacher is first.teacher
    assert second.examples["train"] is first.examples["train"]
    assert second.taught["train"] is first.taught["train"]
    assert third.teacher is not first.teacher
    assert third.examples["train"] is not first.examples["train"]


@pytest.mark.parametrize("name", ["shots", "input"])
def test_a_teacher_of_plain_text_has_no_other_input(tmp_path, name):
    teacher = {"shots": "shots: 1", "input": "input: 'Repeat {word}:'"}[name]
    experiment = experiment_with(tmp_path, teacher, "template={text: word}")
    with pytest.raises(UserError, match=rf"objective.teacher.{name}: needs template.input"):
        Preparation().prepare(experiment)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("verbalizer={AA: A, BB: B}", "cannot be used with a verbalizer"),
        ("generation.temperature=0.5", "targets are decoded greedily"),
        ("template.target='{answer} {word}'", "needs a template.target with one {field}"),
    ],
)
def test_targets_that_a_teacher_cannot_write_are_rejected(tmp_path, override, message):
    with pytest.raises(UserError) as error:
        experiment_with(tmp_path, "shots: 1, writes_targets: true", override)
    assert message in str(error.value)


def test_targets_that_a_teacher_will_write_are_not_needed_to_show_examples(tmp_path, capsys):
    context = tmp_path / "context.txt"
    context.write_text("a b " * 24)  # 96 of the 128 tokens of the window
    records = [{"word": "long " * 9}, {"word": "ab"}]
    teacher = f"{{context: {context}, writes_targets: true}}"
    experiment_with(tmp_path, "shots: 1")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    arguments = ["show", str(tmp_path / "case.yaml"), f"objective.teacher={teacher}"]
    assert main([*arguments, "method=none"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "the teacher will write the targets ⟦?⟧ before training"
    assert lines[3] == f"{tmp_path}/train.jsonl:1 (29 tokens, 0 with loss, truncated):"
    assert lines[4].startswith("Say·long·long·")
    assert lines[4].endswith(":⟦?⟧")
    assert lines[6:] == [f"{tmp_path}/train.jsonl:2 (7 tokens, 0 with loss):", "Say·ab:⟦?⟧"]
    (tmp_path / "context.txt").unlink()
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "the token limit of the teacher is not known: " in captured.err
    assert f"{tmp_path}/train.jsonl:1 (53 tokens, 3 of them virtual, 0 with loss):" in captured.out
