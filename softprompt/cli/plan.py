"""`softprompt plan`: say what training needs on hardware that need not be here."""

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from softprompt.cli.arguments import add_command, add_experiment, positive_integer

if TYPE_CHECKING:
    from softprompt.plan.measure import MeshPlan
    from softprompt.plan.plan import Plan


def add_to(subparsers: Any) -> None:
    """Declare the command and its arguments."""
    command = add_command(
        subparsers,
        "plan",
        run,
        "say what training needs on hardware, before you have it",
        """\
Compiles the training step of the experiment for the hardware, and prints the memory on each
device, the operations, the traffic between devices, a lower bound on the time of a step, and
whether it fits. Only the config.json of the base model is read. The base can also be a public
model such as llama-3.1-70b. The mesh is compute.mesh of the experiment. Without one, all chips
are used. The compilers for TPUs and NVIDIA GPUs are extras: softprompt[plan-tpu] and
softprompt[plan-cuda].

examples:
  softprompt plan experiments/sentiment.yaml --hardware v5e-8
  softprompt plan experiments/sentiment.yaml base=llama-3.1-70b compute.dtype=bfloat16 \\
    --hardware v5p-64
  softprompt plan experiments/sentiment.yaml "compute.mesh={model: 4}" --hardware h100-8 --json""",
    )
    add_experiment(command)
    command.add_argument(
        "--hardware",
        required=True,
        metavar="NAME-N",
        help="the hardware and its number of chips: v5e-8, v5p-64, v6e-8, h100-8, a100-8 or cpu-8",
    )
    command.add_argument(
        "--tokens",
        type=positive_integer,
        metavar="N",
        help="number of tokens per row (default: template.max_tokens, or 256)",
    )
    command.add_argument(
        "--targets",
        type=positive_integer,
        metavar="N",
        help="number of target tokens per row (default: 8 with a verbalizer, all "
        "tokens for plain text and conversations, and otherwise generation.max_new_tokens)",
    )
    command.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> None:
    """Make the plan, and print it."""
    from softprompt.experiment.reading import load_experiment
    from softprompt.plan.plan import make_plan

    experiment = load_experiment(options.experiment, options.words)
    plan = make_plan(experiment, options.hardware, options.tokens, options.targets)
    if options.json:
        print(json.dumps(dataclasses.asdict(plan)))
        return
    for line in _lines(plan):
        print(line)


def _lines(plan: "Plan") -> list[str]:
    planned, rows = plan.planned, plan.rows
    usable = f"{plan.hardware}, {_size(plan.usable)} usable on each device"
    if plan.compiler == "cpu" and not plan.hardware.startswith("cpu"):
        usable += " (memory estimated for virtual CPU devices)"
    lines = [
        f"{plan.experiment}: method {plan.method} on {plan.base}, {plan.dtype}",
        _line("hardware", usable),
        _line("mesh", _mesh(planned)),
        _line(
            "step", f"{rows.rows} rows of {rows.tokens} tokens, with {rows.targets} targets in each"
        ),
        _line("parameters", f"{plan.parameters:,} ({plan.trained_parameters:,} trained)"),
        _line("operations", f"{plan.flops / 1e12:,.3g} TFLOP per step"),
        "",
        "memory on each device",
    ]
    for field in dataclasses.fields(planned.memory):
        size = getattr(planned.memory, field.name)
        if field.name != "total" and size is not None:
            lines.append(_line(field.name, f"{_size(size):>12}"))
    if planned.memory.temporaries is None:  # the compiler gave up and says only the total
        rest = planned.memory.total - planned.memory.arguments
        lines.append(_line("temporaries, padding", f"{_size(rest):>12}"))
    fits = "fits" if planned.fits else "does not fit"
    lines.append(_line("total", f"{_size(planned.memory.total):>12}  {fits}"))
    if planned.moved:
        lines += ["", "sent by each device in a step"]
        lines += [_line(name, f"{size / 1e9:>12.4g} GB") for name, size in planned.moved.items()]
    if time := planned.time:
        lines += ["", "step time: no less than"]
        for name in ("compute", "memory", "links"):
            limit = "  the limit" if name == time.limit else ""
            lines.append(_line(name, f"{getattr(time, name) * 1e3:>12.3g} ms{limit}"))
    if not planned.fits:
        lines += ["", _found(plan)]
        lines += [
            _line("tried", f"{_mesh(tried)}: {_size(tried.memory.total)}") for tried in plan.tried
        ]
    return [*lines, *(f"note: {note}" for note in plan.notes)]


def _found(plan: "Plan") -> str:
    if plan.smallest is None:
        return "no mesh that fits was found"
    return f"smallest mesh that fits: {_mesh(plan.smallest)}"


def _line(name: str, text: str) -> str:
    return f"  {name:<20}{text}"


def _mesh(plan: "MeshPlan") -> str:
    sizes = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    return f"{sizes} ({plan.devices} devices)" if sizes else "1 device"


def _size(count: int) -> str:
    """Format a number of bytes."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if abs(count) >= unit / 10:
            return f"{count / unit:,.2f} {name}"
    return f"{count} B"
