"""Experiment files: how they are read, and the error messages about mistakes."""

import os
from typing import get_args

import pydantic
import pytest
import yaml
from conftest import REPOSITORY

from softprompt import UserError, load_experiment
from softprompt.errors import FolderError
from softprompt.experiment.reading import ExperimentFile, differences, dump_experiment
from softprompt.experiment.schema import Experiment, template_fields
from softprompt.experiment.yaml_values import parse_yaml
from softprompt.storage.run_folder import open_run, write_config
from softprompt.sweep.space import Space

# Aliases that stand for 10^9 values.
_BOMB = "a0: &a0 [x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)

MINIMAL = """\
base: tiny
data:
  train: a.jsonl
  validation: /abs/b.jsonl
template:
  input: "{text}"
verbalizer: {yes: " yes", no: " no"}
training: {steps: 10}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "case.yaml"
    path.write_text(MINIMAL)
    return path


def mistakes(path, *overrides):
    with pytest.raises(UserError) as error:
        load_experiment(path, overrides)
    return str(error.value).splitlines()


def test_a_file_is_read_with_its_defaults(file):
    experiment = load_experiment(file)
    assert experiment.name == "case"
    assert experiment.verbalizer == {"yes": " yes", "no": " no"}
    assert (experiment.prompt.length, experiment.prompt.init) == (20, "vocabulary")
    assert experiment.data.train == str(file.parent / "a.jsonl")
    assert experiment.data.validation == "/abs/b.jsonl"


def test_overrides_are_typed_and_relative_to_the_current_folder(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    experiment = load_experiment(
        file,
        [
            "prompt.length=50",
            "optimizer.learning_rate=1e-3",
            "data.test=t.jsonl",
            "base=./m",
            "seed=3",
        ],
    )
    assert experiment.prompt.length == 50
    assert experiment.optimizer.learning_rate == 1e-3
    assert experiment.data.test == str(tmp_path.parent / "t.jsonl")
    assert experiment.base == str(tmp_path.parent / "m")
    assert experiment.seed == 3


def test_extends_merges_a_file_over_another(file):
    (file.parent / "sub").mkdir()
    child = file.parent / "sub" / "child.yaml"
    child.write_text("extends: ../case.yaml\ntraining: {batch_size: 4}\ndata: {train: c.jsonl}\n")
    experiment = load_experiment(child)
    assert experiment.name == "child"
    assert (experiment.training.steps, experiment.training.batch_size) == (10, 4)
    assert experiment.data.train == str(file.parent / "sub" / "c.jsonl")
    child.write_text(
        "extends: ../case.yaml\nprompt: {init: prompts, init_prompts: [../runs/a, /runs/b]}\n"
    )
    prompts = load_experiment(child).prompt.init_prompts
    assert prompts == [str(file.parent / "runs" / "a"), "/runs/b"]
    child.write_text("extends: child.yaml\n")
    assert "extends itself" in mistakes(child)[0]
    child.write_text("extends: other.yaml\n")
    assert mistakes(child) == [f"{child}:1: extends: other.yaml: no such file"]


def test_all_mistakes_are_reported_together_with_file_line_and_key(file):
    file.write_text(
        MINIMAL + "prompt:\n  lenght: 5\n  init: vocab\noptimizer: {learning_rate: fast}\nsede: 1\n"
    )
    lines = mistakes(file, "training.steps=0", "evaluation.evry=2")
    assert sorted(lines) == sorted(
        [
            f"{file}:10: prompt.lenght: unknown key; did you mean 'length'?",
            f"{file}:11: prompt.init: Input should be 'vocabulary', 'random', 'text', "
            "'labels', 'teacher' or 'prompts', "
            "not 'vocab'",
            f"{file}:12: optimizer.learning_rate: Input should be a valid number, not 'fast'",
            f"{file}:13: sede: unknown key; did you mean 'seed'?",
            "override training.steps=0: training.steps: "
            "Input should be greater than or equal to 1, not 0",
            "override evaluation.evry=2: evaluation.evry: unknown key; did you mean 'every'?",
        ]
    )


def test_a_missing_key_is_reported(file):
    file.write_text(MINIMAL.replace("  train: a.jsonl\n", "").replace("base: tiny\n", ""))
    assert mistakes(file) == [
        f"{file}:1: base: missing; for the default base model, add base: smollm2-135m-instruct",
        f"{file}:1: data.train: missing",
    ]
    file.write_text(MINIMAL.replace("  validation: /abs/b.jsonl\n", ""))
    assert mistakes(file) == [
        f"{file}:2: data.validation: missing; to take a tenth of the training data, "
        "set data.validation=0.1"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\n", "case.yaml:2: "),
        ("a: 1\na: 2\n", "case.yaml:2: a: given twice"),
        ("- a\n", "case.yaml:1: an experiment must be a mapping"),
        (
            "a: !!python/object:os.system x\n",
            "case.yaml:1: the tag !!python/object:os.system is not",
        ),
        ("a: !!bool x\n", "case.yaml:1: 'x' is not of type bool"),
        ("a: &x {b: *x}\n", "case.yaml:1: nested too deeply"),
        ("extends: [a]\n", "case.yaml:1: extends: must be the path of another file"),
        ("extends: '" + "a" * 5000 + "'\n", "aaa...: no such file"),
        ("extends: .\n", "not a regular file"),
        ("a: " + "[" * 100_000, "case.yaml:1: nested too deeply"),
        ("".join(f"{' ' * n}a:\n" for n in range(1000)), "case.yaml:10: nested too deeply"),
        (_BOMB, "more than 100,000 values"),
        (f"a: [{'0,' * 140_000}]", "more than 100,000 values"),
        (f"seed: 0x{'f' * 5000}", "case.yaml:1: a number of more than 1,000 characters"),
        (f"seed: {'9' * 5000}", "case.yaml:1: a number of more than 1,000 characters"),
        ("name: !!timestamp 2024-13-45", "case.yaml:1: the tag !!timestamp is not supported"),
        ("name: !!binary aGVsbG8=", "the tag !!binary is not supported"),
        ("name: !!set {a, b}", "the tag !!set is not supported"),
        ("name: !!omap [a: 1]", "the tag !!omap is not supported"),
        ("name: !!int ''", "'' is not of type int"),
        ('name: "\\ud800"', "case.yaml:1: a text with half of a surrogate pair"),
        ('verbalizer: {"\\udc00": a}', "case.yaml:1: a text with half of a surrogate pair"),
        ("? [a]\n: b\n", "case.yaml:1: a key must be text"),
        ("a: 1\n---\nb: 2\n", "case.yaml:2: a second document begins"),
        ("a: 1\nb: \0\n", "case.yaml:2: the character #x0000 is not allowed"),
        ("a: *b\n", "case.yaml:1: found undefined alias"),
        ("#" * 2**20 + "\n", "larger than 1 MiB"),
    ],
)
def test_an_invalid_file_is_rejected_with_its_line(file, text, message):
    file.write_text(text)
    (line,) = mistakes(file)
    assert message in line
    assert len(line) < 500


def test_a_file_that_is_not_text_and_a_pipe_are_rejected(file, tmp_path):
    file.write_bytes(b"name: caf\xe9\n")
    assert mistakes(file) == [f"{file}: not UTF-8 text (byte 9)"]
    os.mkfifo(tmp_path / "pipe.yaml")
    assert mistakes(tmp_path / "pipe.yaml") == [f"{tmp_path / 'pipe.yaml'}: not a regular file"]
    file.write_text("extends: pipe.yaml\n")
    assert mistakes(file) == [f"{tmp_path / 'pipe.yaml'}: not a regular file"]


def test_a_long_chain_of_files_is_rejected(file, tmp_path):
    for number in range(1000):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\n")
    assert "more than 10 files extend each other" in mistakes(tmp_path / "0.yaml")[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("template.input=text", "template.input: has no {field} to fill in"),
        ("template.input={text} {", "template.input: not a valid template"),
        ("training.steps.x=1", "override training.steps.x=1: training.steps: Input should"),
        ("trainig.steps=1", "override trainig.steps=1: trainig: unknown key; did you mean"),
        ("template.input='{text.x}'", "template.input: {text.x} is not a field name"),
        ("template.input='{text'", "template.input: not a valid template"),
        (
            "template.target='{a} {b}'",
            "template.target: with a verbalizer it must have one {field}",
        ),
        ("prompt.init=text", "init: text and init_text must be set together"),
        ("verbalizer.no=' yes'", "verbalizer: two labels have the same text"),
        ("optimizer.learning_rate=.inf", "Input should be a finite number"),
        ("name=!!timestamp 2024-13-45", "'!!timestamp 2024-13-45' is not a YAML value"),
        ("seed", "an override has the form key=value"),
        ("prompt.length=[", "'[' is not a YAML value"),
        ("base=" + "[" * 100_000, "is not a YAML value (nested too deeply)"),
        ("base=&a [*a]", "is not a YAML value (nested too deeply)"),
        ("data=&a {train: *a}", "is not a YAML value (nested too deeply)"),
        (f"seed=0x{'f' * 5000}", "(a number of more than 1,000 characters)"),
        (f"seed={'9' * 900}", "seed: Input should be less than 4294967296, not 999"),
        ("prompt" + ".a" * 5000 + "=1", "unknown key"),
        ("template.input={text}\ud800", "half of a surrogate pair"),
        ("verbalizer.yes='\ud800'", "the character #xd800 is not allowed"),
        ("data.train=~nosuchuser/a.jsonl", "data.train: the home folder of this user is unknown"),
        ("base=~nosuchuser", "base: the home folder of this user is unknown"),
        ('data.train="a\\0b"', "data.train: a path cannot contain NUL"),
        ("name=../../x", "name: must be the name of a folder"),
        ("name=a/b", "name: must be the name of a folder"),
        ("name=.hidden", "name: must be the name of a folder"),
        ('name="a\\0b"', "name: must be the name of a folder"),
        ("name=''", "name: must be the name of a folder"),
        ("name=" + "a" * 300, "name: must be the name of a folder"),
        ("prompt=5", "prompt: must be a mapping of keys to values, not 5"),
        ("optimizer.learning_rate=1e39", "less than or equal to 34000"),
        ("lora.alpha=1e300", "less than or equal to 1000000"),
        ("prompt.init_scale=1e300", "less than or equal to 1000000"),
        ("evaluation.metric=" + "x" * 5000, "is not one of loss, perplexity, accuracy"),
    ],
)
def test_invalid_values_and_combinations_are_rejected(file, override, message):
    lines = mistakes(file, override)
    assert any(message in line for line in lines)
    assert max(map(len, lines)) < 800


def _whole_numbers(model, prefix=""):
    """Find the keys of whole numbers in a schema."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel):
            yield from _whole_numbers(field.annotation, f"{prefix}{name}.")
        elif int in (field.annotation, *get_args(field.annotation)):
            yield f"{prefix}{name}"


def test_every_whole_number_has_an_upper_limit(file):
    keys = [*_whole_numbers(Experiment)]
    assert {"prompt.length", "lora.rank", "prompt.size", "training.steps", "shots"} <= {*keys}
    for key in keys:
        assert any("less than" in line for line in mistakes(file, f"{key}={10**12}")), key


def test_as_many_points_as_a_sweep_may_have_can_be_read():
    text = "points:\n" + "".join(f"- {{seed: {i}, shots: 1}}\n" for i in range(10_000))
    assert len(parse_yaml(text)[0]["points"]) == 10_000


def test_only_the_first_of_very_many_mistakes_are_listed(file):
    file.write_text(MINIMAL + "".join(f"k{n}: 1\n" for n in range(1000)))
    lines = mistakes(file)
    assert len(lines) == 21
    assert lines[-1] == f"{file}: and 980 more mistakes"


def test_a_section_in_an_override_replaces_the_paths_and_places_of_the_file(
    file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path.parent)
    (line,) = mistakes(file, "data={train: c.jsonl}")
    assert line.startswith("override data={train: c.jsonl}: data.validation: missing")
    data = load_experiment(file, ["data={train: c.jsonl, validation: d.jsonl}"]).data
    assert data.train == str(tmp_path.parent / "c.jsonl")


def test_the_accuracy_decides_if_there_is_a_verbalizer(file, tmp_path):
    free = [
        "verbalizer=null",
        "template.target={answer}",
    ]
    assert load_experiment(file).evaluation.metric == "accuracy"
    assert load_experiment(file, ["evaluation.every=5"]).evaluation.metric == "accuracy"
    assert load_experiment(file, free).evaluation.metric == "loss"
    loss = load_experiment(file, ["evaluation.metric=loss"])
    assert loss.evaluation.metric == "loss"
    for experiment in (loss, load_experiment(file)):
        (tmp_path / "config.yaml").write_text(dump_experiment(experiment, tmp_path))
        assert load_experiment(tmp_path / "config.yaml") == experiment


def test_an_old_run_keeps_its_metric_unless_the_experiment_names_another(file, tmp_path):
    run = tmp_path / "run"
    with open_run(run, load_experiment(file)):
        write_config(run, load_experiment(file, ["evaluation.metric=loss"]))
        (run / "checkpoints" / "1").mkdir(parents=True)
    with open_run(run, load_experiment(file)) as experiment:
        assert experiment.evaluation.metric == "loss"
    named = load_experiment(file, ["evaluation.metric=accuracy"])
    with pytest.raises(FolderError, match=r"evaluation\.metric: was 'loss', is now 'accuracy'"):
        open_run(run, named).__enter__()


def test_accuracy_and_init_labels_need_a_verbalizer(file):
    file.write_text(MINIMAL.replace('verbalizer: {yes: " yes", no: " no"}\n', ""))
    for override in ("evaluation.metric=accuracy", "prompt.init=labels"):
        key, value = override.split("=")
        assert mistakes(file, override, "seed=1") == [
            f"{file}:1 with override {override}: {key}: {value} needs a verbalizer"
        ]


def test_an_error_about_several_settings_names_the_overrides_that_cause_it(file):
    both = ["method=full", "seed=1", "compute={quantize: int8}"]
    assert mistakes(file, *both) == [
        f"{file}:1 with override method=full and override compute={{quantize: int8}}: "
        "method: full cannot train int8 matrices; lora can"
    ]
    assert mistakes(file, "prompt.length=5", "prompt.init=text") == [
        "override prompt.init=text: prompt: init: text and init_text must be set together"
    ]


def test_an_override_of_a_missing_key_does_not_cause_other_errors(file):
    text = MINIMAL.replace("base: tiny\n", "").replace('" yes", no', '" no", no')
    file.write_text(text)
    assert mistakes(file, "base=tiny") == [f"{file}:1: verbalizer: two labels have the same text"]


def test_extends_replaces_the_whole_verbalizer_and_an_override_sets_one_label(file):
    child = file.parent / "child.yaml"
    child.write_text("extends: case.yaml\nverbalizer: {good: a, bad: b}\n")
    assert load_experiment(child).verbalizer == {"good": "a", "bad": "b"}
    assert load_experiment(file, ["verbalizer.no=n"]).verbalizer == {"yes": " yes", "no": "n"}


def test_a_base_that_exists_as_a_path_is_resolved_like_other_paths(file):
    assert load_experiment(file).base == "tiny"
    (file.parent / "tiny").mkdir()
    assert load_experiment(file).base == str(file.parent / "tiny")


def test_all_invalid_overrides_are_reported(file):
    assert len(mistakes(file, "seed", "prompt.length=[")) == 2


def test_a_template_in_an_override_needs_no_quotes(file):
    assert load_experiment(file, ["template.input={text}!"]).template.input == "{text}!"


def test_numbers_and_booleans_follow_yaml_1_2(file):
    file.write_text(MINIMAL + "optimizer: {learning_rate: 1e-3}\nname: off\n")
    experiment = load_experiment(file)
    assert experiment.optimizer.learning_rate == 0.001
    assert experiment.name == "off"
    assert load_experiment(file, ["name=2024-13-45"]).name == "2024-13-45"
    assert load_experiment(file, ['name="\\ud83d\\ude00"']).name == "\U0001f600"


def test_a_saved_experiment_is_read_back_unchanged(file, tmp_path):
    overrides = ["data.test=hub:a/b#test", "base=./model", "verbalizer.no='1e5'", "name='1e-3'"]
    overrides += ["optimizer.learning_rate=1e38", "optimizer.clip_norm=1e-300"]
    overrides += ['generation.stop=["=", "<<", "2024-05-01", "~", "\\0", "\\u2028\\ufeff", "1:30"]']
    experiment = load_experiment(file, overrides)
    folder = tmp_path / "runs" / "case"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_experiment(experiment, folder))
    assert load_experiment(folder / "config.yaml") == experiment
    assert (
        yaml.safe_load((folder / "config.yaml").read_text())["data"]["train"] == "./../../a.jsonl"
    )


def test_differences_name_the_changed_keys(file):
    old, new = load_experiment(file), load_experiment(file, ["seed=1", "prompt.init=random"])
    old, new = old.model_dump(), new.model_dump()
    assert differences(old, old) == []
    assert differences(old, new) == [
        "seed: was 0, is now 1",
        "prompt.init: was 'vocabulary', is now 'random'",
    ]


def test_template_fields_are_listed_in_order_and_once():
    assert template_fields("{b} {{x}} {a} {b}") == ["b", "a"]


def test_all_experiments_in_the_repository_are_valid(tmp_path):
    files = sorted((REPOSITORY / "experiments").glob("*.yaml"))
    assert files
    for path in files:
        file = ExperimentFile(path)
        file.experiment()
        if file.sweep is not None:
            Space(file, tmp_path)
