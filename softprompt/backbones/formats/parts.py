"""The parts of an array that the devices of this process hold, and the array made of them."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding

Part = tuple[tuple[int, int], ...]
"""A rectangular part of an array: where it starts and ends along each axis."""


def whole(shape: Sequence[int]) -> Part:
    """Return the part that is the whole array."""
    return tuple((0, size) for size in shape)


def shape_of(part: Part) -> tuple[int, ...]:
    """Return the shape of a part."""
    return tuple(end - start for start, end in part)


def local_parts(shape: Sequence[int], sharding: NamedSharding | None) -> list[Part]:
    """Return the different parts of an array that the devices of this process hold.

    They do not overlap.

    Args:
      shape: the shape of the array.
      sharding: how the array is divided; None if one device holds it whole.
    """
    if sharding is None:
        return [whole(shape)]
    indices = sharding.addressable_devices_indices_map(tuple(shape)).values()
    return list(dict.fromkeys(_part(index, shape) for index in indices))


def covering(parts: Sequence[Part]) -> list[Part]:
    """Return the bounding box of parts if they fill it, and else the different parts.

    Args:
      parts: parts that do not overlap. Some may be equal.
    """
    parts = list(dict.fromkeys(parts))
    axes = zip(*parts, strict=True)
    box = tuple((min(a for a, _ in bounds), max(b for _, b in bounds)) for bounds in axes)
    filled = sum(math.prod(shape_of(part)) for part in parts)
    return [box] if filled == math.prod(shape_of(box)) else parts


def contains(outer: Part, part: Part) -> bool:
    """Return whether a part lies inside another one."""
    return all(a <= start and end <= b for (a, b), (start, end) in zip(outer, part, strict=True))


def slices(part: Part, outer: Part | None = None) -> tuple[slice, ...]:
    """Return the index of a part in the whole array, or in another part."""
    starts = [start for start, _ in outer] if outer else [0] * len(part)
    return tuple(slice(a - first, b - first) for (a, b), first in zip(part, starts, strict=True))


def assembled(
    shape: Sequence[int], sharding: NamedSharding | None, values: Mapping[Part, np.ndarray]
) -> jax.Array:
    """Return an array whose parts are on the devices that hold them.

    Args:
      shape: the shape of the array.
      sharding: as in `local_parts`.
      values: the values of each of the `local_parts`.
    """
    if sharding is None:
        return jax.device_put(values[whole(shape)])  # `jnp.asarray` would compile a program
    return jax.make_array_from_callback(
        tuple(shape), sharding, lambda index: values[_part(index, shape)]
    )


def _part(index: tuple[slice, ...] | None, shape: Sequence[int]) -> Part:
    index = index or (slice(None),) * len(shape)
    return tuple(axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True))
