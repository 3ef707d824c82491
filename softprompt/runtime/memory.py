"""Memory: how much is used and available, and smaller batches when it runs out."""

import logging
import os
import resource
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import jax

from softprompt.errors import UserError

_log = logging.getLogger(__name__)

Result = TypeVar("Result")

_CGROUPS = Path("/sys/fs/cgroup")


def peak_memory() -> int:
    """Return the peak memory use in bytes: of the accelerator, or on a CPU of this process."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_in_use() -> int:
    """Return the memory in use now, in bytes: of the accelerator, or on a CPU of this process."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "bytes_in_use" in statistics:
        return statistics["bytes_in_use"]
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux
        return peak_memory()
    return pages * os.sysconf("SC_PAGE_SIZE")


def available_memory() -> int:
    """Return how many bytes can still be allocated on the accelerator, or on a CPU in memory."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    return available_host_memory()


def available_host_memory() -> int:
    """Return how many bytes this process can still allocate in the memory of its machine.

    On Linux, this is the memory that is free or can be freed, within the limit of the container.
    Elsewhere, it is the memory of the machine.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    (free,) = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return min([free, *_container_limits()])


def _container_limits() -> Iterator[int]:
    """The bytes that the container (cgroup version 2 or 1) may still allocate, if limited."""
    for folder, limit, used, prefix in (
        (_CGROUPS, "memory.max", "memory.current", ""),
        (_CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        try:
            most, now = (int((folder / name).read_text()) for name in (limit, used))
            statistics = dict(map(str.split, (folder / "memory.stat").read_text().splitlines()))
            # The system frees cached files when a process needs their memory.
            cached = sum(int(statistics[f"{prefix}{age}_file"]) for age in ("active", "inactive"))
        except (OSError, ValueError, KeyError):  # no such file, or "max"
            continue
        yield max(0, most - now + cached)


def gibibytes(count: float) -> str:
    """Format a number of bytes."""
    return f"{count / 2**30:,.2f} GiB"


def is_out_of_memory(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether the error says that the device ran out of memory."""
    return "RESOURCE_EXHAUSTED" in str(error)


def require_batch_size(batch_size: int) -> None:
    """Raise a `UserError` if a batch size is not positive."""
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size}: must be 1 or more")


def run_batches(
    groups: Iterable[list[int]], batch_size: int, run: Callable[[list[int], int], Result]
) -> Iterator[tuple[list[int], Result]]:
    """Run inputs in batches, and halve the batch size when the device runs out of memory.

    The smaller batch size also applies to all later batches.

    Args:
      groups: indices of inputs. The inputs of a batch come from one group.
      batch_size: maximum number of inputs in a batch.
      run: runs one batch, given its indices and the current batch size.

    Yields:
      The indices of each batch, and the result of `run`.

    Raises:
      UserError: if the batch size is not positive, or a single input needs too much memory.
    """
    require_batch_size(batch_size)
    for group in groups:
        left = group
        while left:
            part = left[:batch_size]
            try:
                result = run(part, batch_size)
            except jax.errors.JaxRuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if len(part) == 1:
                    raise UserError(
                        "the device runs out of memory with a single input; shorten the input, "
                        "or reduce max_new_tokens, beams or samples"
                    ) from None
                batch_size = len(part) // 2
                _log.warning(
                    f"out of memory: trying {batch_size} instead of {len(part)} inputs at a time"
                )
                continue
            yield part, result
            left = left[batch_size:]
