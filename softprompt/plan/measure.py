"""What a compiled training step needs on each device: memory, traffic and time."""

import dataclasses
import re

import jax
from jax.sharding import Mesh

from softprompt.parallel.hosts import bytes_on_device
from softprompt.plan.collectives import bytes_moved
from softprompt.plan.devices import compiler_options, without_stderr
from softprompt.plan.hardware import GIBIBYTE, Hardware
from softprompt.plan.program import StepProgram

# What the compilers for TPUs and for NVIDIA GPUs say in place of a program that needs too much.
_EXHAUSTED = re.compile(r"(?:Used |HLO temporaries \()([\d.]+)([KMGT]?)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GIBIBYTE, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      base: the frozen base model, and the teacher's base model if it is another one.
      trainable: the trained arrays.
      optimizer: the state of the optimizer.
      batch: the rows of a step.
      temporaries: activations, gathered weights and all else that lives only during a step; None
        if the compiler gave up because the memory of the device is too small.
      padding: what the compiler adds to arguments for their layout, and the code of the program,
        without arguments that it leaves out. It can be negative.
      total: the sum of these.
    """

    base: int
    trainable: int
    optimizer: int
    batch: int
    temporaries: int | None
    padding: int | None
    total: int

    @property
    def arguments(self) -> int:
        """The bytes that are kept between steps, and the batch."""
        return self.base + self.trainable + self.optimizer + self.batch


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Lower bounds on the time of a step in seconds.

    Attributes:
      compute: all operations at the peak of all chips.
      memory: reading arguments and temporaries once.
      links: sending what the collectives send, over all links at once.
      total: the largest of the three.
      limit: its name.
    """

    compute: float
    memory: float
    links: float
    total: float
    limit: str


@dataclasses.dataclass(frozen=True)
class MeshPlan:
    """What a step needs on one mesh.

    Attributes:
      mesh: the sizes of its axes that are not 1.
      devices: the number of devices.
      memory: on each device.
      fits: whether the memory is enough.
      moved: bytes that each device sends in a step, by kind of collective; None if the compiler
        gave up.
      time: lower bounds on the time of a step; None if the hardware has no figures, or the
        compiler gave up.
    """

    mesh: dict[str, int]
    devices: int
    memory: Memory
    fits: bool
    moved: dict[str, int] | None
    time: StepTime | None


def measure(program: StepProgram, mesh: Mesh, hardware: Hardware, flops: int) -> MeshPlan:
    """Compile a step for a mesh of devices, which need not be here, and measure it.

    Args:
      program: the arguments of the step, with shardings on the mesh.
      mesh: the mesh.
      hardware: the devices of the mesh.
      flops: the operations of a step.
    """
    sizes = {axis: size for axis, size in mesh.shape.items() if size > 1}
    kept = {
        "base": bytes_on_device(program.frozen),
        "trainable": bytes_on_device(program.trainable),
        "optimizer": bytes_on_device(program.opt_state),
        "batch": bytes_on_device(program.batch),
    }
    lowered = program.trace().lower()
    try:
        with without_stderr():
            compiled = lowered.compile(compiler_options(mesh))
    except jax.errors.JaxRuntimeError as error:
        needed = _EXHAUSTED.search(str(error))
        if needed is None:
            raise
        total = int(float(needed[1]) * _UNITS[needed[2]])
        memory = Memory(**kept, temporaries=None, padding=None, total=total)
        return MeshPlan(sizes, mesh.size, memory, False, None, None)
    statistics = compiled.memory_analysis()
    temporaries = statistics.temp_size_in_bytes
    total = (
        statistics.argument_size_in_bytes
        + statistics.output_size_in_bytes
        - statistics.alias_size_in_bytes
        + statistics.generated_code_size_in_bytes
        + temporaries
    )
    padding = total - temporaries - sum(kept.values())
    memory = Memory(**kept, temporaries=temporaries, padding=padding, total=total)
    moved = bytes_moved(compiled.as_text(), mesh.size)
    time = _step_time(memory, sum(moved.values()), mesh.size, hardware, flops)
    return MeshPlan(sizes, mesh.size, memory, total <= hardware.usable, moved, time)


def _step_time(
    memory: Memory, moved: int, devices: int, hardware: Hardware, flops: int
) -> StepTime | None:
    if not (hardware.flops and hardware.memory_bandwidth and hardware.link_bandwidth):
        return None
    bounds = {
        "compute": flops / (devices * hardware.flops),
        "memory": memory.total / hardware.memory_bandwidth,
        "links": moved / hardware.link_bandwidth,
    }
    limit = max(bounds, key=lambda name: bounds[name])
    return StepTime(**bounds, total=bounds[limit], limit=limit)
