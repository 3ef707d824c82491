"""Bad input never ends in a traceback, a hang or a wrong answer. See the folder attack."""

import pytest
from attack.cases import KINDS, Case
from attack.judge import attack, judge
from attack.sandbox import Sandbox, make_good_input
from attack.worker import Outcome, Worker

COUNT = 6  # cases of each kind; `make attack` runs thousands


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    make_good_input(folder)
    return folder


@pytest.fixture(scope="module")
def worker():
    with Worker() as worker:
        yield worker


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_refused_in_one_line(kind, good, worker, tmp_path):
    results = attack(kind, COUNT, 0, good, tmp_path / "place", worker)
    faults = [str(fault) for _, fault in results if fault]
    assert len(results) >= COUNT // 2
    assert not faults, "\n\n".join(faults)


def test_good_input_is_accepted(good, worker, tmp_path):
    sandbox = Sandbox(good, tmp_path / "place")
    for arguments in (
        ("train", "letters.yaml", "--run-dir", "out/run"),
        ("train", "letters.yaml", "base=./base.gguf", "--run-dir", "out/run"),
        ("show", "letters.yaml", "--split", "test"),
        ("show", "letters.yaml", "data.train=train.parquet"),
        ("sweep", "sweep.yaml", "--folder", "out/sweep"),
        ("predict", "runs/labels", "--input", "texts.csv"),
        ("generate", "runs/text", "aaaaa", "--max-new-tokens", "2"),
        ("eval", "runs/lora"),
        ("inspect", "runs/labels"),
        ("score", "predictions.jsonl", "--metrics", "ter,rouge,accuracy"),
        ("runs", "runs"),
        ("report", "runs", "--output", "out/report.html"),
        ("export", "runs/labels", "out/export"),
        ("import", "adapters/lora", "out/prompt", "--base", "base"),
        ("import", "array.npy", "out/prompt", "--base", "base"),
    ):
        sandbox.prepare({})
        outcome = worker.run(arguments, sandbox.folder)
        assert outcome.status == 0, outcome.errors
        assert judge(Case("arguments", arguments), outcome, sandbox.changes(arguments)) is None


@pytest.mark.parametrize(
    ("outcome", "changes", "fault"),
    [
        (Outcome(1, errors="a.yaml: missing"), [], None),
        (Outcome(0, output='{"label": "low"}'), [], None),
        (Outcome(None, failure="hang"), [], "hang"),
        (Outcome(None, failure="abort"), [], "abort"),
        (Outcome(1, errors="Traceback (most recent call last):\nKeyError"), [], "traceback"),
        (Outcome(1, errors="thread '<unnamed>' panicked at x.rs\nx: damaged"), [], "traceback"),
        (Outcome(1, errors="slow", seconds=21), [], "hang"),
        (Outcome(1, errors="large", peak=5 * 2**30), [], "memory"),
        (Outcome(2, errors="usage"), [], "status"),
        (Outcome(0, output='{"probabilities": {"low": NaN}}'), [], "NaN"),
        (Outcome(1), [], "silence"),
        (Outcome(1, errors="one\ntwo"), [], "several lines"),
        (Outcome(1, errors="x" * 4000), [], "long line"),
        (Outcome(1, errors="refused"), ["work/train.jsonl"], "changed files"),
    ],
)
def test_every_kind_of_fault_is_found(outcome, changes, fault):
    found = judge(Case("arguments", ()), outcome, changes)
    assert (found.name if found else None) == fault


def test_a_changed_file_outside_of_the_output_is_found(good, tmp_path):
    sandbox = Sandbox(good, tmp_path / "place")
    sandbox.prepare({})
    (sandbox.folder / "out" / "result").write_text("new")
    (sandbox.folder / "new").mkdir()
    (sandbox.folder / "new" / "result").write_text("new")
    assert sandbox.changes(["train", "new"]) == []
    (sandbox.folder / "train.jsonl").write_text("changed")
    (tmp_path / "place" / "escaped").write_text("new")
    assert sandbox.changes(["train", "new"]) == ["escaped", "work/train.jsonl"]


def test_a_command_that_takes_its_process_down_is_an_abort(worker, tmp_path, monkeypatch):
    code = "import os; os.abort()"
    with Worker() as fragile:
        monkeypatch.setattr("attack.worker.SERVER", f"print(flush=True); input(); {code}")
        assert fragile.run(["train"], tmp_path).failure == "abort"
