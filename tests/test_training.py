"""Complete runs on a tiny model: stopping, resuming, damaged files and invalid settings."""

import json
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from conftest import GOLDEN, write_experiment
from orbax.checkpoint import v1 as orbax
from processes import ForkedProcess

from softprompt import UserError, load_experiment, load_prompt, train
from softprompt.storage.run_folder import read_metrics

TIMES = {"examples_per_second", "seconds", "train_seconds", "wall_seconds", "peak_memory_bytes"}


def outcome(folder):
    """Return the results of a run, without its times and memory use."""
    metrics = [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(folder)]
    summary = json.loads((folder / "summary.json").read_text())
    vectors = load_prompt(folder).method.vectors[...]
    return (
        metrics,
        {k: v for k, v in summary.items() if k not in TIMES},
        np.asarray(vectors).tobytes(),
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The outcome of an uninterrupted run of the letters experiment."""
    folder = tmp_path_factory.mktemp("whole")
    train(load_experiment(write_experiment(folder)), folder / "run")
    return outcome(folder / "run")


@pytest.fixture(scope="module")
def even_file(tmp_path_factory):
    """The letters experiment with texts of one length. A new process traces few programs."""
    return write_experiment(tmp_path_factory.mktemp("even"), 5, 5)


@pytest.fixture(scope="module")
def even_whole(even_file):
    """The outcome of an uninterrupted run of `even_file`."""
    folder = even_file.with_name("run")
    train(load_experiment(even_file), folder)
    return outcome(folder)


@pytest.fixture
def start(even_file):
    """Start `softprompt train` on the letters experiment in a new process."""

    def start(folder, *overrides):
        code = "import sys; from softprompt.cli.main import main; sys.exit(main())"
        command = ["train", str(even_file), *overrides, "--run-dir", str(folder)]
        return ForkedProcess(code, command)

    return start


def wait_for(condition, process):
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_run_writes_the_documented_files(experiment, tmp_path):
    folder = tmp_path / "run"
    summary = train(experiment, folder)
    assert {p.name for p in folder.iterdir() if not p.name.startswith(".")} == {
        "checkpoints", "config.yaml", "curves.png", "metrics.jsonl", "predictions.jsonl",
        "prompt", "summary.json", "tensorboard",
    }  # fmt: skip
    assert summary == json.loads((folder / "summary.json").read_text())
    assert (summary["steps"], summary["trainable_parameters"]) == (12, 3 * 32)
    assert load_experiment(folder / "config.yaml") == experiment.model_copy()
    train_records = [r for r in read_metrics(folder) if r["split"] == "train"]
    assert [r["step"] for r in train_records] == [5, 10, 12]
    assert train_records[-1]["loss"] < train_records[0]["loss"]
    validations = [r for r in read_metrics(folder) if r["split"] == "validation"]
    assert [r["step"] for r in validations] == [4, 8, 12]
    best = max(validations, key=lambda r: (r["accuracy"], -r["loss"]))
    assert summary["best_step"] == best["step"]
    assert summary["validation"] == {"loss": best["loss"], "accuracy": best["accuracy"]}
    about = json.loads((folder / "prompt" / "prompt.json").read_text())
    assert (about["step"], about["validation"]) == (best["step"], summary["validation"])
    kept = {int(p.name) for p in (folder / "checkpoints").iterdir()}
    assert kept == {8, 12, best["step"]}


def test_a_killed_run_resumes_and_gives_the_same_result(
    start, even_file, even_whole, tmp_path, capsys
):
    """SIGKILL arrives after each checkpoint, and the same training is started again."""
    folder = tmp_path / "killed"
    for step in (4, 8, 12):
        process = start(folder)
        wait_for((folder / "checkpoints" / str(step)).is_dir, process)
        process.kill()
        process.communicate()
    capsys.readouterr()
    train(load_experiment(even_file), folder)
    assert "resuming from step" in capsys.readouterr().err
    assert outcome(folder) == even_whole


@pytest.mark.parametrize("write", [1, 2, 3, 20, 40, 60, 61])
def test_a_run_killed_while_writing_resumes_and_gives_the_same_result(
    even_file, even_whole, tmp_path, write
):
    """The process dies at its n-th call of `os.fsync`."""
    folder = tmp_path / "killed"
    code = """\
import os, sys
real, left = os.fsync, int(sys.argv.pop(1))
def fsync(descriptor):
    global left
    left -= 1
    os._exit(9) if not left else real(descriptor)
os.fsync = fsync
from softprompt.cli.main import main
sys.exit(main())
"""
    command = [str(write), "train", str(even_file), "--run-dir", str(folder)]
    process = ForkedProcess(code, command)
    _, errors = process.communicate()
    assert process.returncode == 9, errors
    train(load_experiment(even_file), folder)
    assert outcome(folder) == even_whole


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_the_state_and_the_run_resumes(start, tmp_path, number):
    folder, overrides = tmp_path / "run", ["training.steps=3000", "evaluation.every=2000"]
    process = start(folder, *overrides)
    wait_for(lambda: len(read_metrics(folder)) > 3, process)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    assert "all saved; start it again to resume" in errors
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert f"stopped at step {checkpoint.name}," in errors
    before = read_metrics(folder)
    process = start(folder, *overrides)
    wait_for(lambda: len(read_metrics(folder)) > len(before), process)
    process.kill()
    assert f"resuming from step {checkpoint.name}" in process.communicate()[1]
    assert read_metrics(folder)[: len(before)] == before


def damage(folder):
    """Truncate the largest file in a folder, and return its path."""
    path = max(folder.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    path.write_bytes(path.read_bytes()[:-1])
    return path


def test_a_run_resumes_from_its_newest_intact_checkpoint(experiment, whole, tmp_path, capsys):
    folder = tmp_path / "damaged"
    train(experiment, folder)
    (folder / "summary.json").unlink()
    data = damage(folder / "checkpoints" / "12")
    capsys.readouterr()
    train(experiment, folder)
    messages = capsys.readouterr().err
    assert f"{data}: damaged" in messages
    assert "resuming from step 8" in messages
    assert outcome(folder) == whole


@pytest.mark.parametrize("damaged_prompt", [False, True])
def test_a_run_survives_the_loss_of_its_best_checkpoint(
    experiment_file, tmp_path, capsys, damaged_prompt
):
    """With an intact `prompt/` the run resumes; otherwise it starts from the beginning."""
    # With such a small rate nothing changes, so the first evaluation stays the best.
    experiment = load_experiment(experiment_file, ["optimizer.learning_rate=1e-12"])
    folder = tmp_path / "damaged"
    assert train(experiment, folder)["best_step"] == 4
    before = outcome(folder)
    (folder / "summary.json").unlink()
    damage(folder / "checkpoints" / "4")
    if damaged_prompt:
        damage(folder / "prompt")
    capsys.readouterr()
    train(experiment, folder)
    expected = "starting from the beginning" if damaged_prompt else "resuming from step 12"
    assert expected in capsys.readouterr().err
    assert outcome(folder) == before


def test_damaged_later_checkpoints_do_not_replace_new_ones(experiment_file, tmp_path):
    experiment = load_experiment(experiment_file, ["checkpoints.keep=1"])
    folder = tmp_path / "run"
    train(experiment, folder)
    (folder / "summary.json").unlink()
    for step in (folder / "checkpoints").iterdir():
        damage(step)
    (folder / "checkpoints" / "12").rename(folder / "checkpoints" / "99")
    damage(folder / "prompt")
    summary = train(experiment, folder)
    steps = {int(p.name) for p in (folder / "checkpoints").iterdir()}
    assert steps == {12, summary["best_step"]}


@pytest.mark.parametrize(("file", "what"), [("train.jsonl", "data"), ("model", "base model")])
def test_a_run_does_not_resume_with_changed_data_or_another_base(
    experiment_file, tmp_path, file, what
):
    model = shutil.copytree(GOLDEN / "llama-grouped", tmp_path / "model")
    experiment = load_experiment(experiment_file, [f"base={model}"])
    train(experiment, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    if file == "model":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    else:
        path = experiment_file.parent / file
        path.write_text(path.read_text() + path.read_text().splitlines()[0])
    with pytest.raises(UserError, match=f"its {what} has changed since the run began"):
        train(experiment, tmp_path / "run")


def test_a_damaged_prompt_is_saved_again_from_its_checkpoint(experiment, tmp_path):
    folder = tmp_path / "run"
    train(experiment, folder)
    before = outcome(folder)
    (folder / "summary.json").unlink()
    (folder / "prompt" / "prompt.json").write_text("{}")
    train(experiment, folder)
    assert outcome(folder) == before


def test_a_finished_run_repairs_its_prompt(experiment, tmp_path):
    folder = tmp_path / "run"
    train(experiment, folder)
    before = outcome(folder)
    damage(folder / "prompt")
    train(experiment, folder)
    assert outcome(folder) == before


def test_missing_and_damaged_metrics_are_reported(experiment, tmp_path, capsys):
    folder = tmp_path / "run"
    train(experiment, folder)
    (folder / "summary.json").unlink()
    metrics = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text("?\n" + metrics)
    with pytest.raises(UserError, match=r"metrics.jsonl:1: not valid JSON"):
        train(experiment, folder)
    (folder / "metrics.jsonl").unlink()
    train(experiment, folder)
    assert "metrics.jsonl: 6 of 6 records are missing" in capsys.readouterr().err


def test_a_finished_run_does_not_train_again(experiment, tmp_path, capsys):
    summary = train(experiment, tmp_path / "run")
    stamp = (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns
    assert train(experiment, tmp_path / "run") == summary
    assert "this run is finished" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns == stamp


def test_a_folder_of_another_experiment_is_rejected(experiment, experiment_file, tmp_path):
    train(experiment, tmp_path / "run")
    other = load_experiment(experiment_file, ["prompt.length=4"])
    with pytest.raises(
        UserError, match=r"other settings \(prompt.length: was 3, is now 4\); choose"
    ):
        train(other, tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not a run folder"):
        train(experiment, tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_settings_may_change_before_the_first_checkpoint(experiment_file, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(UserError, match="there is no checkpoint yet"):
        train(load_experiment(experiment_file, ["optimizer.learning_rate=3e38"]), folder)
    assert train(load_experiment(experiment_file), folder)["steps"] == 12


def test_the_error_about_a_file_in_place_of_a_folder_names_the_file(experiment, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    (tmp_path / "run" / "checkpoints").write_text("")
    with pytest.raises(UserError, match="run/checkpoints: cannot be read or written"):
        train(experiment, tmp_path / "run")


def test_two_processes_do_not_train_in_one_folder(start, even_file, tmp_path):
    overrides = ["training.steps=3000", "evaluation.every=2000"]
    process = start(tmp_path / "run", *overrides)
    wait_for((tmp_path / "run" / "metrics.jsonl").exists, process)
    with pytest.raises(UserError, match="another process is training there"):
        train(load_experiment(even_file, overrides), tmp_path / "run")
    process.kill()
    process.communicate()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(
    experiment_file, tmp_path
):
    overrides = ["optimizer.learning_rate=3e38", "checkpoints.every=1"]
    experiment = load_experiment(experiment_file, overrides)
    with pytest.raises(
        UserError,
        match=r"step \d+: .*(nan|inf).*; lower optimizer.learning_rate.*; checkpoint .* is kept",
    ):
        train(experiment, tmp_path / "run")
    steps = [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert steps
    for step in steps:
        (vectors,) = jax.tree.leaves(
            orbax.load(tmp_path / "run" / "checkpoints" / str(step) / "arrays")[0]
        )
        assert np.isfinite(vectors).all()
    assert not (tmp_path / "run" / "summary.json").exists()


def test_training_stops_early_without_improvement(experiment_file, tmp_path, capsys):
    overrides = ["optimizer.learning_rate=1e-12", "evaluation.patience=2", "training.steps=100"]
    summary = train(load_experiment(experiment_file, overrides), tmp_path / "run")
    assert (summary["steps"], summary["best_step"]) == (12, 4)
    assert "stopping early" in capsys.readouterr().err


def test_free_text_trains_and_is_measured_by_its_loss(experiment_file, tmp_path):
    text = experiment_file.read_text()
    text = text.replace('verbalizer: {low: " ab", high: " cd"}\n', "").replace(
        ", metric: accuracy", ""
    )
    experiment_file.write_text(
        text.replace('input: "{text} is"', 'input: "{text}", target: " {label}"')
    )
    summary = train(load_experiment(experiment_file), tmp_path / "run")
    losses = [r["loss"] for r in read_metrics(tmp_path / "run") if r["split"] == "validation"]
    assert losses[-1] < losses[0]
    assert summary["validation"] == {"loss": min(losses)}
    with pytest.raises(UserError, match="has no labels"):
        load_prompt(tmp_path / "run").classify(["x"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.batch_size=31", "30 examples do not fill a batch of 31"),
        ("training.accumulate=8", "set a smaller training.batch_size or training.accumulate"),
        ("prompt.length=127", "too short for the 127 that every input begins with"),
        (
            "template.max_tokens=126",
            "too short for the 3 that every input begins with and template.max_tokens 126",
        ),
        ("template.input='{title}'", "train.jsonl:1: no field 'title'"),
        ("base=./nowhere", "no such file or directory"),
        ("data.train=./nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("data.validation=./nowhere.jsonl", "nowhere.jsonl: no such file; to take a tenth"),
        ("data.test=./nowhere.jsonl", "no such file; for a run without test data, set data.test"),
    ],
)
def test_invalid_experiments_are_rejected_before_anything_is_written(
    experiment_file, tmp_path, override, message
):
    with pytest.raises(UserError) as error:
        train(load_experiment(experiment_file, [override]), tmp_path / "run")
    assert message in str(error.value)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_prompt_is_rejected_on_another_base_model(experiment, tmp_path):
    train(experiment, tmp_path / "run")
    other = str(GOLDEN / "llama-untied")
    with pytest.raises(UserError) as error:
        load_prompt(tmp_path / "run", other)
    assert f"trained on the base model '{experiment.base}'" in str(error.value)
    assert f"not on '{other}'" in str(error.value)
