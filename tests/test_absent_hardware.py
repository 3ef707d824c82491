"""The training step compiled for hardware that is not here. `make plan-test` runs these tests."""

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import write_experiment

REPOSITORY = Path(__file__).parent.parent
NEEDED = {"v5e": "libtpu", "h100": "jax_plugins.xla_cuda12"}
KERNELS = {"v5e": "pallas", "h100": "cudnn"}


def is_installed(name):
    package, *_ = name.split(".")
    return importlib.util.find_spec(package) and importlib.util.find_spec(name)


def softprompt(*words):
    return subprocess.run(
        [sys.executable, "-m", "softprompt", *map(str, words)],
        cwd=REPOSITORY,
        env={name: value for name, value in os.environ.items() if name[:3] not in ("JAX", "XLA")},
        capture_output=True,
        text=True,
    )


def plan(hardware, tokens, *overrides):
    done = softprompt(
        *("plan", "experiments/sentiment.yaml", "base=llama-3.2-1b", "compute.dtype=bfloat16"),
        *("prompt.length=100", *overrides, "--hardware", hardware, "--tokens", tokens, "--json"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=["v5e", "h100"])
def plans(request):
    """Plan for one device, for several, and with the prompt in every row."""
    if not is_installed(NEEDED[request.param]):
        pytest.skip(f"{NEEDED[request.param]} is not installed")
    several = {"v5e": 8, "h100": 4}[request.param]
    cases = {
        "one": (f"{request.param}-1", 256),
        "several": (f"{request.param}-{several}", 256),
        "prepended": (f"{request.param}-1", 356, "template.input={text} {prompt}"),
        "kernel": (f"{request.param}-1", 256, f"compute.attention={KERNELS[request.param]}"),
    }
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(cases, pool.map(lambda case: plan(*case), cases.values()), strict=True))


def test_the_step_is_compiled_for_the_hardware(plans):
    for made in plans.values():
        assert made["compiler"] == {"v5e": "tpu", "h100": "cuda"}[made["hardware"].split("-")[0]]
        assert made["planned"]["fits"]
        assert made["parameters"] - made["trained_parameters"] == 1_235_814_400


def test_memory_on_each_device_falls_as_the_mesh_grows(plans):
    one, several = (plans[name]["planned"] for name in ("one", "several"))
    assert several["memory"]["base"] < 1.01 * one["memory"]["base"] / several["devices"]
    assert several["memory"]["temporaries"] < one["memory"]["temporaries"] / 2


def test_a_shared_prefix_needs_less_memory_than_prepending(plans):
    shared, prepended = (
        plans[name]["planned"]["memory"]["temporaries"] for name in ("one", "prepended")
    )
    assert shared < 0.85 * prepended


def test_a_kernel_of_attention_needs_less_memory_than_xla(plans):
    kernel, xla = (plans[name]["planned"]["memory"]["temporaries"] for name in ("kernel", "one"))
    assert kernel < xla


def test_the_weights_are_gathered_once_for_each_pass(plans):
    moved, devices = (plans["several"]["planned"][name] for name in ("moved", "devices"))
    layers = 973_146_112 * 2  # bytes
    # Forward and backward. The last of 16 layers is not in a loop, and gathered once for both.
    gathered = (2 - 1 / 16) * layers
    assert moved["all-gather"] == pytest.approx(gathered * (devices - 1) / devices, rel=0.002)


def test_other_commands_run_on_the_cpu_and_print_nothing_new(tmp_path):
    if not any(map(is_installed, NEEDED.values())):
        pytest.skip("no compiler is installed")
    done = softprompt("train", write_experiment(tmp_path), "--run-dir", tmp_path / "run")
    assert done.returncode == 0
    printed = done.stderr.lower()
    assert not [word for word in ("cuda", "tpu", "gpu", "plugin", "warning") if word in printed]
