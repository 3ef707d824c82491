"""Callbacks: Python code that receives the values of a run and may end it."""

import pytest
from conftest import write_experiment
from test_training import outcome

from softprompt import Callback, UserError, load_experiment, load_prompt, train
from softprompt.storage.run_folder import read_metrics
from softprompt.training import callbacks, loop


class Recorder(Callback):
    """Records what it receives. Subclasses end the run or fail."""

    def __init__(self):
        self.steps, self.evaluations = [], []

    def on_step(self, step, measured):
        self.steps.append((step, dict(measured)))

    def on_evaluation(self, step, metrics):
        self.evaluations.append((step, dict(metrics)))


class StopAfterStep(Recorder):
    def __init__(self, last):
        super().__init__()
        self.last = last

    def on_step(self, step, measured):
        super().on_step(step, measured)
        return step == self.last


class StopAfterEvaluation(Callback):
    def __init__(self, last):
        self.last = last

    def on_evaluation(self, step, metrics):
        return step == self.last


class FailAfterStep(Recorder):
    def on_step(self, step, measured):
        super().on_step(step, measured)
        if step == 6:
            raise OSError("the disk is full")


class FailAfterEvaluation(Callback):
    def on_evaluation(self, step, metrics):
        if step == 8:
            raise OSError("the disk is full")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    file = write_experiment(tmp_path_factory.mktemp("callbacks"), 5, 5)
    return load_experiment(file, ["training.log_every=1"])


@pytest.fixture(scope="module")
def whole(experiment, tmp_path_factory):
    """The folder of a run without callbacks."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(experiment, folder)
    return folder


def test_callbacks_receive_every_step_and_evaluation_once(experiment, whole, tmp_path):
    first, second = Recorder(), Recorder()
    train(experiment, tmp_path / "run", callbacks=[first, second])
    assert outcome(tmp_path / "run") == outcome(whole)
    assert (first.steps, first.evaluations) == (second.steps, second.evaluations)
    assert [step for step, _ in first.steps] == [*range(1, 13)]
    by_split = {"train": dict(first.steps), "validation": dict(first.evaluations)}
    for record in read_metrics(whole):
        received = by_split[record["split"]].pop(record["step"])
        assert received.items() <= record.items()
        assert {
            "loss",
            "gradient_norm",
            "learning_rate",
        } <= received.keys() or "accuracy" in received
    assert by_split == {"train": {}, "validation": {}}


def test_a_step_is_received_after_the_next_one_has_begun(experiment, tmp_path, monkeypatch):
    """The device does not wait for a callback, except before an evaluation."""
    events, real = [], loop.train_step

    class Logged(Callback):
        def on_step(self, step, measured):
            events.append(("received", step))

    def train_step(*arguments, **options):
        events.append(("began", len([e for e in events if e[0] == "began"]) + 1))
        return real(*arguments, **options)

    train_step.lower = real.lower
    monkeypatch.setattr(loop, "train_step", train_step)
    train(experiment, tmp_path / "run", callbacks=[Logged()])
    for step in range(1, 13):
        next_step = ("began", step + 1)
        later = step % 4 == 0  # an evaluation waits for the step anyway
        if next_step in events:
            assert (events.index(next_step) > events.index(("received", step))) == later


def test_a_callback_ends_the_run_after_a_step(experiment, whole, tmp_path, capsys):
    """One more step has begun by then. It is evaluated because it is the last one."""
    recorder = StopAfterStep(5)
    summary = train(experiment, tmp_path / "run", callbacks=[recorder])
    assert summary["steps"] == 6
    assert "a callback ended the run at step 6" in capsys.readouterr().err
    assert [step for step, _ in recorder.steps] == [*range(1, 7)]
    assert [step for step, _ in recorder.evaluations] == [4, 6]
    assert load_prompt(tmp_path / "run").method.vectors[...].shape == (3, 32)
    steps = [r for r in outcome(tmp_path / "run")[0] if r["split"] == "train"]
    assert steps == [r for r in outcome(whole)[0] if r["split"] == "train"][:6]
    assert train(experiment, tmp_path / "run") == summary  # finished


def test_a_callback_ends_the_run_at_a_step_that_is_saved(experiment, tmp_path):
    """No further step has begun by then, and the checkpoint says that the run has ended."""
    checkpoints = experiment.checkpoints.model_copy(update={"every": 5})
    saving, folder = experiment.model_copy(update={"checkpoints": checkpoints}), tmp_path / "run"
    recorder = StopAfterStep(5)
    assert train(saving, folder, callbacks=[recorder])["steps"] == 5
    assert [step for step, _ in recorder.evaluations] == [4, 5]
    (folder / "summary.json").unlink()
    assert train(saving, folder)["steps"] == 5


def test_a_callback_ends_the_run_after_an_evaluation(experiment, tmp_path):
    folder = tmp_path / "run"
    summary = train(experiment, folder, callbacks=[StopAfterEvaluation(4)])
    assert summary["steps"] == 4
    # Killed before the summary is written, the run ends at the same step.
    (folder / "summary.json").unlink()
    assert train(experiment, folder)["steps"] == 4


@pytest.mark.parametrize(("failing", "saved"), [(FailAfterStep, 7), (FailAfterEvaluation, 8)])
def test_an_exception_of_a_callback_propagates_after_the_state_is_saved(
    experiment, whole, tmp_path, failing, saved
):
    folder, recorder = tmp_path / "run", Recorder()
    with pytest.raises(OSError, match="the disk is full"):
        train(experiment, folder, callbacks=[failing(), recorder])
    assert max(int(path.name) for path in (folder / "checkpoints").iterdir()) == saved
    after = Recorder()
    train(experiment, folder, callbacks=[after])
    assert [step for step, _ in after.steps] == [*range(saved + 1, 13)]
    assert outcome(folder) == outcome(whole)


def test_all_processes_learn_what_the_main_one_decides(monkeypatch):
    """An agreement returns what the previous call passed to it."""
    given = [0]

    def agreement(number):
        given.append(number)
        return given[-2]

    here = callbacks.Callbacks([FailAfterStep()])
    here._agreement = agreement
    assert here.decision(wait=False) == (False, None)
    here.on_step(6, {})
    assert here.decision(wait=False) == (False, None)
    assert here.decision(wait=False)[1].error is here.error
    monkeypatch.setattr(callbacks, "is_main", lambda: False)
    other, given = callbacks.Callbacks([FailAfterStep()]), [callbacks._FAIL]
    other._agreement = agreement
    other.on_step(6, {})
    assert other.error is None
    with pytest.raises(UserError, match="a callback failed in the main process"):
        raise other.decision(wait=False)[1].error
