"""Memory: the peak use, and smaller batches when the device runs out of memory."""

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
    """Return the peak memory use in bytes: of the accelerator, or on a CPU of this process."""
    statistics = jax.devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_out_of_memory(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether the error says that the device ran out of memory."""
    return "RESOURCE_EXHAUSTED" in str(error)


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
