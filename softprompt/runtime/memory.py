"""Memory: the peak so far, and smaller batches when the device runs out of it."""

import logging
import resource
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import jax

from softprompt.errors import UserError

_log = logging.getLogger(__name__)

Result = TypeVar("Result")


def peak_memory() -> int:
    """Peak memory so far in bytes: of the accelerator, or on a CPU of this process."""
    statistics = jax.devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_out_of_memory(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether a program failed because the device had no memory for it."""
    return "RESOURCE_EXHAUSTED" in str(error)


def run_batches(
    groups: Iterable[list[int]], batch_size: int, run: Callable[[list[int], int], Result]
) -> Iterator[tuple[list[int], Result]]:
    """Run groups in batches, one after another; from one that is too large on, all are smaller.

    Args:
      groups: numbers of inputs, of which those of one group may be in a batch.
      batch_size: the most in a batch.
      run: what to do with a batch, given the numbers and the most that are in one now.

    Yields:
      The numbers of each batch that was run, and what `run` gave.

    Raises:
      UserError: if there is no memory for one alone, or the batch size is no positive number.
    """
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size}: must be 1 or more")
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
                        "the device has no memory for a single input; shorten it or what is to "
                        "be written, or ask for fewer beams or samples"
                    ) from None
                batch_size = len(part) // 2
                _log.warning(f"no memory for {len(part)} inputs at a time: trying {batch_size}")
                continue
            yield part, result
            left = left[batch_size:]
