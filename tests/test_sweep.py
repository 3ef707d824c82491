"""Sweeps: each trial matches a single run, and trials are pruned, fail, stop and resume."""

import errno
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import batch_of, example_of, golden_backbone, sweep_process

from softprompt import SoftPrompt, UserError, load_prompt, train
from softprompt.cli.main import main
from softprompt.data.batches import side_by_side
from softprompt.experiment.schema import OptimizerSettings
from softprompt.objectives.cross_entropy import cross_entropy
from softprompt.storage.run_folder import MetricsLog, read_metrics
from softprompt.sweep import program
from softprompt.sweep.outcome import Outcome, validation_at
from softprompt.sweep.program import shared_settings, step_group, step_groups, train_steps
from softprompt.sweep.runner import program_groups, sweep
from softprompt.sweep.scheduler import Scheduler
from softprompt.training.optimizers import UpdateRule, hyperparameters
from softprompt.training.step import PROGRAM, split, train_step, update


def test_a_padded_prompt_trains_like_an_unpadded_one(tiny):
    """The steps use AdamW with weight decay and clipping. The padding stays zero."""
    vectors = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
    examples = [example_of([5, 6, 7, 8], [[20, 21]], 0), example_of([9, 10], [[23]], 0)]
    batch = batch_of(examples)
    settings = OptimizerSettings(learning_rate=0.01, weight_decay=0.1, clip_norm=0.5)
    rule, after = UpdateRule.of(settings), []
    for method in (SoftPrompt(jnp.array(vectors)), SoftPrompt(jnp.array(vectors)).padded(9)):
        graphdef, trainable, frozen = split(method, tiny.backbone)
        state = rule.init(trainable, hyperparameters(settings, 5))
        for i in range(5):
            trainable, state, measured = train_step(
                trainable,
                state,
                frozen,
                batch,
                jax.random.key(i),
                graphdef=graphdef,
                optimizer=rule,
                objective=cross_entropy,
            )
        after.append((jax.tree.leaves(trainable)[0], measured))
    (plain, plain_metrics), (padded, padded_metrics) = after
    np.testing.assert_allclose(padded[:5], plain, atol=1e-6)
    np.testing.assert_array_equal(padded[5:], np.zeros((4, 32)))
    np.testing.assert_allclose(padded_metrics["loss"], plain_metrics["loss"], rtol=1e-6)
    assert np.abs(plain - vectors).max() > 0.01


def test_batches_side_by_side_are_padded_with_ignored_values():
    short = [example_of([5, 6], [[20]], 0)]
    long = [example_of([5, 6, 7, 8], [[20, 21]], 0)]
    batches = [batch_of(rows, padding=0) for rows in (short, long)]
    stacked = side_by_side(batches)
    assert stacked.tokens.shape == (2, 1, 5)
    assert (stacked.row_length, stacked.row_targets) == (5, 2)
    np.testing.assert_array_equal(stacked.target_candidates, [[[0, -1]], [[0, 0]]])
    np.testing.assert_array_equal(stacked.tokens[0, 0], [5, 6, 0, 0, 0])
    np.testing.assert_array_equal(stacked.tokens[1], batches[1].tokens)


DIFFERENT = """\
  points:
    - {prompt.length: 2, optimizer.learning_rate: 0.03, seed: 1}
    - {prompt.length: 6, optimizer.weight_decay: 0.1, training.steps: 8}
    - {prompt.length: 3, prompt.init: random, optimizer.warmup_steps: 0}
  at_once: 3
"""


@pytest.fixture
def together(monkeypatch):
    """Make the steps of trials together in one program, as on an accelerator."""
    monkeypatch.setattr(program, "take_turns", lambda session: False)


def test_each_trial_matches_a_single_run(space, together):
    """Three trials with different lengths and schedules share one program."""
    trials = sweep(space(DIFFERENT))
    assert len(program_groups(trials)) == 1
    for trial in trials:
        alone = trial.folder.with_name(f"alone-{trial.number}")
        summary = train(trial.experiment, alone)
        together = json.loads((trial.folder / "summary.json").read_text())
        for key in ("steps", "best_step", "trainable_parameters"):
            assert together[key] == summary[key]
        for split_ in ("validation", "test"):
            assert together[split_]["accuracy"] == summary[split_]["accuracy"]
            assert together[split_]["loss"] == pytest.approx(summary[split_]["loss"], rel=1e-5)
        vectors = [load_prompt(run).method.vectors[...] for run in (trial.folder, alone)]
        np.testing.assert_allclose(*vectors, atol=1e-4)
        records = [read_metrics(run) for run in (trial.folder, alone)]
        assert [(r["step"], r["split"]) for r in records[0]] == [
            (r["step"], r["split"]) for r in records[1]
        ]
        for one, other in zip(*records, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
            assert one.get("learning_rate") == other.get("learning_rate")


def test_distillations_in_one_program_share_their_teacher(space, together):
    objective = "objective={name: distill, teacher: {shots: 2}}"
    short = "training.steps=3", "evaluation.every=3", "data.test=null", objective
    trials = sweep(space("  optimizer.learning_rate: [0.1, 0.01]\n  at_once: 2\n", *short))
    assert len(program_groups(trials)) == 1
    for trial in trials:
        alone = trial.folder.with_name(f"alone-{trial.number}")
        train(trial.experiment, alone)
        found = [load_prompt(run).method.vectors[...] for run in (trial.folder, alone)]
        np.testing.assert_allclose(*found, atol=1e-5)


def test_on_a_cpu_each_trial_is_exactly_a_single_run(space, monkeypatch):
    """The trials take turns. Each makes its steps with its own batches, which are not padded."""
    monkeypatch.setattr(program, "train_steps", None)
    short = "training.steps=3", "evaluation.every=3", "data.test=null"
    trials = sweep(space("  seed: [0, 1]\n  at_once: 2\n", *short))
    for trial in trials:
        alone = trial.folder.with_name(f"alone-{trial.number}")
        train(trial.experiment, alone)
        vectors = [load_prompt(run).method.vectors[...] for run in (trial.folder, alone)]
        np.testing.assert_array_equal(*vectors)


@pytest.mark.parametrize(("budget", "at_once"), [(1, 1), (1e12, 4)])
def test_memory_limits_how_many_trials_train_at_once(
    space, together, monkeypatch, capsys, budget, at_once
):
    monkeypatch.setattr(program, "_free_memory", lambda: budget)
    sweep(space("  seed: [0, 1, 2, 3, 4]\n", "training.steps=1"))
    assert f"{at_once} of 5 trials at once" in capsys.readouterr().err


def test_a_step_that_runs_out_of_memory_uses_fewer_trials(space, together, monkeypatch, capsys):
    section = "  prompt.length: [2, 4]\n  seed: [0, 1]\n"
    widths = []

    def step_with_memory_for_two(runs, inputs):
        widths.append(len(runs))
        if len(runs) > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return step_group(runs, inputs)

    in_pairs = sweep(space(f"{section}  at_once: 2\n", folder="pairs"))
    section += "  at_once: 4\n"
    monkeypatch.setattr("softprompt.sweep.scheduler.step_group", step_with_memory_for_two)
    trials = sweep(space(section, folder="narrow"))
    assert widths == [4, *[2] * 24]
    assert "out of memory: trying 2 instead of 4 trials at once" in capsys.readouterr().err
    for trial, in_pair in zip(trials, in_pairs, strict=True):
        assert validation_at(trial.folder, 12)["loss"] == validation_at(in_pair.folder, 12)["loss"]

    def step_without_memory(runs, inputs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr("softprompt.sweep.scheduler.step_group", step_without_memory)
    with pytest.raises(UserError, match="out of memory with a single trial; set a smaller"):
        sweep(space(section, folder="none"))


def test_trials_of_a_mixture_of_experts_match_single_steps():
    """JAX has no `vmap` of their `ragged_dot`, so they run one after another."""
    backbone = golden_backbone("qwen3_moe-normed")
    examples = [example_of([5, 6, 7, 8], [[20, 21]], 0), example_of([9, 10], [[23]], 0)]
    batch = batch_of(examples)
    vectors = np.random.default_rng(0).normal(size=(2, 3, backbone.arch.hidden_size))
    optimizer, one_step = optax.sgd(0.1), jax.jit(update, static_argnames=PROGRAM)
    trials, alone = [], []
    for start in vectors:
        graphdef, trainable, frozen = split(SoftPrompt(jnp.array(start, jnp.float32)), backbone)
        static = {"graphdef": graphdef, "optimizer": optimizer, "objective": cross_entropy}
        state, key = optimizer.init(trainable), jax.random.key(0)
        trials.append((trainable, state, frozen[0], key))
        alone.append(one_step(trainable, state, frozen, batch, key, **static))
    trainable, states, constants, keys = zip(*trials, strict=True)
    batches = side_by_side([batch, batch])
    results = train_steps(trainable, states, constants, frozen[1], batches, keys, **static)
    for one, other in zip(results, alone, strict=True):
        np.testing.assert_allclose(one[2]["loss"], other[2]["loss"], rtol=1e-5)
        np.testing.assert_allclose(
            *(jax.tree.leaves(each[0])[0] for each in (one, other)), atol=1e-5
        )


@pytest.mark.parametrize(
    ("count", "devices", "most", "widths"),
    [
        (11, 1, 4, [4, 4, 2, 1]),
        (5, 4, 64, [5]),  # two on each device
        (9, 4, 64, [8, 1]),
        (9, 4, 4, [4, 4, 1]),
        (9, 4, 2, [4, 4, 1]),
        (9, 16, 8, [9]),
    ],
)
def test_a_group_fills_all_devices(count, devices, most, widths):
    """Nine trials take the time of three on four devices, not of four."""
    base = SimpleNamespace(
        backbone=SimpleNamespace(mesh=SimpleNamespace(shape={"trials": devices}))
    )
    state = SimpleNamespace(trainable=(), opt_state=(), frozen=((), ()), program={})
    session = SimpleNamespace(state=state, base=base, rows=4)
    assert [len(group) for group in step_groups([session] * count, most)] == widths


def test_memory_for_one_trial_on_each_device_is_the_least(space):
    scheduler = Scheduler(space("  seed: [0]\n"), None, None)
    scheduler._halve_groups(5, 4)
    assert scheduler._max_group == 4
    with pytest.raises(UserError, match="with a single trial"):
        scheduler._halve_groups(4, 4)


def test_trials_that_cannot_share_a_program_are_grouped(space):
    def count(section, *overrides):
        trials = space(section, *overrides).trials()
        assert {shared_settings(t.experiment) for g in program_groups(trials) for t in g[:1]} == {
            shared_settings(t.experiment) for t in trials
        }
        return len(program_groups(trials))

    assert count("  prompt.length: [1, 9]\n  seed: [0, 1]\n  prompt.init: [random, labels]\n") == 1
    assert count("  optimizer.schedule: [linear, cosine]\n") == 2
    assert count("  training.batch_size: [2, 4]\n") == 2
    assert count("  method: [prompt, lora, none]\n") == 3
    assert count("  optimizer.name: [adafactor]\n  prompt.length: [1, 9]\n") == 2
    assert count("  prompt.reparametrization: [lstm]\n  prompt.length: [1, 9]\n") == 2
    assert count("  shots: [2]\n  seed: [0, 1]\n") == 2
    teacher = "objective={name: distill, teacher: {shots: 2}}"
    assert count("  seed: [0, 1]\n", teacher) == 2


def test_the_best_trials_of_a_rung_continue_and_the_others_are_pruned(space, capsys):
    trials = sweep(
        space(
            "  optimizer.learning_rate: [0.3, 0.1, 0.03, 1e-6, 1e-7]\n"
            "  halving: {rungs: [4, 8], factor: 2}\n  at_once: 2\n",
            "evaluation.metric=loss",
        )
    )
    outcomes = [Outcome.read(trial.folder) for trial in trials]
    at_4 = [validation_at(trial.folder, 4)["loss"] for trial in trials]
    kept = sorted(range(5), key=at_4.__getitem__)[:2]
    assert {i for i, end in enumerate(outcomes) if end.step == 4} == set(range(5)) - set(kept)
    best = min(kept, key=lambda i: validation_at(trials[i].folder, 8)["loss"])
    assert [i for i, end in enumerate(outcomes) if end.state == "finished"] == [best]
    assert sorted(end.step for end in outcomes) == [4, 4, 4, 8, 12]
    assert "pruned at step 4" in capsys.readouterr().err


def test_a_sweep_killed_between_rungs_makes_the_same_decisions(space):
    """SIGKILL arrives between two rungs. The later rung still has trials to prune."""
    section = (
        "  optimizer.learning_rate: [0.3, 0.1, 0.03, 1e-6]\n"
        "  halving: {rungs: [4, 8], factor: 2}\n  at_once: 4\n"
    )
    whole = sweep(space(section, folder="whole"))
    killed = space(section, "checkpoints.every=1", folder="killed")
    dying = sweep_process(
        killed, "if slots[0].session.run.step == 6: os._exit(9)", "checkpoints.every=1"
    )
    errors = dying.communicate()[1]
    assert dying.returncode == 9, errors
    trials = sweep(killed)
    ends = [[Outcome.read(trial.folder) for trial in each] for each in (whole, trials)]
    assert ends[0] == ends[1]
    assert sorted(end.step for end in ends[1]) == [4, 4, 8, 12]


def test_a_failed_trial_is_recorded_and_the_others_continue(space, capsys):
    found = space("  optimizer.learning_rate: [0.1, 3e38]\n  prompt.length: [2, 300]\n")
    command = ["sweep", str(found.file.path), "--folder", str(found.folder)]
    assert main(command) == 1
    captured = capsys.readouterr()
    assert "3 of 4 trials failed, the first: trial 1" in captured.err
    outcomes = [Outcome.read(trial.folder) for trial in found.trials()]
    assert [end.state for end in outcomes] == ["finished", "failed", "failed", "failed"]
    assert "too short for 300 virtual tokens" in outcomes[1].error
    assert "lower optimizer.learning_rate" in outcomes[2].error
    assert captured.out.splitlines()[1].split()[:3] == ["0", "0.1", "2"]
    assert main(command) == 1
    assert "loaded in" not in capsys.readouterr().err, "nothing is run again"


def test_a_killed_sweep_resumes(space):
    """SIGKILL arrives during the second pair of trials. The first pair does not run again."""
    section = "  optimizer.learning_rate: [0.1, 0.03]\n  prompt.length: [2, 4]\n  at_once: 2\n"
    whole = sweep(space(section, folder="whole"))
    killed = space(section)
    second = "any(s.opened.trial.number in (1, 3) and s.session.run.step == 6 for s in slots)"
    dying = sweep_process(killed, f"if {second}: os._exit(9)")
    errors = dying.communicate()[1]
    assert dying.returncode == 9, errors
    outcomes = [Outcome.read(trial.folder) for trial in killed.trials()]
    finished = [i for i, end in enumerate(outcomes) if end]
    assert len(finished) == 2
    before = [(killed.trials()[i].folder / "summary.json").stat().st_mtime_ns for i in finished]
    trials = sweep(space(section))
    after = [(trials[i].folder / "summary.json").stat().st_mtime_ns for i in finished]
    assert before == after
    for one, other in zip(whole, trials, strict=True):
        vectors = [load_prompt(t.folder).method.vectors[...] for t in (one, other)]
        np.testing.assert_array_equal(*vectors)


def test_stopping_a_sweep_saves_the_other_trials_if_one_fails(space):
    """The infinite parameters of the failing trial are detected after the signal."""
    found = space("  optimizer.learning_rate: [3e38, 0.1]\n  at_once: 2\n", "evaluation.every=6")
    stops = "if slots[0].session.run.step == 1: os.kill(os.getpid(), 15)"
    stopping = sweep_process(found, stops, "evaluation.every=6")
    errors = stopping.communicate()[1]
    assert stopping.returncode == 128 + 15, errors
    assert "stopped, all saved" in errors
    failed, other = found.trials()
    assert Outcome.read(failed.folder).state == "failed"
    assert Outcome.read(other.folder) is None
    assert [path.name for path in (other.folder / "checkpoints").iterdir()] == ["2"]


def test_a_trial_with_an_unusable_folder_fails_and_the_others_continue(space):
    unusable = sweep(space("  seed: [0, 1]\n", "training.steps=1"))[0].folder
    shutil.rmtree(unusable)
    unusable.mkdir()
    (unusable / "notes.txt").write_text("mine")
    trials = sweep(space("  seed: [0, 1]\n", "training.steps=1"))
    first, second = (Outcome.read(trial.folder) for trial in trials)
    assert (first.state, second.state) == ("failed", "finished")
    assert "not a run folder (it contains notes.txt" in first.error
    assert "choose another folder" in first.error
    assert (unusable / "notes.txt").read_text() == "mine"


def test_a_file_that_cannot_be_written_gives_a_one_line_error(space):
    trial = sweep(space("  seed: [0]\n", "training.steps=1"))[0].folder
    shutil.rmtree(trial)
    trial.touch()
    with pytest.raises(UserError, match=r"000: cannot be read or written \(File exists\)"):
        sweep(space("  seed: [0]\n", "training.steps=1"))


def test_a_write_error_keeps_the_work_of_other_trials(space, monkeypatch):
    section = "  seed: [0, 1]\n  at_once: 2\n"
    trials = space(section).trials()
    log = MetricsLog.write

    def write(self, step, split, values):
        if step == 4 and self._file.name.startswith(str(trials[0].folder)):
            raise OSError(errno.ENOSPC, "No space left on device")
        log(self, step, split, values)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", write)
        with pytest.raises(UserError, match="No space left on device"):
            sweep(space(section, "evaluation.every=12", "training.log_every=4"))
    saved = trials[1].folder / "checkpoints"
    assert [int(path.name) >= 3 for path in saved.iterdir()] == [True]


def test_a_sweep_does_not_write_into_the_folder_of_another_sweep(space, capsys):
    sweep(space("  seed: [0]\n", "training.steps=1"))
    other = space("  seed: [1]\n", "training.steps=1")
    changed = r"another sweep \(sweep.parameters.seed: was \[0\], is now \[1\]"
    with pytest.raises(UserError, match=changed):
        sweep(other)
    command = ["sweep", str(other.file.path), "training.steps=1", "--folder", str(other.folder)]
    assert main([*command, "--dry-run"]) == 1
    assert "holds another sweep" in capsys.readouterr().err
    train(space("  seed: [0]\n").file.experiment(), space("  seed: [0]\n", folder="run").folder)
    with pytest.raises(UserError, match="not a sweep folder"):
        sweep(space("  seed: [0]\n", folder="run"))


def test_a_dry_run_lists_the_trials_and_writes_nothing(space, capsys):
    found = space("  prompt.length: [2, 4]\n  method: [prompt, none]\n")
    command = ["sweep", str(found.file.path), "--folder", str(found.folder), "--dry-run"]
    assert main([*command, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert [trial["parameters"] for trial in planned["trials"]] == [
        dict(trial.parameters) for trial in found.trials()
    ]
    assert [trial["group"] for trial in planned["trials"]] == [0, 1, 0, 2]
    assert [group["waiting"] for group in planned["groups"]] == [2, 1, 1]
    assert planned["groups"][0]["at_once"] == 1
    assert planned["seconds"] == pytest.approx(
        sum(group["seconds"] for group in planned["groups"]), abs=0.1
    )
    assert planned["groups"][0]["seconds"] > 0
    assert not found.folder.exists()
    assert main(command) == 0
    assert "program 0: 2 trials to run, 1 at once, about" in capsys.readouterr().out
