"""Devices that need not be here: compilers can compile for them, but nothing can run on them."""

import importlib.metadata
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from softprompt.errors import UserError, reason_of
from softprompt.plan.hardware import Hardware
from softprompt.plan.nvidia import TARGETS

_PACKAGES = {"tpu": "libtpu", "cuda": "jax-cuda12-pjrt"}


def missing_compiler(hardware: Hardware) -> str | None:
    """Return why there is no compiler for the hardware, and how to install it; None if there is."""
    package = _PACKAGES.get(hardware.platform)
    if package is None:
        return None
    extra = f"plan-{hardware.platform}"
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return (
            f"the compiler for {hardware.name} is not installed; "
            f"run: pip install 'softprompt[{extra}]'"
        )
    if hardware.platform == "cuda" and version != jax.__version__:
        return (
            f"{package} {version} does not match jax {jax.__version__}; "
            f"run: pip install {package}=={jax.__version__}"
        )
    return None


def absent_devices(hardware: Hardware, count: int) -> Sequence[jax.Device]:
    """Return devices of the hardware to compile for.

    Args:
      hardware: the kind. Its compiler must be installed; see `missing_compiler`.
      count: the number of chips, one that `hardware.wrong_count` accepts.

    Raises:
      UserError: if the compiler cannot be started.
    """
    try:
        if hardware.platform == "tpu":
            shape = _slice(hardware, count)
            topology = topologies.get_topology_desc(
                platform="tpu",
                topology_name=f"{hardware.name}:{'x'.join(map(str, shape))}",
                chips_per_host_bounds=[min(shape[0], 2), min(shape[1], 2), 1],
            )
        else:
            servers, cards = max(1, count // 8), min(count, 8)
            topology = topologies.get_topology_desc(
                platform="cuda",
                target_config=TARGETS[hardware.name],
                topology=f"1x{servers}x{cards}",
            )
    except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"the compiler for {hardware.name} cannot be started ({reason_of(error)})"
        ) from error
    return topology.devices


def virtual_cpu_devices(count: int) -> Sequence[jax.Device]:
    """Return virtual devices on the CPU.

    Raises:
      UserError: if JAX has already started with fewer devices.
    """
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX has already started
        if len(jax.devices("cpu")) < count:
            raise UserError(
                f"{count} virtual CPU devices are needed, but JAX has already started with "
                f"{len(jax.devices('cpu'))}; make the plan in a new process"
            ) from None
    return jax.devices("cpu")[:count]


def _slice(hardware: Hardware, count: int) -> tuple[int, ...]:
    """Return the shape of a TPU slice: a rectangle of chips, or a block of them for v5p."""
    dimensions = 3 if hardware.name == "v5p" and count >= 8 else 2
    shape = [1] * dimensions
    for doubling in range(count.bit_length() - 1):
        shape[-1 - doubling % dimensions] *= 2
    shape.sort()
    return (*shape, 1) if hardware.name == "v5p" and dimensions == 2 else tuple(shape)
