"""The plan of a training run: what its step needs on hardware that need not be here."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from softprompt.backbones.quantization import inputs_together, parameter_count
from softprompt.errors import UserError
from softprompt.experiment.schema import Experiment
from softprompt.parallel.hosts import bytes_on_device
from softprompt.parallel.mesh import make_mesh
from softprompt.parallel.sharding import Together, require_divisible, require_rows
from softprompt.plan.devices import (
    absent_devices,
    missing_compiler,
    start_jax,
    virtual_cpu_devices,
)
from softprompt.plan.flops import count_flops
from softprompt.plan.hardware import Hardware, parse_hardware
from softprompt.plan.measure import MeshPlan, measure
from softprompt.plan.models import read_models, teacher_bases
from softprompt.plan.program import BatchShape, StepProgram, step_program
from softprompt.plan.search import Sizes, chosen_mesh, sizes_of, smallest_that_fits

_TOKENS = 256  # of a row, if nothing says how many
_LABEL_TARGETS = 8  # of a row whose target is the text of a label
_MOST_VIRTUAL = 64  # CPU devices that are started in place of absent ones


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of an experiment.

    Attributes:
      experiment, base, method, dtype: what is trained.
      hardware: such as `v5e-8`.
      compiler: `tpu` or `cuda`, or `cpu` if that is the hardware or the compiler is missing.
      usable: bytes of memory that a program can use on each device.
      rows: the shape of a batch.
      parameters, trained_parameters: numbers of parameters. The first includes a teacher with
        another base model.
      flops: operations of a step, on all devices together.
      planned: what the step needs on the mesh.
      smallest: the smallest mesh that fits, if `planned` does not and the search found one.
      tried: the meshes that the search compiled for.
      notes: what else a reader has to know.
    """

    experiment: str
    base: str
    method: str
    dtype: str
    hardware: str
    compiler: str
    usable: int
    rows: BatchShape
    parameters: int
    trained_parameters: int
    flops: int
    planned: MeshPlan
    smallest: MeshPlan | None
    tried: list[MeshPlan]
    notes: list[str]


def make_plan(
    experiment: Experiment, hardware: str, tokens: int | None = None, targets: int | None = None
) -> Plan:
    """Compile the training step of an experiment for hardware, and say what it needs.

    Neither weights nor a tokenizer nor data are read. Nothing runs on an accelerator.

    Args:
      experiment: what would be trained.
      hardware: the name and the number of chips, such as `v5e-8`.
      tokens: T, the tokens of a row; by default `template.max_tokens`, or 256.
      targets: M, the tokens of a row that carry loss; by default 8 with a verbalizer, and
        `generation.max_new_tokens` without.

    Raises:
      UserError: if the hardware or the base model is not known, or the mesh does not fit them.
    """
    kind, chips = parse_hardware(hardware)
    config, archs = read_models(experiment)
    sizes = sizes_of(experiment, archs, kind, chips)
    rows = _rows(experiment, archs[0], tokens, targets)
    missing = missing_compiler(kind)
    on_cpu = kind.platform == "cpu" or missing is not None
    start_jax(_virtual_devices(kind, chips, missing))
    whole = step_program(experiment, config, archs, rows, None)
    flops = count_flops(whole.trace())
    planner = _Planner(experiment, config, archs, kind, rows, on_cpu, flops)
    planned = planner.plan(sizes)
    smallest, tried = planner.search(planned)
    base, trained = (parameter_count(arrays) for arrays in (whole.frozen[1], whole.trainable))
    return Plan(
        experiment=experiment.name,
        base=experiment.base,
        method=experiment.method,
        dtype=experiment.compute.dtype,
        hardware=hardware,
        compiler="cpu" if on_cpu else kind.platform,
        usable=kind.usable,
        rows=rows,
        parameters=base + trained,
        trained_parameters=trained,
        flops=flops,
        planned=planned,
        smallest=smallest,
        tried=tried,
        notes=_notes(experiment, kind, planned, missing)
        + _assumptions(experiment, rows, tokens, targets),
    )


def _virtual_devices(hardware: Hardware, chips: int, missing: str | None) -> int:
    """Return the number of virtual CPU devices to start."""
    if missing:  # the search for a mesh that fits may need more than the chips
        return max(chips, _MOST_VIRTUAL)
    return chips if hardware.platform == "cpu" else 1


@dataclasses.dataclass(frozen=True)
class _Planner:
    """Plans the training step of an experiment for meshes of one kind of hardware.

    Attributes:
      experiment: what would be trained.
      config, archs: see `read_models`.
      hardware: the kind of hardware.
      rows: the shape of a batch.
      on_cpu: whether virtual CPU devices simulate the hardware.
      flops: the number of operations of a step.
    """

    experiment: Experiment
    config: Mapping[str, Any]
    archs: Sequence[Any]
    hardware: Hardware
    rows: BatchShape
    on_cpu: bool
    flops: int

    def plan(self, sizes: Sizes) -> MeshPlan:
        """Compile the step for a mesh, and measure it."""
        return measure(*self._program(sizes), self.hardware, self.flops)

    def search(self, planned: MeshPlan) -> tuple[MeshPlan | None, list[MeshPlan]]:
        """Return the smallest mesh that fits if `planned` does not, and all meshes tried."""
        if planned.fits or self.hardware.platform == "cpu":  # virtual devices share one memory
            return None, []
        batch_size = self.experiment.training.batch_size
        return smallest_that_fits(
            planned,
            _MOST_VIRTUAL if self.on_cpu else self.hardware.most_chips,
            lambda count: chosen_mesh(self.archs, batch_size, count, self._together),
            self._arguments,
            self.plan,
            self.hardware.usable,
        )

    @property
    def _together(self) -> Together:
        return inputs_together(self.experiment.compute.quantize)

    def _program(self, sizes: Sizes) -> tuple[StepProgram, Mesh]:
        count = math.prod(sizes.values())
        devices = (
            virtual_cpu_devices(count) if self.on_cpu else absent_devices(self.hardware, count)
        )
        mesh = make_mesh(sizes, devices)
        for arch in self.archs:
            require_divisible(arch, mesh, self._together)
        require_rows(self.experiment.training.batch_size, mesh)
        return step_program(self.experiment, self.config, self.archs, self.rows, mesh), mesh

    def _arguments(self, sizes: Sizes) -> int:
        """Return the bytes of the step's arguments on each device of a mesh."""
        step, _ = self._program(sizes)
        return bytes_on_device((step.frozen, step.trainable, step.opt_state, step.batch))


def _rows(experiment: Experiment, arch: Any, tokens: int | None, targets: int | None) -> BatchShape:
    """Return the shape of a batch.

    Raises:
      UserError: if the rows are longer than the context window of the model, or have too many
        targets.
    """
    setting = "tokens" if tokens else "template.max_tokens"
    tokens = tokens or experiment.template.max_tokens or min(_TOKENS, arch.context_length)
    if tokens > arch.context_length:
        raise UserError(
            f"{setting} {tokens}: the context window of {experiment.base} has "
            f"{arch.context_length} tokens"
        )
    if targets is not None and targets > tokens:
        raise UserError(f"{targets} targets do not fit in a row of {tokens} tokens")
    if experiment.verbalizer is not None:
        usual = _LABEL_TARGETS
    elif experiment.template.messages or experiment.template.text:
        usual = tokens  # at most
    else:
        answers = 2 if experiment.objective.name == "preference" else 1
        usual = answers * experiment.generation.max_new_tokens
    targets = targets or usual
    rows = experiment.training.batch_size * experiment.training.accumulate
    return BatchShape(rows, tokens, min(targets, tokens))


def _assumptions(
    experiment: Experiment, rows: BatchShape, tokens: int | None, targets: int | None
) -> list[str]:
    """Return a note about the sizes of a row that neither the user nor the experiment gives."""
    assumed = []
    if tokens is None and experiment.template.max_tokens is None:
        assumed.append(f"{rows.tokens} tokens")
    if targets is None:
        assumed.append(f"{rows.targets} targets")
    if not assumed:
        return []
    names = " and ".join(text.split()[1] for text in assumed)
    return [
        f"the data is not read, so each row is assumed to have {' and '.join(assumed)}; give "
        f"{names} to plan for other rows"
    ]


def _notes(
    experiment: Experiment, hardware: Hardware, planned: MeshPlan, missing: str | None
) -> list[str]:
    notes = []
    if missing:
        notes.append(
            f"{missing}. Until then, virtual CPU devices take its place: the memory is an "
            "estimate of the CPU's compiler, which is often far from that of the hardware"
        )
    if experiment.compute.mesh is None and planned.devices > 1:
        settings = " ".join(f"compute.mesh.{axis}={size}" for axis, size in planned.mesh.items())
        notes.append(
            "compute.mesh is not set, and training would use one device; to train as planned, "
            f"set {settings}"
        )
    teacher = experiment.objective.teacher
    for base in teacher_bases(experiment):
        notes.append(f"parameters, memory and operations include the teacher, {base}")
    if teacher and teacher.top_tokens is not None:
        notes.append("the teacher reads the data before training; the plan does not include this")
    elif teacher:
        notes.append(
            "the teacher's pass over the rows is counted; the keys and values of the text that it "
            "reads first are not, because its length is unknown"
        )
    if hardware.platform == "cuda" and planned.devices > 8:
        notes.append("the links between servers are slower than those within, which are counted")
    return notes
