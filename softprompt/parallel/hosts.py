"""The processes of a run on several hosts. Process 0, the main process, alone writes files.

JAX connects the processes (`jax.distributed`). All of them run the same program and call the
functions here together, in the same order. A single process is the main one and waits for nobody.
"""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from softprompt.errors import UserError
from softprompt.parallel.mesh import ROWS

Result = TypeVar("Result")
Arrays = TypeVar("Arrays")


def is_main() -> bool:
    """Return whether this process writes the files and the console."""
    return jax.process_index() == 0


def text_of_main(text: str) -> str:
    """Return the text that the main process passes. All processes call this together."""
    if jax.process_count() == 1:
        return text
    content = np.frombuffer(text.encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    content = np.resize(content, length) if is_main() else np.zeros(length, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(content)).tobytes().decode()


def wait_for_all(name: str) -> None:
    """Wait until all processes have called this with the same name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def result_of_main(function: Callable[[], Result]) -> Result:
    """Call a function in the main process alone, and return its result in all of them.

    Args:
      function: returns a value that JSON can hold.

    Raises:
      UserError: in all processes, if the function raises one.
    """
    if jax.process_count() == 1:
        return function()
    outcome: Any = None
    if is_main():
        try:
            outcome = {"result": function()}
        except UserError as error:
            text_of_main(json.dumps({"error": str(error)}))
            raise
    outcome = json.loads(text_of_main(json.dumps(outcome)))
    if "error" in outcome:
        raise UserError(outcome["error"])
    return outcome["result"]


class Agreement:
    """Lets all processes agree on a number without waiting for the devices."""

    def __init__(self) -> None:
        self._pending: jax.Array | None = None

    def __call__(self, number: int) -> int:
        """Return the largest number that any process passed to the previous call, at first 0."""
        mesh = Mesh(np.array(jax.devices()), "devices")
        every = jax.make_array_from_callback(
            (mesh.size,),
            NamedSharding(mesh, PartitionSpec("devices")),
            lambda index: np.full(1, number, np.int32),
        )
        last, self._pending = self._pending, _largest(every)
        return 0 if last is None else int(last)


@jax.jit
def _largest(numbers: jax.Array) -> jax.Array:
    return jnp.max(numbers)


def rows_here(count: int, mesh: Mesh | None) -> Sequence[int]:
    """Return the indices of the rows, or packs, that the devices of this process hold.

    Args:
      count: number of rows or packs of the whole batch.
      mesh: the mesh, or None.
    """
    if mesh is None or jax.process_count() == 1:
        return range(count)
    divided = NamedSharding(mesh, PartitionSpec(ROWS))
    parts = divided.addressable_devices_indices_map((count,)).values()
    return sorted({row for part in parts if part for row in range(*part[0].indices(count))})


def divide_rows(batch: Arrays, mesh: Mesh | None) -> Arrays:
    """Divide the arrays of a batch over the devices of a mesh, by rows or packs.

    Args:
      batch: a pytree of NumPy arrays whose first axis is rows or packs. A process needs only the
        values of `rows_here`.
      mesh: the mesh, or None.
    """
    if mesh is None:
        return batch
    return jax.tree.map(
        lambda array: global_array(array, NamedSharding(mesh, PartitionSpec(ROWS))), batch
    )


def global_array(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Return an array that is divided over the devices of all processes.

    Args:
      array: an array that each process has whole, or one that is divided already.
      sharding: how to divide it.
    """
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return jax.device_put(array, sharding)
    if jax.process_count() == 1:
        return jax.device_put(array, sharding)
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def bytes_here(arrays: Any) -> int:
    """Return how much memory arrays need on a device of this process, or on a CPU in all of it.

    The memory of a CPU is shared by all its devices in JAX.

    Args:
      arrays: a pytree of arrays or `jax.ShapeDtypeStruct`s, which may have a sharding.
    """

    def size(array: Any) -> int:
        sharding = getattr(array, "sharding", None)
        if sharding is None or jax.default_backend() != "cpu":
            return bytes_on_device(array)
        return bytes_on_device(array) * len(sharding.addressable_devices)

    return sum(map(size, jax.tree.leaves(arrays)))


def bytes_on_device(arrays: Any) -> int:
    """Return how much memory arrays need on each of their devices.

    Args:
      arrays: a pytree of arrays or `jax.ShapeDtypeStruct`s, which may have a sharding.
    """

    def size(array: Any) -> int:
        sharding = getattr(array, "sharding", None)
        shape = array.shape if sharding is None else sharding.shard_shape(array.shape)
        return math.prod(shape) * array.dtype.itemsize

    return sum(map(size, jax.tree.leaves(arrays)))
