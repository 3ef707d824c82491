"""Which mesh to plan for: the experiment's, one that uses all chips, or the smallest that fits."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from softprompt.backbones.quantization import inputs_together
from softprompt.errors import UserError
from softprompt.experiment.schema import Experiment
from softprompt.parallel.mesh import mesh_name
from softprompt.parallel.sharding import Together, meshes_of, one_input
from softprompt.plan.hardware import Hardware, wrong_count
from softprompt.plan.measure import MeshPlan

Sizes = Mapping[str, int]

_MOST_COMPILED = 4  # meshes that a search compiles for; each takes up to a minute


def sizes_of(experiment: Experiment, archs: Sequence[Any], hardware: Hardware, chips: int) -> Sizes:
    """Return the sizes of the mesh to plan for.

    Args:
      experiment: if it has no `compute.mesh`, the mesh is `chosen_mesh` for all chips, or for as
        many as the rows of its batches can use.
      archs: the architectures of the base models.
      hardware, chips: the kind and the number of chips.

    Raises:
      UserError: if the mesh needs more chips, or a number of chips that is not offered.
    """
    if experiment.compute.mesh is None:
        rows, count = experiment.training.batch_size, chips
        together = inputs_together(experiment.compute.quantize)
        while (sizes := chosen_mesh(archs, rows, count, together)) is None or wrong_count(
            hardware, count
        ):
            count -= 1
        return sizes
    sizes = dict(experiment.compute.mesh)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    count = max(fixed, chips // fixed * fixed) if -1 in sizes.values() else fixed
    if count > chips:
        raise UserError(
            f"compute.mesh {mesh_name(sizes)}: needs {count} chips, but "
            f"{hardware.name}-{chips} has {chips}"
        )
    if problem := wrong_count(hardware, count):
        raise UserError(f"compute.mesh {mesh_name(sizes)}: needs {count} chips; {problem}")
    return {axis: count // fixed if size == -1 else size for axis, size in sizes.items()}


def chosen_mesh(
    archs: Sequence[Any], rows: int, devices: int, together: Together = one_input
) -> Sizes | None:
    """Return the mesh of a number of devices with the largest `fsdp`; None if there is none.

    Args:
      archs: the architectures of all models. The mesh must divide each of them.
      together: see `require_divisible`.
      rows: the rows of a batch, which `data` and `fsdp` must divide.
      devices: the number of devices.
    """
    first, *others = (list(meshes_of(arch, devices, together)) for arch in archs)
    fitting = [
        sizes
        for sizes in first
        if rows % (sizes["data"] * sizes["fsdp"]) == 0 and all(sizes in each for each in others)
    ]
    if not fitting:
        return None
    largest = max(fitting, key=lambda sizes: (sizes["fsdp"], sizes["data"]))
    return {axis: size for axis, size in largest.items() if size > 1}


def smallest_that_fits(
    planned: MeshPlan,
    most: int,
    mesh_of: Callable[[int], Sizes | None],
    arguments: Callable[[Sizes], int],
    plan: Callable[[Sizes], MeshPlan],
    usable: int,
) -> tuple[MeshPlan | None, list[MeshPlan]]:
    """Search meshes of 1, 2, 4, ... devices for the first one that fits.

    A mesh is skipped, and not compiled for, if its arguments and half of its estimated temporaries
    need too much memory. The estimate divides the temporaries of the last mesh among more devices.

    Args:
      planned: a mesh that does not fit.
      most: the largest number of devices.
      mesh_of: returns the mesh of a number of devices, or None.
      arguments: returns the bytes of the step's arguments on each device of a mesh.
      plan: compiles for a mesh.
      usable: the bytes of memory of each device.

    Returns:
      The mesh that fits, or None, and the meshes that were compiled for.
    """
    tried: list[MeshPlan] = []
    last = planned
    devices = 1
    while devices <= most and len(tried) < _MOST_COMPILED:
        sizes = mesh_of(devices)
        if sizes is not None and sizes != planned.mesh:
            temporaries = (last.memory.total - last.memory.arguments) * last.devices / devices
            if arguments(sizes) + temporaries / 2 <= usable:
                last = plan(sizes)
                tried.append(last)
                if last.fits:
                    return last, tried
        devices *= 2
    return None, tried
