"""Sweeps whose trials Optuna chooses."""

import concurrent.futures
import json
import threading

import optuna
import pytest
from conftest import sweep_process

from softprompt import UserError
from softprompt.cli.main import main
from softprompt.storage.run_folder import read_metrics
from softprompt.sweep import study
from softprompt.sweep.outcome import Outcome, validation_at
from softprompt.sweep.runner import open_sweep, sweep
from softprompt.sweep.study import Study

STUDY = """\
  how: tpe
  trials: 6
  optimizer.learning_rate: {low: 1e-3, high: 0.5, log: true}
  prompt.length: [2, 4]
  at_once: 1
"""


def test_a_dry_run_counts_trials_that_are_not_chosen_yet(space, capsys):
    found = space(STUDY)
    assert main(["sweep", str(found.file.path), "--folder", str(found.folder), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "trial 5: values are chosen when the trial starts (program 0, waiting)" in printed
    assert "program 0: 6 trials to run, 1 at once, about" in printed
    assert not found.folder.exists()


def known_trials(folder, url=None):
    """Return the trials that Optuna has stored for a sweep."""
    if url is None:
        backend = optuna.storages.journal.JournalFileBackend(str(folder / "study.journal"))
        storage = optuna.storages.JournalStorage(backend)
    else:
        storage = url
    name = (folder / "study.txt").read_text().strip()
    return optuna.load_study(study_name=name, storage=storage).trials


def test_optuna_chooses_trials_and_receives_their_results(space):
    found = space(STUDY, "sweep.halving={rungs: [4], factor: 3}", "evaluation.metric=loss")
    trials = sweep(found)
    known = known_trials(found.folder)
    assert [trial.number for trial in trials] == [trial.number for trial in known] == [*range(6)]
    outcomes = [Outcome.read(trial.folder) for trial in trials]
    at_rung = [validation_at(trial.folder, 4)["loss"] for trial in trials]
    for i, (trial, stored, end) in enumerate(zip(trials, known, outcomes, strict=True)):
        assert 1e-3 <= trial.parameters["optimizer.learning_rate"] <= 0.5
        assert stored.intermediate_values[4] == at_rung[i]
        continued = sorted(at_rung[: i + 1]).index(at_rung[i]) < -(-(i + 1) // 3)
        assert (end.state, stored.state.name) == (
            ("finished", "COMPLETE") if continued else ("pruned", "PRUNED")
        )
        if continued:
            summary = json.loads((trial.folder / "summary.json").read_text())
            assert stored.value == summary["validation"]["loss"]
    assert {end.state for end in outcomes} == {"finished", "pruned"}
    assert len({t.parameters["optimizer.learning_rate"] for t in trials}) == 6
    again = sweep(found)
    assert [trial.parameters for trial in again] == [trial.parameters for trial in trials]


@pytest.mark.parametrize("storage", [None, "sqlite"])
def test_two_processes_share_a_study_and_one_is_killed(space, storage, tmp_path):
    """The other process takes over its trial, and every trial runs once."""
    url = storage and f"sqlite:///{tmp_path / 'study.db'}"
    found = space(STUDY + (f"  storage: {url}\n" if url else ""), "sweep.trials=3")
    dead = tmp_path / "dead"
    dies = f"if slots[0].session.run.step == 6: Path({str(dead)!r}).touch(); os._exit(9)"
    waits = f"while not Path({str(dead)!r}).exists(): time.sleep(0.05)"
    workers = [sweep_process(found, before, "sweep.trials=3") for before in (dies, waits)]
    errors = [worker.communicate()[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [9, 0], errors
    assert "resuming from step 4" in errors[1]
    known = known_trials(found.folder, url)
    assert [trial.state.name for trial in known] == ["COMPLETE"] * 3
    folders = sorted((found.folder / "trials").iterdir())
    assert [folder.name for folder in folders] == [f"{i:03d}" for i in range(3)]
    for folder, stored in zip(folders, known, strict=True):
        records = [r["step"] for r in read_metrics(folder) if r["split"] == "validation"]
        assert records == [4, 8, 12]
        assert Outcome.read(folder).state == "finished"
        summary = json.loads((folder / "summary.json").read_text())
        assert stored.value == summary["validation"]["accuracy"]


def test_a_trial_killed_while_its_values_are_chosen_is_completed_later(space, monkeypatch):
    """Other processes do not see it, and the next process chooses the remaining values."""
    found, seen = space(STUDY, "sweep.trials=2", "training.steps=1"), []
    suggest = study._suggest

    def dies(asked, name, values):
        seen.append(other.trials())
        if name == "prompt.length":
            raise KeyboardInterrupt
        suggest(asked, name, values)

    with open_sweep(found), monkeypatch.context() as patch:
        mine, other = Study(found), Study(found)
        patch.setattr(study, "_suggest", dies)
        with pytest.raises(KeyboardInterrupt):
            mine.next()
    assert seen == [[], []]
    assert Study(found).trials() == []
    (half,) = known_trials(found.folder)
    assert [*half.params] == ["optimizer.learning_rate"]
    trials = sweep(found)
    assert [Outcome.read(trial.folder).state for trial in trials] == ["finished"] * 2
    chosen = trials[0].parameters
    assert chosen["optimizer.learning_rate"] == half.params["optimizer.learning_rate"]
    assert chosen["prompt.length"] in (2, 4)


def test_a_trial_of_another_process_is_left_alone(space, capsys):
    short = ["sweep.trials=2", "training.steps=1"]
    found = space(STUDY, *short)
    command = ["sweep", str(found.file.path), *short, "--folder", str(found.folder)]
    with open_sweep(found):
        opened = Study(found).next()
        assert main(command) == 0
    printed = capsys.readouterr()
    _, mine, theirs = printed.out.splitlines()
    assert (mine.split()[0], mine.split()[3]) == ("1", "finished")
    assert (theirs.split()[0], theirs.split()[3]) == ("0", "running")
    assert f"best so far: {found.folder}/trials/001/prompt" in printed.err
    assert "1 of 2 trials are left to other processes" in printed.err
    opened.close()
    assert main(command) == 0
    assert f"best: {found.folder}/trials/" in capsys.readouterr().err


def test_folders_share_a_database_without_sharing_a_study(space, tmp_path):
    section = (
        STUDY.replace("trials: 6", "trials: 2") + f"  storage: sqlite:///{tmp_path}/study.db\n"
    )
    for folder in ("one", "other"):
        trials = sweep(space(section, "training.steps=1", folder=folder))
        assert [Outcome.read(trial.folder).state for trial in trials] == ["finished"] * 2


def test_two_sweeps_may_create_a_database_at_the_same_time(space, monkeypatch, tmp_path):
    """Optuna fails if another process creates the tables first, and succeeds the next time."""
    real, url = optuna.storages.RDBStorage, f"sqlite:///{tmp_path}/study.db"

    def fail_once(url):
        monkeypatch.setattr(optuna.storages, "RDBStorage", real)
        real(url)
        raise RuntimeError("table studies already exists")

    monkeypatch.setattr(optuna.storages, "RDBStorage", fail_once)
    found = space(f"{STUDY}  storage: {url}\n")
    with open_sweep(found):
        Study(found)
    assert known_trials(found.folder, url) == []


def test_a_sweep_that_could_not_start_does_not_occupy_its_folder(space):
    with pytest.raises(UserError, match=r"sweep.storage: nonsense: "):
        sweep(space(f"{STUDY}  storage: nonsense\n", "training.steps=1"))
    trials = sweep(space("  seed: [0]\n", "training.steps=1"))
    assert [Outcome.read(trial.folder).state for trial in trials] == ["finished"]


def test_many_threads_can_open_a_folder_at_once(space):
    """The first one describes the sweep, and the others never read a half-written file."""
    found, together = space(STUDY), threading.Barrier(8)

    def open_it(_):
        together.wait()
        with open_sweep(found):
            return (found.folder / "sweep.yaml").read_text()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(open_it, range(8)))) == 1


def test_a_finished_trial_that_was_not_reported_does_not_run_again(space):
    """The process was killed after the trial had finished and before it was reported."""
    found = space(STUDY, "sweep.trials=2", "training.steps=1")
    with open_sweep(found):
        opened = Study(found).next()
    opened.close()
    Outcome("failed", None, "of a test").write(opened.trial.folder)
    trials = sweep(found)
    assert [Outcome.read(trial.folder).state for trial in trials] == ["failed", "finished"]
    assert [known.state.name for known in known_trials(found.folder)] == ["FAIL", "COMPLETE"]
