"""What a run costs: speed and memory."""

import resource
import sys

import jax


def rate(count: int, seconds: float) -> float:
    """Things a second, 0 if there was no time."""
    return round(count / seconds, 2) if seconds else 0.0


def peak_memory() -> int:
    """Most bytes in use so far: of the accelerator, or on a CPU of this process."""
    statistics = jax.devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
