"""Meshes of devices: how they are made, how they divide models, and what runs on them."""

import json
import os
import subprocess
import sys
from argparse import ArgumentTypeError
from functools import partial
from pathlib import Path

import pytest
from conftest import FAMILIES_GOLDEN, GOLDEN
from flax import nnx

from softprompt import SoftPrompt, UserError, load_base, load_prompt, make_mesh
from softprompt.backbones import decoder, t5
from softprompt.backbones.config import architecture_of
from softprompt.backbones.quantization import inputs_together
from softprompt.cli.arguments import mesh_sizes
from softprompt.cli.main import main
from softprompt.experiment.reading import load_experiment
from softprompt.parallel.mesh import ROWS, VOCABULARY, axis_size
from softprompt.parallel.sharding import axes_of, meshes_of, require_divisible, require_rows
from softprompt.training.preparation import Preparation

IN_OUT = ("fsdp", "model")  # each device computes some of the outputs
OUT_IN = ("model", "fsdp")  # each device reads some of the inputs


def stacked(matrix: str, inputs, outputs):
    """Return the parameters of the same matrix of all layers, and the axes that divide them."""
    return {
        f"{matrix}.kernel": (None, inputs, outputs),
        f"{matrix}.scale": (None, outputs),
        f"{matrix}.group_scale": (None, inputs, outputs),
        f"{matrix}.group_offset": (None, inputs, outputs),
        f"{matrix}.bias": (None, outputs),
    }


def layers(name: str, *parts: str):
    """Return the parameters of layers with attention and feed-forward parts, and their axes."""
    found = {}
    for part in parts:
        of_attention = part in ("attention", "cross")
        firsts = ("query", "key", "value") if of_attention else ("gate", "up")
        for first in firsts:
            found |= stacked(f"{name}.{part}.{first}", *IN_OUT)
        found |= stacked(f"{name}.{part}.{'output' if of_attention else 'down'}", *OUT_IN)
    return found


def experts(matrix: str, inputs, outputs):
    """Return the parameters of the same matrix of all experts of all layers, and their axes."""
    return {
        f"layers.feed_forward.experts.{matrix}.kernel": (None, None, inputs, outputs),
        f"layers.feed_forward.experts.{matrix}.scale": (None, None, outputs),
        f"layers.feed_forward.experts.{matrix}.group_scale": (None, None, inputs, outputs),
        f"layers.feed_forward.experts.{matrix}.group_offset": (None, None, inputs, outputs),
    }


DIVIDED = {
    "embedding.table": (VOCABULARY, None),
    "head.kernel": (None, VOCABULARY),
    "head.scale": (VOCABULARY,),
    "head.group_scale": (None, VOCABULARY),
    "head.group_offset": (None, VOCABULARY),
    **layers("layers", "attention", "feed_forward"),
    **layers("encoder", "attention", "feed_forward"),
    **layers("decoder", "attention", "cross", "feed_forward"),
    **experts("gate", *IN_OUT),
    **experts("up", *IN_OUT),
    **experts("down", *OUT_IN),
}
WHOLE = {
    "positions",
    "encoder_bias",
    "decoder_bias",
    "layers.feed_forward.router.kernel",
}  # + norms


def test_the_table_says_how_every_parameter_of_every_family_is_divided():
    seen = set()
    for folder in sorted(FAMILIES_GOLDEN.iterdir()):
        config = json.loads((folder / "config.json").read_text())
        for path, shape in quantized_parameters_of(config):
            whole = (None,) * len(shape)
            is_whole = path in WHOLE or "norm" in path
            assert axes_of(path, len(shape)) == (whole if is_whole else DIVIDED[path]), path
            seen.add(path)
    missing = (DIVIDED.keys() | WHOLE) - seen
    assert all(path.endswith(".bias") for path in missing)  # no family has all of them


def quantized_parameters_of(config):
    """Return the paths and shapes of the parameters of a model with int8 or int4 matrices."""
    sizes = {"intermediate_size", "moe_intermediate_size", "n_inner", "ffn_dim", "d_ff"}
    config |= dict.fromkeys(config.keys() & sizes, 24)  # the golden models have odd sizes
    arch = architecture_of(config, {"lm_head.weight"})
    kind = t5.T5 if isinstance(arch, t5.T5Architecture) else decoder.Decoder
    return [
        (".".join(map(str, path)), parameter.shape)
        for quantize in ("int8", "int4")
        for path, parameter in nnx.to_flat_state(
            nnx.state(nnx.eval_shape(partial(kind, arch, quantize=quantize)), nnx.Param)
        )
    ]


def test_the_axes_of_a_parameter_do_not_depend_on_what_is_around_its_path():
    for around in ("", "1.", "0.mu.1.layers."):
        assert axes_of(f"{around}attention.query.kernel.value", 3) == (None, "fsdp", "model")
    assert axes_of("layers.attention.query.low_rank.down", 3) == (None, None, None)
    assert axes_of("count", 0) == ()
    assert axes_of("v_row.layers.attention.query.kernel", 1) == ("model",)


def arch_of(**changes):
    config = json.loads((FAMILIES_GOLDEN / "llama-biased" / "config.json").read_text())
    return architecture_of(config | changes, set())


SMOLLM2 = {
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "vocab_size": 49152,
}


class OfSizes:
    """The part of a mesh that the checks use, without devices."""

    def __init__(self, **sizes: int):
        self.shape = {"trials": 1, "data": 1, "fsdp": 1, "model": 1} | sizes


def test_a_mesh_that_does_not_divide_a_model_is_rejected_with_meshes_that_do():
    arch = arch_of(**SMOLLM2)
    require_divisible(arch, None)
    for sizes in meshes_of(arch, 12):
        require_divisible(arch, OfSizes(**sizes))
    assert {"data": 2, "fsdp": 2, "model": 3} in list(meshes_of(arch, 12))
    with pytest.raises(UserError) as error:
        require_divisible(arch, OfSizes(model=2))
    assert str(error.value) == (
        "mesh {model: 2}: the model has 9 attention heads, which model 2 does not divide; meshes "
        "of 2 devices that work: {fsdp: 2}, {data: 2}"
    )
    with pytest.raises(UserError, match="has 49152 tokens in its vocabulary, which fsdp 5 does"):
        require_divisible(arch, OfSizes(fsdp=5))
    with pytest.raises(UserError, match="has 3 key-value heads, which model 9 does not divide"):
        require_divisible(arch, OfSizes(model=9))
    with pytest.raises(UserError, match="has 67 tokens in its vocabulary"):
        require_divisible(arch_of(intermediate_size=24), OfSizes(model=2))


def test_a_mesh_must_not_divide_the_groups_of_int4_matrices():
    arch, together = arch_of(**SMOLLM2, head_dim=64), inputs_together("int4")
    require_divisible(arch, OfSizes(fsdp=4), inputs_together("int8"))
    with pytest.raises(UserError) as error:
        require_divisible(arch, OfSizes(fsdp=4), together)
    assert str(error.value) == (
        "mesh {fsdp: 4}: the model has 18 groups of 32 hidden features, which fsdp 4 does not "
        "divide; meshes of 4 devices that work: {data: 2, fsdp: 2}, {data: 4}"
    )
    for sizes in meshes_of(arch, 12, together):
        require_divisible(arch, OfSizes(**sizes), together)
    with pytest.raises(UserError, match="has 3 groups of 32 feed-forward features, which model 2"):
        require_divisible(
            arch_of(intermediate_size=96, vocab_size=64, head_dim=16), OfSizes(model=2), together
        )


def test_a_mesh_must_divide_the_rows_of_each_pass():
    require_rows(7, None)
    require_rows(12, OfSizes(data=2, fsdp=3, model=5))
    message = "batch_size 12: must be a multiple of 8, .* compute.mesh; use 16"
    with pytest.raises(UserError, match=message):
        require_rows(12, OfSizes(data=4, fsdp=2))


def test_the_sizes_of_a_mesh_are_checked():
    assert axis_size(make_mesh({"data": -1}), ROWS) == 1
    assert axis_size(None, ROWS) == 1
    for sizes, message in (
        ({"data": 2}, r"mesh \{data: 2\}: needs 2 devices, but there are 1; .*device_count=2"),
        ({"data": -1, "model": 3}, r"number of devices \(1\) is not a multiple of 3"),
        ({"data": -1, "fsdp": -1}, "only one size can be -1"),
        ({"model": 0}, "must be a whole number, 1 or more, or -1"),
        ({"model": True}, "must be a whole number, 1 or more, or -1"),
        ({"tensor": 2}, r"there is no axis 'tensor' \(axes: data, fsdp, model\)"),
    ):
        with pytest.raises(UserError, match=message):
            make_mesh(sizes)


def test_the_option_for_a_mesh_is_parsed():
    assert mesh_sizes("data=4,model=2") == {"data": 4, "model": 2}
    assert mesh_sizes("fsdp=-1") == {"fsdp": -1}
    for text in ("", "data", "data=", "data=0", "data=-2", "tensor=2", "data=2,data=2", "data=2,"):
        with pytest.raises(ArgumentTypeError, match="must be sizes by axis, such as data=4,model"):
            mesh_sizes(text)


def test_a_mesh_is_rejected_before_weights_are_read(experiment_file: Path, monkeypatch, capsys):
    monkeypatch.setattr("softprompt.backbones.loading.load_weights", None)
    with pytest.raises(UserError, match=r"mesh \{data: 2\}: needs 2 devices, but there are 1"):
        Preparation().prepare(load_experiment(experiment_file, ["compute.mesh.data=2"]))
    assert main(["predict", "run", "text", "--mesh", "model=2"]) == 1
    assert capsys.readouterr().err.startswith("mesh {model: 2}: needs 2 devices, but there are 1")


def test_a_mesh_of_one_device_computes_the_same(tiny, tmp_path: Path):
    SoftPrompt.from_text(tiny, "ab").save(tmp_path / "prompt", tiny)
    mesh = make_mesh({"data": 1})
    prompt = load_prompt(tmp_path / "prompt", mesh=mesh)
    assert prompt.base.backbone.mesh is mesh
    assert prompt.base.fingerprint == tiny.fingerprint
    plain = load_prompt(tmp_path / "prompt", tiny)
    assert prompt.generate(["cd"], max_new_tokens=4) == plain.generate(["cd"], max_new_tokens=4)
    with pytest.raises(UserError, match="loaded already; give the mesh to load_base"):
        load_prompt(tmp_path / "prompt", tiny, mesh=mesh)
    with pytest.raises(UserError, match="attention cudnn: it cannot be divided over a mesh"):
        load_base(str(GOLDEN / "llama-grouped"), attention="cudnn", mesh=mesh)


def test_what_runs_on_eight_devices_is_what_runs_on_one():
    """The tests of `mesh_checks`, in a process with eight virtual devices."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    file = Path(__file__).parent / "mesh_checks.py"
    command = [sys.executable, "-m", "pytest", "--numprocesses=0", "--exitfirst", str(file)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout
