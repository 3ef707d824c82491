"""The trials of a sweep, and the error messages about its settings."""

import json

import numpy as np
import pytest

from softprompt import UserError
from softprompt.cli.main import main


def parameters(space):
    return [dict(trial.parameters) for trial in space.trials()]


def test_a_grid_has_every_combination(space):
    found = parameters(space("  prompt.length: [1, 5]\n  seed: [0, 1]\n"))
    assert found == [
        {"prompt.length": 1, "seed": 0},
        {"prompt.length": 1, "seed": 1},
        {"prompt.length": 5, "seed": 0},
        {"prompt.length": 5, "seed": 1},
    ]


def test_zip_and_points_have_the_listed_combinations(space):
    expected = [{"prompt.length": 1, "seed": 4}, {"prompt.length": 5, "seed": 7}]
    assert parameters(space("  how: zip\n  prompt.length: [1, 5]\n  seed: [4, 7]\n")) == expected
    assert parameters(space(f"  points: {json.dumps(expected)}\n")) == expected
    nested = [{"prompt": {"length": 1}, "seed": 4}, {"prompt": {"length": 5}, "seed": 7}]
    assert parameters(space(f"  points: {json.dumps(nested)}\n")) == expected


def test_random_trials_stay_in_their_ranges_and_do_not_depend_on_the_number_of_trials(space):
    section = """\
  how: random
  trials: 200
  optimizer.learning_rate: {low: 1e-4, high: 1e-1, log: true}
  prompt.length: {low: 1, high: 4}
  optimizer.weight_decay: {low: 0.0, high: 1.0}
  seed: [0, 1]
"""
    found = parameters(space(section))
    rates = np.log10([p["optimizer.learning_rate"] for p in found])
    assert -4 <= rates.min() < -3.8
    assert -1.2 < rates.max() <= -1
    np.testing.assert_allclose(
        np.quantile(rates, [0.25, 0.5, 0.75]), [-3.25, -2.5, -1.75], atol=0.3
    )
    lengths = [p["prompt.length"] for p in found]
    assert {lengths.count(n) > 30 for n in (1, 2, 3, 4)} == {True}
    assert all(isinstance(n, int) for n in lengths)
    assert abs(np.mean([p["optimizer.weight_decay"] for p in found]) - 0.5) < 0.1
    assert {p["seed"] for p in found} == {0, 1}
    assert parameters(space(section, "sweep.trials=3")) == found[:3]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("  promt.length: [1]\n", "letters.yaml:10: sweep.promt.length: unknown key"),
        ("  prompt.lenth: [1]\n", "prompt.lenth: unknown key; did you mean 'length'?"),
        ("  prompt.length: [0]\n", "letters.yaml:10: prompt.length: Input should be greater"),
        (
            "  prompt.length: 3\n",
            "sweep.prompt.length: must be a list of values, or {low: ..., high: ...}",
        ),
        ("  prompt.length: []\n", "sweep.prompt.length: must be a list of values"),
        ("  prompt.length: {low: 5, high: 1}\n", "sweep.prompt.length: low must be less than high"),
        ("  seed: {low: 0, high: 9}\n", "a range needs how: random or how: tpe"),
        ("  seed: [0]\n  how: random\n", "how: random and how: tpe need trials"),
        ("  seed: [0]\n  trials: 3\n", "grid and zip do not accept it"),
        (
            "  seed: [0]\n  prompt.length: [1, 2]\n  how: zip\n",
            "zip needs the same number of values",
        ),
        ("  how: grid\n", "give keys of the experiment with lists of values, or points"),
        ("  seed: [0]\n  halving: {rungs: [3]}\n", "3 must be a multiple of evaluation.every (4)"),
        ("  seed: [0]\n  halving: {rungs: [12]}\n", "less than training.steps (12)"),
        ("  seed: [0]\n  halving: {rungs: [4], factr: 2}\n", "unknown key; did you mean 'factor'?"),
        ("  seed: [0]\n  halving: {rungs: [8, 4]}\n", "rungs must increase"),
        ("  points: [{seed: 1}]\n  how: tpe\n  trials: 3\n", "points list the trials"),
        ("  points: [{name: x}]\n", "sweep.name: unknown key"),
        ("  parameters: {seed: [1]}\n", "sweep.parameters.seed: unknown key"),
        ("  prompt: [{length: 2}, {length: 5}]\n", "sweep.prompt: is a section; give its keys, as"),
        ("  prompt: [{length: 2}]\n  prompt.init: [random]\n", "sweep.prompt.init: given twice"),
        ("  points: [{evaluation: {metric: loss}}]\n", "trials are compared by one metric"),
        ("  seed: [1, 2, 1]\n", "seed: a value is given twice"),
        ("  evaluation.metric: [loss]\n", "trials are compared by one metric"),
        ("  seed: [1]\n  prompt: {length: [1]}\n  prompt.length: [2]\n", "length: given twice"),
        ("  how: tpe\n  trials: 3\n  prompt.length: [3, 0]\n", "greater than or equal to 1, not 0"),
        ("  how: tpe\n  trials: 3\n  prompt.length: {low: 0, high: 4}\n", "or equal to 1, not 0"),
        (
            f"  how: random\n  trials: 3\n  seed: {{low: 1, high: 1{'0' * 400}}}\n",
            "sweep.seed.high: must be a number below 1e+300 in absolute value",
        ),
        (
            "  how: random\n  trials: 3\n  seed: {low: 1, high: .inf}\n",
            "sweep.seed.high: must be a number below 1e+300 in absolute value, not inf",
        ),
        (
            "  seed: [0]\n  at_once: 0\n",
            "sweep.at_once: Input should be greater than or equal to 1",
        ),
        ("  seed: [0]\n  devices: 0\n", "must be 1 or more, or -1 for all devices"),
        (
            "  compute.mesh: [{data: 1}, {data: -1}]\n  devices: -1\n",
            ":11: sweep.devices: an axis of compute.mesh is -1, too; set one of them to a number",
        ),
    ],
)
def test_a_mistake_in_a_sweep_gives_one_line_with_its_position(space, section, message):
    with pytest.raises(UserError) as error:
        space(section)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


_HUNDRED = [*range(1, 101)]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            f"  seed: {_HUNDRED}\n  prompt.length: {_HUNDRED}\n  prefix.length: {_HUNDRED}\n"
            f"  lora.rank: {_HUNDRED}\n  dept.rank: {_HUNDRED}\n",
            "describes 10,000,000,000 trials; at most 10,000 are possible",
        ),
        (f"  how: zip\n  seed: {[*range(10_001)]}\n", "describes 10,001 trials"),
        (f"  points: [{'{},' * 10_001}]\n", "describes 10,001 trials"),
        ("  how: random\n  trials: 1000000000\n  seed: [0]\n", "less than or equal to 10000"),
        ("  how: tpe\n  trials: 1000000000\n  seed: [0]\n", "less than or equal to 10000"),
        (
            f"  how: tpe\n  trials: 2\n  seed: {[*range(10_001)]}\n",
            "lists 10,001 values; at most 10,000 are possible",
        ),
        ("".join(f"  k{n}: [1]\n" for n in range(201)), "more than 200 keys"),
        ("  ../../x: [1]\n", "unknown key"),
        (f"  points: [{{prompt.{'a.' * 200}a: 1}}]\n", "unknown key"),
        (f"  prompt.{'a.' * 200}a: [1]\n", "unknown key"),
    ],
)
def test_a_sweep_that_is_too_large_is_refused_before_its_trials_are_made(space, section, message):
    with pytest.raises(UserError) as error:
        space(section)
    assert message in str(error.value)
    assert len(str(error.value)) < 500


def test_overrides_replace_the_values_of_a_sweep_in_either_notation(space):
    for section in ("  prompt.length: [1, 5]\n", "  prompt: {length: [1, 5]}\n"):
        section += "  prompt: {init: [random]}\n" if "prompt.length" in section else ""
        found = parameters(space(section, "sweep.prompt.length=[9]"))
        assert [each["prompt.length"] for each in found] == [9]
    with pytest.raises(UserError, match=r"prompt.length: trials differ in it; set sweep.prompt"):
        space("  prompt.length: [1, 5]\n", "prompt.length=7")


def test_prompts_that_do_not_fit_the_model_are_ignored_in_padding(space):
    found = space("  prompt.length: [2, 6, 100000]\n")
    assert found.longest(found.trials()[0].experiment, 128) == 6
    drawn = space("  how: random\n  trials: 2\n  prompt.length: {low: 1, high: 9000}\n")
    assert drawn.longest(drawn.file.experiment(), 128) == 127


def test_train_rejects_a_sweep_and_sweep_rejects_a_file_without_one(space, experiment_file, capsys):
    path = space("  seed: [0]\n").file.path
    assert main(["train", str(path)]) == 1
    assert (
        f"{path}:9: sweep: this section describes many trials; use softprompt sweep, or remove it"
        in capsys.readouterr().err
    )
    path.write_text(path.read_text().split("sweep:")[0])
    assert main(["train", str(path), "sweep.halving=null"]) == 1
    assert capsys.readouterr().err == (
        "override sweep.halving=null: sweep: this section describes many trials; use softprompt "
        "sweep, or remove it\n"
    )
    assert main(["sweep", str(path)]) == 1
    assert "has no section sweep" in capsys.readouterr().err


def test_an_error_about_the_whole_section_names_its_overrides(space):
    with pytest.raises(UserError, match=r":9 with override sweep.how=zip: sweep: how: zip needs"):
        space("  seed: [0, 1]\n  prompt.length: [1]\n", "sweep.how=zip", "shots=0")
