"""`softprompt compare` trains several methods on one experiment and tabulates the results."""

import csv
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import write_experiment

from softprompt import UserError, train
from softprompt.cli import compare as command
from softprompt.cli.compare import table_rows
from softprompt.cli.main import main
from softprompt.errors import Stopped
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


def test_a_method_that_fails_does_not_stop_the_others(folder, capsys, monkeypatch):
    """The examples of few-shot are too many; it trains in a new process, the others in this one."""
    runs = folder / "failing"
    arguments = ["compare", str(folder / "letters.yaml"), "shots=31", "template.max_tokens=60"]
    arguments += ["--methods", "few-shot,none,prefix", "--folder", str(runs)]
    in_new_process = command.train

    def train_run(file, overrides, run):
        (in_new_process if run.parent.name == "few-shot" else train_here)(file, overrides, run)

    monkeypatch.setattr(command, "train", train_run)
    assert main(arguments) == 1
    shown = capsys.readouterr()
    head, *rows = shown.out.splitlines()
    assert head.split()[-1] == "error"
    assert [line.split()[0] for line in rows] == ["few-shot", "none", "prefix"]
    reason = "shots: 31, but there are only 30 training records"
    assert [reason in line for line in rows] == [True, False, True]
    assert re.search(r"none +\d\.\d{3}", rows[1])
    assert f"2 of 3 methods have failed runs, the first: few-shot: {reason}" in shown.err
    written = list(csv.DictReader((runs / "compare.csv").read_text().splitlines()))
    assert [row["error"] for row in written] == [reason, "", reason]
    assert [bool(row["quality"]) for row in written] == [False, True, False]
    assert (runs / "compare.md").read_text().count(reason) == 2


def test_the_seeds_that_finish_count_if_others_fail(folder):
    def train_one(file, overrides, run):
        if run.name == "seed-1":
            raise UserError("the memory is full")
        train_here(file, overrides, run)

    file, runs = folder / "letters.yaml", folder / "seeds"
    (row,) = compare(file, ["lora"], [0, 1], ["training.steps=1"], runs, train_one)
    assert len(row.quality) == 1
    assert row.error == "1 of 2 seeds failed, seed 1: the memory is full"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "best"], "method 'best' is not one of none, few-shot"),
        (["--methods", "lora,lora"], "method lora is given 2 times"),
        (["--methods", ""], "must be names"),
        (["--methods", "lora,,none"], "must be names"),
        (["--seeds", ""], "must be whole numbers"),
        (["--seeds", "1,-2"], "must be whole numbers"),
        (["--seeds", "9" * 5000], "must be whole numbers"),
        (["--seeds", "0,00"], "seed 0 is given 2 times"),
        (["--seeds", "5000000000"], "seed: "),
        (["--seeds", ",".join(map(str, range(10**6)))], "at most 1000 runs"),
        (["--folder", "letters.yaml"], "letters.yaml: not a folder; choose another folder with"),
        (["--folder", "a\0b"], "not valid text"),
    ],
)
def test_mistakes_are_found_before_anything_runs(folder, capsys, monkeypatch, options, message):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(command, "train", lambda *arguments: pytest.fail("trained"))
    assert main(["compare", "letters.yaml", *options]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (folder / "runs" / "compare").exists()


def test_a_run_of_another_comparison_is_found_before_anything_runs(folder):
    file, runs = folder / "letters.yaml", folder / "early"
    compare(file, ["none"], [0], ["template.max_tokens=60"], runs, train_here)
    with pytest.raises(UserError, match="choose another folder"):
        compare(file, ["lora", "none"], [0], [], runs, lambda *_: pytest.fail("trained"))


def test_a_process_that_is_killed_is_a_failed_run_and_a_stopped_one_stops(folder, monkeypatch):
    end = "import os, signal; os.kill(os.getpid(), signal.{})"
    monkeypatch.setattr(command, "_TRAIN", end.format("SIGKILL"))
    with pytest.raises(UserError, match="ended with SIGKILL"):
        command.train(folder / "letters.yaml", [], folder / "killed")
    monkeypatch.setattr(command, "_TRAIN", end.format("SIGTERM"))
    with pytest.raises(Stopped) as stopped:
        command.train(folder / "letters.yaml", [], folder / "killed")
    assert stopped.value.number == signal.SIGTERM


def test_ctrl_c_stops_the_comparison_after_the_run_is_saved(folder):
    runs = folder / "stopped"
    arguments = ["training.steps=1000000", "evaluation.every=1000000", "training.log_every=1"]
    arguments += ["--methods", "lora,none", "--folder", str(runs)]
    heeding = ["env", "--default-signal=INT"]  # a shell ignores it for `command &`
    command = [sys.executable, "-m", "softprompt", "compare", folder / "letters.yaml", *arguments]
    process = subprocess.Popen(
        [*heeding, *command], start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    metrics = runs / "lora" / "seed-0" / "metrics.jsonl"
    until = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all processes of a job
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, errors
    assert "run the same command again to resume" in errors
    assert "Traceback" not in errors
    assert any((runs / "lora" / "seed-0" / "checkpoints").iterdir())
    assert not (runs / "none").exists()
    with (runs / "lora" / "seed-0" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the process of the run has ended
