"""Two processes with two devices each train one run, as two hosts would."""

import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, write_experiment
from processes import ForkedProcess
from safetensors.numpy import load_file, save_file

from softprompt import UserError, load_experiment, load_prompt, train
from softprompt.cli import cluster
from softprompt.storage.run_folder import read_metrics

_PROCESS = """\
import os, sys, time
os.environ |= {environment}
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=2"
from softprompt.cli import cluster
from softprompt.cli.main import main
from softprompt.training.session import Session
cluster._START_SECONDS, cluster._HEARTBEAT_SECONDS, cluster._END_SECONDS = {limits}
cluster._REPORT_SECONDS = 90
accept = Session.accept
def slower(*arguments, **options):
    time.sleep({pause})
    accept(*arguments, **options)
Session.accept = slower
sys.exit(main())
"""
_VARIABLES = ["JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"]
# A batch on more devices has more packs, and other padding.
DIFFERENT = {"examples_per_second", "seconds", "padding"}


def free_address():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


class Pair:
    """Two processes of `softprompt train`."""

    def __init__(self, file, folder, *overrides, pause=0.0, limits=(90, 10, 10), count=2):
        address = free_address()
        self.processes = []
        for number in range(count):
            environment = dict(zip(_VARIABLES, [address, "2", str(number)], strict=True))
            code = _PROCESS.format(environment=environment, limits=limits, pause=pause)
            command = ["train", str(file), *overrides, "--run-dir", str(folder)]
            self.processes.append(ForkedProcess(code, command))

    def end(self):
        """Wait for the end, and return the exit statuses and what was printed."""
        printed = [process.communicate()[1] for process in self.processes]
        return [process.returncode for process in self.processes], printed


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_experiment(tmp_path_factory.mktemp("hosts"), 5, 5)


@pytest.fixture(scope="module")
def whole(file):
    """The run folder of one process with one device."""
    train(load_experiment(file), file.parent / "whole")
    return file.parent / "whole"


@pytest.fixture(scope="module")
def full(file):
    """Settings that train all parameters of a model that four devices divide."""
    base = file.parent / "base"
    shutil.copytree(GOLDEN / "llama-grouped", base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": 260}))
    tensors = load_file(base / "model.safetensors")
    for name, array in tensors.items():
        if len(array) == config["vocab_size"]:
            tensors[name] = np.concatenate([array, array[:1]])
    save_file(tensors, base / "model.safetensors")
    return [f"base={base}", "method=full", "optimizer.learning_rate=0.001"]


@pytest.fixture(scope="module")
def whole_full(file, full):
    """The run folder of full fine-tuning with one device."""
    train(load_experiment(file, full), file.parent / "whole-full")
    return file.parent / "whole-full"


def arrays_of(folder):
    trained = load_prompt(folder)
    return trained.method.arrays(trained.backbone)


def assert_same(folder: Path, expected: Path) -> None:
    """Compare the metrics, the summary and the learned arrays of two runs."""
    records, wanted = read_metrics(folder), read_metrics(expected)
    assert [r["step"] for r in records] == [r["step"] for r in wanted]
    for record, other in zip(records, wanted, strict=True):
        assert record.keys() == other.keys()
        for key in record.keys() - DIFFERENT - {"split"}:
            assert record[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5), key
    summaries = [json.loads((f / "summary.json").read_text()) for f in (folder, expected)]
    for key in ("validation", "test"):
        assert summaries[0][key] == pytest.approx(summaries[1][key], abs=1e-5)
    learned = arrays_of(expected)
    for name, array in arrays_of(folder).items():
        np.testing.assert_allclose(array, learned[name], atol=1e-5)


def wait_for_checkpoint(folder, step, pair):
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / str(step)).exists():
        assert all(p.poll() is None for p in pair.processes), pair.end()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_processes_end_as_one_does(file, tmp_path, whole):
    pair = Pair(file, tmp_path / "run", "compute.mesh.data=-1")
    statuses, (printed, printed_by_other) = pair.end()
    assert statuses == [0, 0], (printed, printed_by_other)
    assert "2 processes with 4 devices" in printed
    assert "Gloo" not in printed
    assert printed_by_other == ""
    assert_same(tmp_path / "run", whole)


def test_a_lost_process_ends_the_run_which_then_resumes(file, tmp_path, whole):
    pair = Pair(file, tmp_path / "run", "compute.mesh.data=-1", pause=0.3)
    wait_for_checkpoint(tmp_path / "run", 4, pair)
    pair.processes[1].kill()
    statuses, (printed, _) = pair.end()
    assert statuses == [1, -signal.SIGKILL], printed
    last = printed.splitlines()[-1]
    assert "another process ended or was lost" in last
    assert "Check failure" not in printed
    assert not (tmp_path / "run" / "summary.json").exists()
    train(load_experiment(file), tmp_path / "run")  # on one process
    assert_same(tmp_path / "run", whole)


def test_a_divided_state_is_saved_and_restored(file, full, tmp_path, whole_full):
    run, one = tmp_path / "run", tmp_path / "one"
    pair = Pair(file, run, *full, "compute.mesh.fsdp=-1", pause=0.3)
    wait_for_checkpoint(run, 4, pair)
    pair.processes[1].send_signal(signal.SIGTERM)  # one of them is enough
    statuses, (printed, _) = pair.end()
    assert statuses == [128 + signal.SIGTERM] * 2, printed
    assert "all saved; start it again to resume" in printed
    stopped = max(int(path.name) for path in (run / "checkpoints").iterdir())
    assert 4 <= stopped < 12
    shutil.copytree(run, one)
    train(load_experiment(file, full), one)  # on one process and one device
    assert_same(one, whole_full)
    statuses, printed = Pair(file, run, *full, "compute.mesh.fsdp=-1").end()
    assert statuses == [0, 0], printed
    assert f"resuming from step {stopped}" in printed[0]
    assert_same(run, whole_full)


def test_an_error_is_printed_once(file, tmp_path):
    pair = Pair(file, tmp_path / "run", limits=(90, 90, 90))
    statuses, (printed, printed_by_other) = pair.end()
    assert statuses == [1, 1]
    assert "2 processes need a mesh of all their devices" in printed.splitlines()[-1]
    assert printed_by_other == ""


def test_a_process_that_nobody_joins_ends_with_one_line(file, tmp_path):
    pair = Pair(file, tmp_path / "run", limits=(2, 4, 10), count=1)
    ((status,), (printed,)) = pair.end()
    assert status == 1
    assert "did not all connect within 2 seconds" in printed
    assert len(printed.splitlines()) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["localhost:1", "2", ""], "JAX_COORDINATOR_ADDRESS is set, but not JAX_PROCESS_ID"),
        (["", "2", ""], "but not JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID"),
        (["localhost", "2", "0"], "not an address such as"),
        (["localhost:1", "two", "0"], "JAX_NUM_PROCESSES=two: not a whole number"),
        (["localhost:1", "2", "2"], "JAX_PROCESS_ID=2: must be from 0 to 1"),
    ],
)
def test_wrong_variables_are_reported(monkeypatch, values, message):
    for name, value in zip(_VARIABLES, values, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message), cluster.cluster():
        pass


@pytest.mark.parametrize(
    "environment",
    [
        {},
        dict(zip(_VARIABLES, ["localhost:1", "1", "0"], strict=True)),
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"},  # outside of a step
        {  # an interactive shell
            "SLURM_JOB_ID": "1",
            "SLURM_NTASKS": "8",
            "SLURM_STEP_NUM_TASKS": "1",
            "SLURM_STEP_NODELIST": "node1",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
        },
    ],
)
def test_a_single_process_joins_nothing(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with cluster.cluster() as shows:
        assert shows


def test_slurm_is_detected(monkeypatch):
    names = ("JOB_ID", "NTASKS", "STEP_NUM_TASKS", "PROCID", "LOCALID")
    for name, value in zip(names, "94425", strict=True):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-4]")
    assert cluster._arguments() == {}
    assert os.environ["SLURM_NTASKS"] == "4"


_WITH_CALLBACK = """\
import os, sys
os.environ |= {environment}
import jax
from softprompt import Callback, load_experiment, train
from softprompt.cli.cluster import cluster

class Stop(Callback):
    def on_step(self, step, measured):
        assert jax.process_index() == 0
        return step == 5

with cluster():
    experiment = load_experiment(sys.argv[1], ["compute.mesh.data=-1"])
    train(experiment, sys.argv[2], callbacks=[Stop()])
"""


def test_a_callback_of_the_main_process_ends_the_run_on_all_hosts(file, tmp_path):
    address, processes = free_address(), []
    for number in range(2):
        environment = dict(zip(_VARIABLES, [address, "2", str(number)], strict=True))
        code = _WITH_CALLBACK.format(environment=environment)
        processes.append(ForkedProcess(code, [str(file), str(tmp_path / "run")]))
    printed = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 7
