"""Experiment files: how they are read, and the error messages about mistakes."""

import pytest
import yaml
from conftest import REPOSITORY

from softprompt import UserError, load_experiment
from softprompt.experiment.reading import ExperimentFile, differences, dump_experiment
from softprompt.experiment.schema import template_fields
from softprompt.sweep.space import Space

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
            "'labels' or 'prompts', "
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
        f"{file}:2: data.validation: missing; split the data, for example: "
        "head -n 100 all.jsonl > validation.jsonl; tail -n +101 all.jsonl > train.jsonl"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\n", "case.yaml:2: "),
        ("a: 1\na: 2\n", "case.yaml:2: a: given twice"),
        ("- a\n", "case.yaml:1: an experiment must be a mapping"),
        ("a: !!python/object:os.system x\n", "case.yaml:1: the tag !!python/object:os.system is not"),
        ("a: !!bool x\n", "case.yaml:1: 'x' is not of type bool"),
        ("a: &x {b: *x}\n", "case.yaml:1: nested too deeply"),
        ("extends: [a]\n", "case.yaml:1: extends: must be the path of another file"),
    ],
)
def test_an_invalid_file_is_rejected_with_its_line(file, text, message):
    file.write_text(text)
    assert message in mistakes(file)[0]


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
    ],
)
def test_invalid_values_and_combinations_are_rejected(file, override, message):
    assert any(message in line for line in mistakes(file, override))


def test_accuracy_and_init_labels_need_a_verbalizer(file):
    file.write_text(MINIMAL.replace('verbalizer: {yes: " yes", no: " no"}\n', ""))
    for override in ("evaluation.metric=accuracy", "prompt.init=labels"):
        key, value = override.split("=")
        assert mistakes(file, override) == [f"{file}:1: {key}: {value} needs a verbalizer"]


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


def test_a_saved_experiment_is_read_back_unchanged(file, tmp_path):
    overrides = ["data.test=hub:a/b#test", "base=./model", "verbalizer.no='1e5'", "name='1e-3'"]
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
