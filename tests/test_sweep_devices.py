"""Sweeps on many devices: each trial matches the same sweep on one device.

One process with eight virtual devices runs all cases, because it starts slowly.
"""

import json
import math
import re
import shutil
import types

import numpy as np
import pytest
from conftest import GOLDEN, write_experiment
from processes import ForkedProcess
from safetensors.numpy import load_file, save_file

from softprompt import load_prompt
from softprompt.experiment.reading import ExperimentFile
from softprompt.storage.run_folder import read_metrics
from softprompt.sweep.outcome import Outcome
from softprompt.sweep.runner import sweep
from softprompt.sweep.space import Space

TRIALS = """\
sweep:
  points:
    - {prompt.length: 2, optimizer.learning_rate: 0.03, seed: 1}
    - {prompt.length: 5, optimizer.weight_decay: 0.1, training.steps: 2}
    - {prompt.length: 3, prompt.init: random, optimizer.warmup_steps: 0}
    - {prompt.length: 4, seed: 2}
    - {prompt.length: 1, seed: 3}
    - {optimizer.learning_rate: 0.03, seed: 4}
    - {optimizer.learning_rate: 0.01, seed: 5}
    - {optimizer.learning_rate: 0.003, seed: 6}
  at_once: 8
"""
CASES = {  # the overrides of each case
    "four": ["sweep.devices=4", "sweep.at_once=5"],  # two places on each device, three left over
    "eight": ["sweep.devices=-1"],
    "mesh": ["sweep.devices=2", "compute.mesh={data: 2, model: 2}"],
}
_PROCESS = """\
import json, os, sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 8)
from softprompt.cli.main import main
from softprompt.evaluation import scoring
from softprompt.sweep import program, scheduler
from softprompt.training import reporting

reporting.draw_curves = lambda *_: None
file, folder, cases = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])

def sweep(name, *overrides):
    return main(["sweep", file, *overrides, "--folder", str(folder / name)])

def keep_compiled(module, name):
    function = getattr(module, name)
    def call(*arguments, **options):
        path = folder / f"{case}.{name}"
        if not path.exists():
            path.write_text(function.lower(*arguments, **options).compile().as_text())
        return function(*arguments, **options)
    setattr(module, name, call)

keep_compiled(program, "train_steps")
keep_compiled(scoring, "candidate_scores")
for case, overrides in cases.items():
    assert sweep(case, *overrides) == 0
case = "four"
os.dup2(os.open(folder / "dry-run.txt", os.O_CREAT | os.O_WRONLY), 1)
assert sweep("dry-run", "sweep.devices=4", "--dry-run") == 0
assert sweep("too-many", "sweep.devices=9") == 1
step = scheduler.Scheduler._step
def die(self, slots):
    if slots[0].session.run.step == 3:
        sys.stdout.flush()
        os._exit(9)
    step(self, slots)
scheduler.Scheduler._step = die
sweep("killed", "sweep.devices=4")
"""


@pytest.fixture(scope="module", autouse=True)
def no_curves():
    """Save the time of drawing the curves of each trial."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("softprompt.training.reporting.draw_curves", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Run the sweep on one device here, and on many in a process. Give its folder and errors."""
    folder = tmp_path_factory.mktemp("devices")
    base = _divisible_model(folder / "model")
    file = write_experiment(folder, 5, 5)
    text = file.read_text().replace(str(GOLDEN / "llama-grouped"), str(base))
    text = text.replace("steps: 12,", "steps: 4,").replace(", test: test.jsonl", "")
    text = text.replace("learning_rate: 0.1,", "learning_rate: 0.03,")  # rounding grows with it
    file.write_text(f"{text}checkpoints: {{every: 2}}\n{TRIALS}")
    process = ForkedProcess(_PROCESS, [str(file), str(folder), json.dumps(CASES)])
    trials = sweep(Space(ExperimentFile(file), folder / "one"))
    errors = process.communicate()[1]
    assert process.returncode == 9, errors
    return types.SimpleNamespace(folder=folder, file=file, trials=trials, errors=errors)


def _divisible_model(folder):
    """Write the tiny model with one more embedding, so that two devices can divide them."""
    shutil.copytree(GOLDEN / "llama-grouped", folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.embed_tokens.weight"
    tensors[name] = np.concatenate([tensors[name], tensors[name][:1]])
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] = len(tensors[name])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def require_same_results(trials, others):
    for trial, other in zip(trials, others, strict=True):
        assert Outcome.read(trial.folder) == Outcome.read(other)
        records = [read_metrics(run) for run in (trial.folder, other)]
        for one, two in zip(*records, strict=True):
            assert (one["step"], one["split"]) == (two["step"], two["split"])
            assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        vectors = [load_prompt(run).method.vectors[...] for run in (trial.folder, other)]
        np.testing.assert_allclose(*vectors, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_each_trial_matches_the_trial_on_one_device(ran, case):
    require_same_results(ran.trials, sorted((ran.folder / case / "trials").iterdir()))
    assert "devices" not in (ran.folder / case / "trials" / "000" / "config.yaml").read_text()


def test_a_killed_sweep_resumes_on_one_device(ran):
    killed = Space(ExperimentFile(ran.file), ran.folder / "killed")
    ended = [trial.number for trial in killed.trials() if Outcome.read(trial.folder)]
    assert ended == [1]
    require_same_results(ran.trials, [trial.folder for trial in sweep(killed)])


def test_a_dry_run_shows_the_devices(ran):
    printed = (ran.folder / "dry-run.txt").read_text()
    assert "8 trials to run, 8 at once on 4 devices, about" in printed


def test_too_many_devices_are_rejected_before_anything_is_written(ran):
    assert re.search(r"sweep.devices: .*needs 9 devices, but there are 8", ran.errors)
    assert not (ran.folder / "too-many").exists()


@pytest.mark.parametrize(
    ("case", "devices", "trials"), [("four", 4, 4), ("eight", 8, 8), ("mesh", 8, 2)]
)
def test_only_results_travel_between_trials(ran, case, devices, trials):
    """They are, for each trial, three arrays [P, D] and a few numbers."""
    text = (ran.folder / f"{case}.train_steps").read_text()
    part_of_device = np.arange(devices) // (devices // trials)
    travelled = sum(
        size
        for size, groups in collectives(text)
        if any(len({*part_of_device[group]}) > 1 for group in groups)
    )
    assert 0 < travelled <= 8 * 4 * (3 * 5 * 32 + 10)


def test_the_base_is_not_copied_for_each_trial(ran):
    text = (ran.folder / "four.train_steps").read_text()
    assert "f32[3,32,50]" in text  # a weight of all layers
    assert "f32[2,5,32]" in text  # the prompts of one device
    assert not re.search(r"f32\[\d+,3,32,50\]", text)


def test_evaluations_divide_rows_over_the_devices_of_the_trials(ran):
    """There are 9 examples in 8 packs, one for each device."""
    text = (ran.folder / "eight.candidate_scores").read_text()
    assert re.search(r"f32\[1,\d+,32\]", text)
    assert not re.search(r"f32\[8,\d+,(32|260)\]", text)


def collectives(text):
    """Yield the bytes of the result of each collective, and its groups of devices."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    for line in re.findall(rf".* = .* (?:{kinds})(?:-start)?\(.*", text):
        shapes = re.findall(
            r"\b(?:f32|s32|u32|pred)\[([\d,]*)\]", re.split(rf" (?:{kinds})", line)[0]
        )
        size = 4 * sum(math.prod(int(n) for n in shape.split(",") if n) for shape in shapes)
        yield size, _groups(line)


def _groups(line):
    if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = [int(n) for n in re.findall(r"=(\d+)", found[1])]
        axes = [int(n) for n in re.findall(r"axis_(\d+)", found[2])]
        others = [axis for axis in range(len(sizes)) if axis not in axes]
        devices = np.arange(math.prod(sizes)).reshape(sizes).transpose(others + axes)
        return devices.reshape(-1, math.prod(sizes[axis] for axis in axes))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, sizes, order = (
            [int(n) for n in (part or "").split(",") if n] for part in found.groups()
        )
        devices = np.arange(math.prod(sizes)).reshape(sizes)
        return devices.transpose(order or None).reshape(shape)
    found = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", line)
    assert found, line
    return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])]
