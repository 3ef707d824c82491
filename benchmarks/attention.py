"""Compile a training step for hardware that need not be here, and compare forms of attention.

The step trains a prompt of 100 virtual tokens on a model in the shapes of Llama-3.2-1B, in
bfloat16. For each form, the script prints the compiler's temporaries, and the bytes that the step
moves to and from memory by the compiler's own count. The compiler counts the body of a loop once.
The bytes are therefore counted in programs of 1 and 2 layers without loops, and extrapolated.

    python benchmarks/attention.py [--hardware v5e]     needs softprompt[plan-tpu,plan-cuda]
"""

import argparse
import dataclasses
import functools
from pathlib import Path

EXPERIMENT = Path(__file__).parent.parent / "experiments" / "sentiment.yaml"
BASE, LAYERS, VIRTUAL, TARGETS = "llama-3.2-1b", 16, 100, 8
BATCHES = ((16, 256), (4, 2048))  # rows, and tokens of each row without the prompt
KERNELS = {"tpu": "pallas", "cuda": "cudnn"}


def step_of(attention: str, in_rows: bool, rows: int, tokens: int, layers: int, mesh):
    """Return the step as shapes, with only the first layers of the model."""
    from softprompt.backbones.config import architecture_of
    from softprompt.experiment.reading import load_experiment
    from softprompt.plan.models import read_config
    from softprompt.plan.program import BatchShape, step_program

    settings = [
        f"base={BASE}",
        "compute.dtype=bfloat16",
        f"compute.attention={attention}",
        f"prompt.length={VIRTUAL}",
        *(["template.input={text} {prompt}"] if in_rows else []),
    ]
    config = read_config(BASE)
    arch = architecture_of(config, ())
    arch = dataclasses.replace(arch, layers=arch.layers[:layers])
    batch = BatchShape(rows, tokens + (VIRTUAL if in_rows else 0), TARGETS)
    return step_program(load_experiment(EXPERIMENT, settings), config, [arch], batch, mesh)


def compiled(program, mesh):
    """Compile a step."""
    from softprompt.plan.devices import compiler_options, without_stderr

    with without_stderr():
        return program.trace().lower().compile(compiler_options(mesh))


def bytes_moved(step, mesh) -> float | None:
    """Return the bytes that a step with all layers moves; None if the compiler has no count."""
    import jax

    scan, counts = jax.lax.scan, []
    jax.lax.scan = functools.partial(scan, unroll=True)
    try:
        for layers in (1, 2):
            jax.clear_caches()
            costs = compiled(step(layers=layers), mesh).cost_analysis()
            if not costs:
                return None
            counts.append(costs["bytes accessed"])
    finally:
        jax.lax.scan = scan
        jax.clear_caches()
    return counts[0] + (LAYERS - 1) * (counts[1] - counts[0])


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--hardware", default="v5e", help="v5e, v5p, v6e, h100 or a100")
    hardware = parser.parse_args().hardware

    from softprompt.parallel.mesh import make_mesh
    from softprompt.plan.devices import absent_devices, start_jax
    from softprompt.plan.hardware import parse_hardware

    start_jax(1)
    kind, _ = parse_hardware(f"{hardware}-1")
    mesh = make_mesh({}, absent_devices(kind, 1))
    kernel = KERNELS[kind.platform]
    forms = [(name, in_rows) for in_rows in (True, False) for name in ("xla", kernel)]
    print("| rows, tokens | prompt | attention | temporaries | moved |")
    print("|---|---|---|---:|---:|")
    for rows, tokens in BATCHES:
        for attention, in_rows in forms:
            step = functools.partial(step_of, attention, in_rows, rows, tokens, mesh=mesh)
            temporaries = compiled(step(layers=LAYERS), mesh).memory_analysis().temp_size_in_bytes
            moved = bytes_moved(step, mesh)
            cells = [
                f"{rows} of {tokens:,}",
                "in every row" if in_rows else "shared prefix",
                attention,
                f"{temporaries / 2**30:.2f} GiB",
                "not counted" if moved is None else f"{moved / 1e9:.1f} GB",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
