"""Targets that a teacher writes: evaluation without the teacher, sweeps, and changed teachers."""

import json

import jax
import pytest
from test_teachers import experiment_with

from softprompt import SoftPrompt, TemplateSettings, make_task, train
from softprompt.cli.main import main
from softprompt.errors import FolderError
from softprompt.experiment.reading import ExperimentFile
from softprompt.generation.engine import Engine
from softprompt.sweep.runner import sweep
from softprompt.sweep.space import Space
from softprompt.training.preparation import Preparation

WRITES = ("objective.teacher.writes_targets=true", "generation.max_new_tokens=2")


def evaluated(folder, capsys) -> tuple[dict, str]:
    """The result of `eval` on the validation data, and what the command says."""
    capsys.readouterr()
    assert main(["eval", str(folder), "--split", "validation"]) == 0
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


def test_eval_needs_the_written_targets_but_not_the_teacher(tmp_path, monkeypatch, capsys):
    manual = tmp_path / "manual.txt"
    manual.write_text("Say it twice.")
    experiment = experiment_with(tmp_path, f"context: {manual}", *WRITES)
    run = tmp_path / "run"
    measured = train(experiment, run)["validation"]
    generate = Engine.generate

    def nothing(self, requests, *arguments, **options):
        assert not requests
        return generate(self, requests, *arguments, **options)

    monkeypatch.setattr(Engine, "generate", nothing)
    found, _ = evaluated(run, capsys)
    assert found["objective_loss"] == pytest.approx(measured["objective_loss"], rel=1e-5)

    assert main(["eval", str(run), str(run), "--split", "validation"]) == 1
    assert "the teacher of each run wrote its own targets" in capsys.readouterr().err

    manual.write_text("Say it once.")
    found, said = evaluated(run, capsys)
    assert found.keys() == {"split", "examples", "loss"}
    assert found["loss"] == pytest.approx(measured["loss"], rel=1e-5)
    assert "not measured: the teacher has changed since it wrote the targets" in said

    manual.unlink()
    found, said = evaluated(run, capsys)
    assert found["loss"] == pytest.approx(measured["loss"], rel=1e-5)
    assert "objective_loss and agreement are not measured: " in said

    data, targets = tmp_path / "train.jsonl", run / "targets-validation.jsonl"
    whole = data.read_text()
    data.write_text(whole.replace("aaa", "zzz"))
    assert main(["eval", str(run), "--split", "validation"]) == 1
    assert "the validation data has changed since the teacher wrote" in capsys.readouterr().err
    data.write_text(whole)
    lines = targets.read_text().splitlines()
    targets.write_text("\n".join([*lines[:-1], ""]))
    assert main(["eval", str(run), "--split", "validation"]) == 1
    assert "has 7 targets for 8 records" in capsys.readouterr().err
    targets.unlink()
    assert main(["eval", str(run), "--split", "validation"]) == 1
    assert "it contains the targets that the teacher wrote" in capsys.readouterr().err


def test_every_trial_of_a_sweep_keeps_the_written_targets(tmp_path):
    experiment_with(tmp_path, "input: 'Repeat {word}:'")
    with (tmp_path / "case.yaml").open("a") as file:
        file.write("sweep: {optimizer.learning_rate: [0.1, 0.01]}\n")
    space = Space(ExperimentFile(tmp_path / "case.yaml", WRITES), tmp_path / "trials")
    folders = [trial.folder for trial in sweep(space)]
    for split in ("train", "validation"):
        first, second = ((each / f"targets-{split}.jsonl").read_text() for each in folders)
        assert first == second
        assert len(first.splitlines()) == 9


def test_earlier_targets_are_kept_under_another_name(tmp_path, caplog):
    run, names = tmp_path / "run", ["targets-train.1.jsonl", "targets-train.2.jsonl"]
    run.mkdir()
    earlier = []
    for text in ("Say {word}", "Tell {word}", "Repeat {word}"):
        experiment = experiment_with(tmp_path, f"input: '{text}'", *WRITES)
        Preparation().prepare(experiment, folder=run)
        earlier.append((run / "targets-train.jsonl").read_text())
    assert [(run / name).read_text() for name in names] == earlier[:2]
    assert f"the earlier targets are now in {names[1]}" in caplog.text


def test_the_digest_of_a_run_covers_what_it_learned(tiny, tmp_path):
    """The two prompts have the same description."""
    settings = TemplateSettings(input="Say {word}:", target=" {answer}")
    task = make_task(tiny, settings, None, virtual_tokens=3)
    experiment = experiment_with(tmp_path, f"run: {tmp_path / 'first'}")
    train_folder = tmp_path / "run"
    digests = []
    for seed in (5, 5, 6):
        prompt = SoftPrompt.from_vocabulary(tiny, 3, jax.random.key(seed))
        prompt.save(tmp_path / "first", tiny, task)
        digests.append(Preparation().prepare(experiment).teacher_digest)
        if seed == 5:
            train(experiment, train_folder)
    assert digests[0] != digests[2]
    (train_folder / "summary.json").unlink()
    with pytest.raises(FolderError, match="its teacher has changed since the run began"):
        train(experiment, train_folder)
