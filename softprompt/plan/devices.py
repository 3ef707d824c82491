"""Devices that need not be here: compilers can compile for them, but nothing can run on them."""

import contextlib
import importlib.metadata
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from softprompt.errors import UserError, reason_of
from softprompt.plan.hardware import Hardware
from softprompt.plan.nvidia import TARGETS
from softprompt.runtime.platforms import load_cuda

_PACKAGES = {"tpu": "libtpu", "cuda": "jax-cuda12-pjrt"}


def start_jax(virtual_devices: int) -> None:
    """Start JAX on the CPU, so that a plan takes no accelerator from a program that uses it.

    Args:
      virtual_devices: the number of virtual CPU devices that may be needed.
    """
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several plans at the same time
    with contextlib.suppress(RuntimeError):  # JAX has already started
        jax.config.update("jax_num_cpu_devices", virtual_devices)
        jax.config.update("jax_platforms", "cpu")


def missing_compiler(hardware: Hardware) -> str | None:
    """Return why there is no compiler for the hardware, and how to install it; None if there is."""
    package = _PACKAGES.get(hardware.platform)
    if package is None:
        return None
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return (
            f"the compiler for {hardware.name} is not installed; "
            f"run: pip install 'softprompt[plan-{hardware.platform}]'"
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
    options: dict[str, Any]
    if hardware.platform == "tpu":
        shape = _slice(hardware, count)
        options = {
            "topology_name": f"{hardware.name}:{'x'.join(map(str, shape))}",
            "chips_per_host_bounds": [min(shape[0], 2), min(shape[1], 2), 1],
        }
    else:
        servers, cards = max(1, count // 8), min(count, 8)
        options = {
            "target_config": TARGETS[hardware.name],
            "topology": f"1x{servers}x{cards}",
        }
    try:
        with without_stderr():
            if hardware.platform == "cuda":
                load_cuda()
            topology = topologies.get_topology_desc(platform=hardware.platform, **options)
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"the compiler for {hardware.name} cannot be started ({reason_of(error)})"
        ) from error
    return topology.devices


def virtual_cpu_devices(count: int) -> Sequence[jax.Device]:
    """Return virtual devices on the CPU; see `start_jax`.

    Raises:
      UserError: if JAX has started with fewer devices.
    """
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(
            f"{count} virtual CPU devices are needed, but JAX has already started with "
            f"{len(devices)}; make the plan in a new process"
        )
    return devices[:count]


def compiler_options(mesh: Mesh) -> dict[str, Any]:
    """Return the options for compiling a program for the devices of a mesh."""
    # Autotuning would run kernels on the card.
    is_gpu = mesh.devices.flat[0].platform in ("gpu", "cuda")
    return {"xla_gpu_autotune_level": 0} if is_gpu else {}


def _slice(hardware: Hardware, count: int) -> tuple[int, ...]:
    """Return the shape of a TPU slice: a rectangle of chips, or a block of them for v5p."""
    is_block = hardware.name == "v5p" and count >= 8
    shape = [1, 1, 1] if is_block else [1, 1]
    for doubling in range(count.bit_length() - 1):
        shape[-1 - doubling % len(shape)] *= 2
    return (*shape, 1) if hardware.name == "v5p" and not is_block else tuple(shape)


@contextlib.contextmanager
def without_stderr() -> Iterator[None]:
    """Discard what this process and its C++ libraries write to standard error.

    Compilers report there that they find no device, and how long they take. Errors are raised.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
