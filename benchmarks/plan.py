"""Plans: the table of `docs/scale.md`, and the memory of a plan compared with a run on this CPU.

python benchmarks/plan.py table      about 10 minutes; needs softprompt[plan-tpu,plan-cuda]
python benchmarks/plan.py memory     a minute; needs the default base model
"""

import json
import subprocess
import sys
from pathlib import Path

EXPERIMENT = Path(__file__).parent.parent / "experiments" / "sentiment.yaml"
MODELS = ("llama-3.2-1b", "llama-3.1-8b", "llama-3.1-70b")
HARDWARE = {  # the numbers of chips to try for each model, the first that fits is shown
    "v5e": ((1, 4), (4, 8), (16, 32)),
    "v5p": ((1,), (1, 4), (4, 8)),
    "v6e": ((1,), (1, 4), (8, 16)),
    "h100": ((1,), (1, 2), (4, 8)),
}
STEP = ("compute.dtype=bfloat16", "prompt.length=100", "training.batch_size=16", "--tokens", "256")


def plan(model: str, hardware: str) -> dict:
    """Run `softprompt plan` in a process of its own."""
    words = ["plan", EXPERIMENT, f"base={model}", *STEP, "--hardware", hardware, "--json"]
    command = [sys.executable, "-m", "softprompt", *map(str, words)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_table() -> None:
    """Print a Markdown table: for each model and hardware, the first number of chips that fits."""
    print(
        "| model | hardware | mesh | memory on each device | usable | step, no less than | limit |"
    )
    print("|---|---|---|---:|---:|---:|---|")
    for number, model in enumerate(MODELS):
        for hardware, chips in HARDWARE.items():
            for count in chips[number]:
                made = plan(model, f"{hardware}-{count}")
                planned = made["smallest"] or made["planned"]
                if planned["fits"]:
                    break
            mesh = ", ".join(f"{axis} {size}" for axis, size in planned["mesh"].items())
            time = planned["time"]
            cells = [
                model,
                f"{hardware}-{planned['devices']}",
                mesh or "one device",
                f"{planned['memory']['total'] / 2**30:.1f} GiB",
                f"{made['usable'] / 2**30:.1f} GiB",
                f"{time['total'] * 1e3:.0f} ms",
                time["limit"],
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


def print_memory() -> None:
    """Compare the plan of a step with the same step of a run: what it compiles and what it uses."""
    import jax

    from softprompt.backbones.loading import load_base
    from softprompt.data.layout import Layout, PackedShape
    from softprompt.experiment.reading import load_experiment
    from softprompt.methods.soft_prompt import SoftPrompt
    from softprompt.plan.plan import make_plan
    from softprompt.training.state import TrainState
    from softprompt.training.step import train_step

    experiment = load_experiment(EXPERIMENT, ["prompt.length=100"])
    rows, tokens, targets = 16, 256, 8
    planned = make_plan(experiment, "cpu-1", tokens, targets).planned.memory

    base = load_base(experiment.base)
    method = SoftPrompt.build(experiment, base, [~i for i in range(100)])
    state = TrainState(experiment, method, base.backbone)
    shape = PackedShape(1, rows, rows * tokens, rows * targets, tokens, targets)
    batch = Layout(separate_targets=False, branching=False).lay_out([], shape)
    run = train_step.lower(*state.arrays, batch, state.key, **state.program).compile()
    compiled = run.memory_analysis()
    results = run(*state.arrays, batch, state.key)  # the first run also loads code
    jax.block_until_ready(results)
    growth = []
    for _ in range(5):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        before = _status("VmRSS")
        results = run(*results[:2], state.frozen, batch, state.key)
        jax.block_until_ready(results)
        growth.append(_status("VmHWM") - before)
    held = sum(x.nbytes for x in jax.tree.leaves(state.frozen) if hasattr(x, "nbytes"))
    print(f"base: plan {planned.base / 2**20:.0f} MiB, loaded {held / 2**20:.0f} MiB")
    print(
        f"temporaries: plan {planned.temporaries / 2**20:.0f} MiB, "
        f"run compiled {compiled.temp_size_in_bytes / 2**20:.0f} MiB, "
        f"growth of the process {sorted(growth)[len(growth) // 2] / 2**20:.0f} MiB"
    )


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (value,) = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(value) * 1024


if __name__ == "__main__":
    {"table": print_table, "memory": print_memory}[sys.argv[1]]()
