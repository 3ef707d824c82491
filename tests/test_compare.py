"""`softprompt compare` trains several methods on one experiment and tabulates the results."""

import csv
import json
import re

import pytest
from conftest import write_experiment

from softprompt import UserError, train
from softprompt.cli.compare import table_rows
from softprompt.cli.main import main
from softprompt.experiment.reading import load_experiment
from softprompt.report.tables import table
from softprompt.sweep.comparison import compare


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    write_experiment(folder, shortest=5, longest=5)
    return folder


def train_here(file, overrides, run):
    """Train in this process, which is faster than in a new one."""
    train(load_experiment(file, overrides), run)


def test_compare_trains_missing_runs_and_tabulates_all_of_them(folder, capfd, monkeypatch):
    """The first command trains in a new process, the second one in this process."""
    runs = folder / "runs"
    arguments = ["compare", str(folder / "letters.yaml"), "template.max_tokens=60", "shots=1"]
    assert main([*arguments, "--methods", "lora", "--folder", str(runs)]) == 0
    capfd.readouterr()
    arguments += ["--methods", "none,few-shot,lora", "--seeds", "0,1", "--folder", str(runs)]
    first = (runs / "lora" / "seed-0" / "summary.json").stat().st_mtime_ns
    monkeypatch.setattr("softprompt.cli.compare.train", train_here)
    assert main(arguments) == 0
    assert (runs / "lora" / "seed-0" / "summary.json").stat().st_mtime_ns == first
    printed = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["method", "none", "few-shot", "lora"]

    def summaries(method):
        found = [json.loads(p.read_text()) for p in sorted(runs.glob(f"{method}/*/summary.json"))]
        assert len(found) == (1 if method == "none" else 2)
        return found

    rows = list(csv.DictReader((runs / "compare.csv").read_text().splitlines()))
    for row, shots, line in zip(rows, (0, 1, 1), printed[1:], strict=True):
        measured = summaries(row["method"])
        accuracies = [summary["test"]["accuracy"] for summary in measured]
        assert [float(text) for text in row["quality"].split()] == accuracies
        assert int(row["trainable_parameters"]) == measured[0]["trainable_parameters"]
        assert int(row["peak_memory_bytes"]) == max(s["peak_memory_bytes"] for s in measured)
        assert f"{sum(accuracies) / len(accuracies):.3f}" in line
        config = load_experiment(runs / row["method"] / "seed-0" / "config.yaml")
        assert config.shots == shots
        kept = (runs / row["method"] / "seed-0" / "prompt").rglob("*")
        assert int(row["saved_bytes"]) == sum(p.stat().st_size for p in kept if p.is_file())
    markdown = (runs / "compare.md").read_text().splitlines()
    assert [re.split(r" *\| *", line)[1] for line in markdown[2:]] == ["none", "few-shot", "lora"]


def test_runs_with_other_settings_are_rejected(folder):
    file, runs = folder / "letters.yaml", folder / "mixed"
    overrides = ["template.max_tokens=60"]
    (row,) = compare(file, ["none"], [0], overrides, runs, train_here)
    assert table(table_rows([row]), "text").splitlines()[1].split()[0] == "none"
    with pytest.raises(
        UserError, match=r"other settings \(template.max_tokens.*choose another folder"
    ):
        compare(file, ["none"], [0], ["template.max_tokens=50"], runs, train_here)
    with pytest.raises(UserError, match="method 'best' is not one of none, few-shot"):
        compare(file, ["best"], [0], [], runs, train_here)
