import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from softprompt.backbones.config import architecture_of
from softprompt.backbones.loading import load_base
from softprompt.errors import UserError
from softprompt.experiment.reading import load_experiment
from softprompt.parallel.mesh import make_mesh
from softprompt.plan.flops import count_flops
from softprompt.plan.hardware import parse_hardware
from softprompt.plan.measure import measure
from softprompt.plan.models import read_config, read_models
from softprompt.plan.program import BatchShape, step_program
from softprompt.plan.public_models import PUBLIC_MODELS
from softprompt.plan.search import chosen_mesh, sizes_of

REPOSITORY = Path(__file__).parent.parent
SENTIMENT = REPOSITORY / "experiments" / "sentiment.yaml"

FOLDER = REPOSITORY / "tests" / "golden" / "llama-untied"

TINY = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


@pytest.fixture
def tiny(tmp_path):
    """Return a function that loads an experiment on a tiny model without weights."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))

    def experiment(*overrides, **config):
        (tmp_path / "config.json").write_text(json.dumps(TINY | config))
        return load_experiment(SENTIMENT, [f"base={tmp_path}", "training.batch_size=4", *overrides])

    return experiment


def program(experiment, tokens=16, targets=4, mesh=None):
    config, archs = read_models(experiment)
    rows = BatchShape(
        experiment.training.batch_size * experiment.training.accumulate, tokens, targets
    )
    return step_program(experiment, config, archs, rows, mesh)


# The numbers of parameters that the hub shows for these repositories.
@pytest.mark.parametrize(
    ("name", "count"),
    {
        "llama-3.2-1b": 1_235_814_400,
        "llama-3.2-3b": 3_212_749_824,
        "llama-3.1-8b": 8_030_261_248,
        "llama-3.1-70b": 70_553_706_496,
        "qwen3-8b": 8_190_735_360,
        "qwen3-30b-a3b": 30_532_122_624,
        "gemma-3-1b": 999_885_952,
    }.items(),
)
def test_public_models_have_the_published_number_of_parameters(name, count):
    step = program(load_experiment(SENTIMENT, [f"base={name}"]))
    assert sum(array.size for array in jax.tree.leaves(step.frozen[1])) == count


def test_public_models_can_be_read():
    for name in PUBLIC_MODELS:
        architecture_of(read_config(name), ())


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=prompt"],
        ["method=prompt", "prompt.reparametrization=mlp", "prompt.init=labels"],
        ["method=prompt", "template.input={text} {prompt}"],
        ["method=prompt", "prompt.reparametrization=multitask", "prompt.tasks=[a, b]"],
        ["method=prefix", "prefix.init=text", "prefix.init_text=A review"],
        ["method=dept"],
        ["method=lora", "lora.dropout=0.1"],
        ["method=full", "optimizer.name=adafactor"],
        ["compute.quantize=int8", "training.accumulate=2"],
        ["method=lora", "lora.targets=['*']", "compute.quantize=int4"],
    ],
    ids=" ".join,
)
def test_every_method_has_a_program(tiny, overrides):
    step = program(tiny(*overrides))
    traced = step.trace()
    assert count_flops(traced) > 0
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(traced.out_info[0])] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(step.trainable)
    ]


def test_the_pass_of_a_reference_or_a_teacher_is_counted(tiny):
    free_text = "verbalizer=null", "template.target='{chosen}'"
    plain, *others = (
        program(tiny(*free_text, *objective))
        for objective in (
            (),
            ("objective=preference",),
            ("objective={name: distill, teacher: {shots: 2}}",),
        )
    )
    flops = count_flops(plain.trace())
    for step in others:
        assert count_flops(step.trace()) > 1.2 * flops
        stored, expected = (
            sum(array.size for array in jax.tree.leaves(each.frozen[1])) for each in (step, plain)
        )
        assert stored == expected


def test_a_teacher_that_reads_the_data_before_training_is_not_counted(tiny):
    teacher = "objective={{name: distill, teacher: {{shots: 2{}}}}}"
    free_text = "verbalizer=null", "template.target='{label}'"
    plain, reading, before = (
        count_flops(program(tiny(*free_text, *objective)).trace())
        for objective in ((), (teacher.format(""),), (teacher.format(", top_tokens: 4"),))
    )
    assert before == plain
    assert reading > 1.2 * plain


def test_a_teacher_with_another_base_model_is_counted(tiny, tmp_path):
    larger = TINY | {"num_hidden_layers": 10}
    (tmp_path / "larger").mkdir()
    (tmp_path / "larger" / "config.json").write_text(json.dumps(larger))
    plain, same, other = (
        program(tiny("verbalizer=null", "template.target='{label}'", *objective))
        for objective in (
            (),
            ("objective={name: distill, teacher: {shots: 2}}",),
            (f"objective={{name: distill, teacher: {{base: {tmp_path / 'larger'}}}}}",),
        )
    )
    base, shared, both = (
        sum(array.size for array in jax.tree.leaves(step.frozen[1]))
        for step in (plain, same, other)
    )
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
    assert shared == base
    assert both == 2 * base + 5 * layer
    steps = [count_flops(step.trace()) for step in (plain, same, other)]
    of_layers = forward_flops(4 * 16, 16)
    assert steps[2] - steps[1] == pytest.approx(of_layers, rel=0.5)


def test_method_none_has_no_step_to_plan(tiny):
    with pytest.raises(UserError, match="method none trains nothing"):
        program(tiny("method=none"))


def test_the_program_has_the_shapes_of_a_loaded_model():
    for settings in ({"dtype": "bfloat16"}, {"quantize": "int8"}, {"quantize": "int4"}):
        overrides = [f"base={FOLDER}"]
        overrides += [f"compute.{key}={value}" for key, value in settings.items()]
        step = program(load_experiment(SENTIMENT, overrides))
        state = nnx.state(load_base(str(FOLDER), **settings).backbone)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), nnx.as_pure(state)) == jax.tree.map(
            lambda x: (x.shape, x.dtype), nnx.as_pure(step.frozen[1])[1]
        )


def forward_flops(tokens, keys, layers=5):
    """Count by hand what `tokens` cost in the layers, if each attends to `keys` tokens."""
    hidden, inner, kv = 32, 64, 16
    matrices = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner
    return layers * (2 * tokens * matrices + 4 * tokens * keys * hidden)


def test_the_operations_of_a_forward_pass_are_those_of_the_formula(tiny):
    step = program(tiny("prompt.length=8"))
    backbone = nnx.merge(*nnx.split(nnx.eval_shape(lambda: step_backbone(step))))

    def forward(backbone, embeddings):
        return backbone.prefill(embeddings)

    traced = jax.jit(forward).trace(backbone, jax.ShapeDtypeStruct((24, 32), jnp.float32))
    # In the last layer only the keys and values are needed; the scan computes all of it.
    assert count_flops(traced) == forward_flops(24, 24)


def step_backbone(step):
    return nnx.merge(step.static["graphdef"], step.trainable, *step.frozen)[1]


def test_what_the_backward_pass_computes_again_counts_again():
    def layer(x, weights):
        first, second = weights
        return jnp.tanh(x @ first) @ second, None

    def loss(x, weights, layer, unroll):
        y, _ = jax.lax.scan(layer, x, weights, unroll=unroll)
        return jnp.sum(y**2)

    gradient = jax.jit(jax.grad(loss), static_argnums=(2, 3))
    shapes = (
        jax.ShapeDtypeStruct((64, 128), jnp.float32),
        [
            jax.ShapeDtypeStruct((4, 128, 256), jnp.float32),
            jax.ShapeDtypeStruct((4, 256, 128), jnp.float32),
        ],
    )
    product = 2 * 64 * 128 * 256
    assert count_flops(gradient.trace(*shapes, layer, 1)) == 4 * (2 + 2) * product
    assert count_flops(gradient.trace(*shapes, jax.checkpoint(layer), 1)) == 4 * (3 + 2) * product
    unrolled = gradient.lower(*shapes, layer, True).compile().cost_analysis()["flops"]
    assert unrolled == pytest.approx(4 * (2 + 2) * product, rel=0.02)


def test_operations_agree_with_xla_on_a_model_with_one_layer(tiny):
    sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 1024}
    step = program(tiny(num_hidden_layers=1, **sizes), tokens=96)
    traced = step.trace()
    counted = traced.lower().compile().cost_analysis()["flops"]
    # XLA merges what a single layer would compute again.
    assert counted == pytest.approx(count_flops(traced), rel=0.05)


def test_grouped_products_count_each_row_once():
    def loss(rows, matrices, sizes):
        return jnp.sum(jax.lax.ragged_dot(rows, matrices, sizes) ** 2)

    arguments = (
        jax.ShapeDtypeStruct((64, 16), jnp.float32),
        jax.ShapeDtypeStruct((8, 16, 32), jnp.float32),
        jax.ShapeDtypeStruct((8,), jnp.int32),
    )
    once = 2 * 64 * 16 * 32
    assert count_flops(jax.jit(loss).trace(*arguments)) == once
    both = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*arguments)
    assert count_flops(both) == 3 * once


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v9-8", "not known.*v5e, v5p, v6e, h100, a100, cpu"),
        ("v5e", "such as v5e-8"),
        ("v5e-6", "power of two"),
        ("v5e-512", "from 1 to 256"),
        ("h100-12", "at most 8, or a multiple of 8"),
        ("h100-0", "from 1"),
    ],
)
def test_unknown_hardware_is_one_line(text, message):
    with pytest.raises(UserError, match=message):
        parse_hardware(text)


def sizes(experiment, hardware):
    _, archs = read_models(experiment)
    return sizes_of(experiment, archs, *parse_hardware(hardware))


def test_the_mesh_is_that_of_the_experiment_or_uses_all_chips(tiny):
    assert sizes(tiny(), "v5e-4") == {"fsdp": 4}
    assert sizes(tiny(), "v5e-8") == {"fsdp": 4, "model": 2}
    assert sizes(tiny(), "v5e-16") == {"fsdp": 4, "model": 2}  # 2 key-value heads, 4 rows
    assert sizes(tiny("compute.mesh={data: 2, model: -1}"), "v5e-4")["model"] == 2
    with pytest.raises(UserError, match=r"mesh \{data: 8\}: needs 8 chips, but v5e-4 has 4"):
        sizes(tiny("compute.mesh={data: 8}"), "v5e-4")
    with pytest.raises(UserError, match="power of two"):
        sizes(tiny("compute.mesh={data: 3}"), "v5e-4")


def test_a_mesh_is_chosen_that_divides_the_model():
    arch = architecture_of(PUBLIC_MODELS["llama-3.1-70b"], ())
    assert chosen_mesh([arch], 16, 8) == {"fsdp": 8}
    assert chosen_mesh([arch], 16, 64) == {"fsdp": 16, "model": 4}
    assert chosen_mesh([arch], 1, 16) is None
    tiny = architecture_of(TINY, ())  # 4 heads, 2 key-value heads, 32 hidden features
    assert chosen_mesh([arch], 1, 4) == {"model": 4}
    assert chosen_mesh([arch, tiny], 2, 4) == {"fsdp": 2, "model": 2}
    assert chosen_mesh([arch, tiny], 1, 4) is None


def test_the_memory_of_the_arguments_is_that_of_the_compiler(tiny):
    hardware, _ = parse_hardware("cpu-1")
    experiment = tiny("method=lora")
    mesh = make_mesh({})
    step = program(experiment, mesh=mesh)
    plan = measure(step, mesh, hardware, count_flops(step.trace()))
    trained = sum(
        x.nbytes if hasattr(x, "nbytes") else x.size * 4 for x in jax.tree.leaves(step.trainable)
    )
    assert plan.memory.trainable == trained
    assert plan.memory.optimizer > 2 * trained
    assert 0 <= plan.memory.padding < 10_000  # the measurements, and the alignment of arguments
    assert plan.moved == {}


ON_EIGHT = """
import dataclasses, json, sys
from pathlib import Path
from softprompt.experiment.reading import load_experiment
from softprompt.plan.plan import make_plan
from softprompt.plan import devices
devices._PACKAGES["tpu"] = "no-such-package"
plans = []
for hardware, *words in json.loads(sys.argv[2]):
    sizes = (32, 4) if hardware == "cpu-8" else ()
    plan = make_plan(load_experiment(Path(sys.argv[1]), words), hardware, *sizes)
    plans.append(dataclasses.asdict(plan))
print(json.dumps(plans))
"""


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """Make several plans in one process with virtual devices."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(TINY))
    common = [f"base={folder}", "training.batch_size=8"]
    cases = {
        "one": ["cpu-8", "compute.mesh={data: 1}"],
        "fsdp": ["cpu-8"],
        "data": ["cpu-8", "compute.mesh={data: 4}"],
        "missing": ["v5e-8"],
    }
    words = json.dumps([[*case, *common] for case in cases.values()])
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(REPOSITORY),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
    }
    done = subprocess.run(
        [sys.executable, "-c", ON_EIGHT, str(SENTIMENT), words],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(zip(cases, json.loads(done.stdout), strict=True))


def test_each_device_holds_its_part_of_the_base_model(plans):
    one, divided = (plans[name]["planned"]["memory"] for name in ("one", "fsdp"))
    assert plans["fsdp"]["planned"]["mesh"] == {"fsdp": 8}
    whole = {"norms": 4 * 32 * (2 * 5 + 1), "opening": 4 * 20}  # not divided
    assert divided["base"] - sum(whole.values()) == (one["base"] - sum(whole.values())) / 8
    assert divided["total"] < one["total"]


def test_the_axis_data_moves_only_the_gradient_of_the_prompt(plans):
    (name, sent), *others = plans["data"]["planned"]["moved"].items()
    gradient = 4 * 20 * 32
    assert (name, others) == ("all-reduce", [])
    assert 2 * gradient * 3 / 4 <= sent < 2 * (gradient + 100) * 3 / 4


def test_the_axis_fsdp_gathers_the_layers_for_every_pass(plans):
    sent = plans["fsdp"]["planned"]["moved"]["all-gather"]
    layers = 4 * 5 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    # Forward and backward. The last layer is not in a loop, and gathered once for both.
    gathered = (2 - 1 / 4) * layers
    assert gathered * 7 / 8 <= sent < 1.3 * gathered * 7 / 8


def test_a_missing_compiler_is_named_and_virtual_devices_take_its_place(plans):
    plan = plans["missing"]
    assert plan["compiler"] == "cpu"
    assert "pip install 'softprompt[plan-tpu]'" in plan["notes"][0]
    assert plan["planned"]["time"]["limit"] in ("compute", "memory", "links")


def test_assumed_numbers_of_tokens_and_targets_are_named(plans):
    assert plans["missing"]["notes"][-1] == (
        "the data is not read, so each row is assumed to have 128 tokens and 8 targets; give "
        "tokens and targets to plan for other rows"
    )
    assert not any("assumed" in note for note in plans["one"]["notes"])
