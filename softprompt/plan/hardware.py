"""The hardware that a plan can be made for: one table of published figures."""

import dataclasses
import re

from softprompt.errors import UserError, shown
from softprompt.runtime.memory import available_host_memory

GIBIBYTE = 2**30


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One kind of accelerator. All figures are for one chip.

    Attributes:
      name: the name in texts such as `v5e-8`.
      platform: `tpu`, `cuda` or `cpu`.
      memory: bytes of memory.
      reserve: the fraction of the memory that a program cannot use.
      flops: floating-point operations per second of bfloat16 matrix products with float32 sums,
        without sparsity; None if unknown.
      memory_bandwidth: bytes per second between the chip and its memory; None if unknown.
      link_bandwidth: bytes per second that the chip can send to other chips over all its links;
        None if unknown.
      most_chips: the largest number of chips that are linked.
    """

    name: str
    platform: str
    memory: int
    reserve: float
    flops: float | None
    memory_bandwidth: float | None
    link_bandwidth: float | None
    most_chips: int

    @property
    def usable(self) -> int:
        """Bytes of memory that a program can use."""
        return int(self.memory * (1 - self.reserve))


_RUNTIME = 0.05  # reserved for the runtime and for fragmentation
_NOT_ALLOCATED = 0.25  # JAX allocates 75 % of a GPU by default

# Sources, read in November 2026. TPUs: docs.cloud.google.com/tpu/docs/v5e, .../v5p and .../v6e
# (the link bandwidths there count both directions; the values here are for sending). H100 SXM:
# the NVIDIA H100 datasheet. A100 SXM 80 GB: the NVIDIA A100 datasheet. The NVLink bandwidths of
# the datasheets also count both directions. The memory of the NVIDIA cards is what the driver
# reports. Between servers, links are slower than these figures.
_TABLE = {
    hardware.name: hardware
    for hardware in (
        Hardware("v5e", "tpu", 16 * GIBIBYTE, _RUNTIME, 197e12, 819e9, 200e9, 256),
        Hardware("v5p", "tpu", 95 * GIBIBYTE, _RUNTIME, 459e12, 2765e9, 600e9, 1024),
        Hardware("v6e", "tpu", 32 * GIBIBYTE, _RUNTIME, 918e12, 1638e9, 400e9, 256),
        Hardware("h100", "cuda", 84_942_979_072, _NOT_ALLOCATED, 989e12, 3352e9, 450e9, 1024),
        Hardware("a100", "cuda", 85_100_068_864, _NOT_ALLOCATED, 312e12, 2039e9, 300e9, 1024),
    )
}


def parse_hardware(text: str) -> tuple[Hardware, int]:
    """Return the hardware that a text such as `v5e-8` names, and the number of chips.

    The number is a number of chips. (Google's name for a v5p slice counts two cores per chip.)

    Raises:
      UserError: if the hardware or the number is not known.
    """
    match = re.fullmatch(r"([a-z0-9]+)-([0-9]{1,6})", text)
    if match is None or match[1] not in (*_TABLE, "cpu"):
        names = ", ".join((*_TABLE, "cpu"))
        raise UserError(
            f"hardware {shown(text)}: not known; write the name and the number of chips, such as "
            f"v5e-8 (names: {names})"
        )
    name, chips = match[1], int(match[2])
    hardware = _this_machine(max(chips, 1)) if name == "cpu" else _TABLE[name]
    if problem := wrong_count(hardware, chips):
        raise UserError(f"hardware {text}: {problem}")
    return hardware, chips


def wrong_count(hardware: Hardware, chips: int) -> str | None:
    """Return why this number of linked chips does not exist; None if it does."""
    if not 1 <= chips <= hardware.most_chips:
        return f"the number of chips must be from 1 to {hardware.most_chips}"
    if hardware.platform == "tpu" and chips & (chips - 1):
        return "the number of chips of a TPU slice must be a power of two"
    if hardware.platform == "cuda" and chips > 8 and chips % 8:
        return "the number of GPUs must be at most 8, or a multiple of 8"
    return None


def _this_machine(devices: int) -> Hardware:
    """Describe virtual CPU devices, which share the memory of this machine."""
    memory = available_host_memory() // devices
    return Hardware("cpu", "cpu", memory, _RUNTIME, None, None, None, 256)
