"""The mesh: the devices as a grid with named axes.

JAX's compiler (GSPMD) divides a program over the devices. It needs to know how the arguments are
divided (see `sharding`) and, at a few places, how intermediate arrays are. A backbone has its mesh
in the attribute `mesh`, which is None for one device. The functions here then have no effect.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from softprompt.errors import UserError

AXES = ("trials", "data", "fsdp", "model")
"""The axes of every mesh.

`trials` divides the trials of a sweep, and `data` the rows of a batch. `fsdp` divides rows and
weights; each layer gathers its weights when it runs. `model` divides attention heads, feed-forward
layers and the vocabulary.
"""

ROWS = ("data", "fsdp")  # the axes that divide the rows of a batch
VOCABULARY = ("model", "fsdp")  # the axes that divide the embedding table and the head

Axes = str | Sequence[str] | None  # the mesh axes that divide one axis of an array


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh.

    Args:
      sizes: the number of devices along each of `AXES`, 1 by default. One of them may be -1, for
        all remaining devices.
      devices: the devices to use, by default all devices of all processes. A single process may
        have more than the mesh needs. It then uses the first ones.

    Raises:
      UserError: if the number of devices does not match.
    """
    devices = jax.devices() if devices is None else devices
    shape = [sizes.get(axis, 1) for axis in AXES]
    fixed = math.prod(size for size in shape if size != -1)
    if -1 in shape:
        rest, left = divmod(len(devices), fixed)
        if left or not rest:
            raise UserError(
                f"compute.mesh: {_product(sizes)} does not divide {_count(devices)}; "
                f"the other axes must have a product that divides {len(devices)}"
            )
        shape[shape.index(-1)] = rest
    needed = math.prod(shape)
    several_hosts = len({device.process_index for device in devices}) > 1
    if needed > len(devices) or (several_hosts and needed < len(devices)):
        hint = ""
        if devices[0].platform == "cpu":
            flag = f"--xla_force_host_platform_device_count={needed}"
            hint = f"; to try it on a CPU, set XLA_FLAGS={flag}"
        raise UserError(
            f"compute.mesh: {_product(sizes)} needs {needed} devices, but there are "
            f"{len(devices)}{hint}"
        )
    kinds = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types=kinds, devices=devices[:needed])


def _product(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{axis} {sizes[axis]}" for axis in AXES if sizes.get(axis, 1) != 1) or "1"


def _count(devices: Sequence[jax.Device]) -> str:
    return f"{len(devices)} device{'s' if len(devices) > 1 else ''}"


def axis_size(mesh: Mesh | None, axes: Axes) -> int:
    """Return into how many parts the axes divide an array."""
    if mesh is None or axes is None:
        return 1
    return math.prod(mesh.shape[axis] for axis in ([axes] if isinstance(axes, str) else axes))


def divide(array: jax.Array, mesh: Mesh | None, *axes: Axes) -> jax.Array:
    """Tell the compiler how to divide an array. The values do not change.

    Args:
      array: an intermediate array of a compiled function.
      mesh: the mesh, or None.
      axes: for each of the first axes of the array the mesh axes that divide it. An axis whose
        size they do not divide stays whole, as do all further axes.
    """
    if mesh is None:
        return array
    context = jax.sharding.get_abstract_mesh()
    manual = context.manual_axes  # inside `sum_over_data`
    spec = _spec(array.shape, mesh, axes, manual)
    sharding = NamedSharding(context if manual else mesh, spec)
    return jax.lax.with_sharding_constraint(array, sharding)


def whole(arrays: Any, mesh: Mesh | None) -> Any:
    """Tell the compiler to give every device whole arrays, so that each process can read them.

    Args:
      arrays: a pytree of intermediate arrays of a compiled function.
      mesh: the mesh, or None.
    """
    return jax.tree.map(lambda array: divide(array, mesh), arrays)


def sum_over_data(function: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """Return a function that runs on the rows of each part of the axis `data` and sums the results.

    Only the results travel between the parts. For the gradient of a soft prompt these are `P·D`
    numbers.

    Args:
      function: takes a pytree that all parts share, a batch whose arrays have a first axis B, and a
        random key. It returns a pytree of sums over the rows of the batch.
      mesh: the mesh, or None.
    """
    if axis_size(mesh, "data") == 1:
        return function

    def part(shared: Any, batch: Any, key: jax.Array) -> Any:
        key = jax.random.fold_in(key, jax.lax.axis_index("data"))
        return jax.lax.psum(function(shared, batch, key), "data")

    rows, whole = PartitionSpec("data"), PartitionSpec()
    return jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(whole, rows, whole),
        out_specs=whole,
        axis_names={"data"},
        check_vma=False,
    )


def on_each_device(
    function: Callable[[Any, jax.Array], jax.Array],
    mesh: Mesh | None,
    weights: Any,
    axes_of_weight: Callable[[Any, jax.Array], Sequence[Axes]],
    x: jax.Array,
) -> jax.Array:
    """Call a function on the parts of weights and rows that each device holds.

    It is for work that the compiler cannot divide well, such as sorting tokens by expert.

    Args:
      function: takes the weights and `[B, ...]` and returns `[B, ...]`. If `model` divides the
        weights, the results of its parts are summed.
      mesh: the mesh, or None.
      weights: a pytree of arrays.
      axes_of_weight: returns the mesh axes that divide a weight, given its path and the weight.
      x: rows `[B, ...]`.
    """
    if mesh is None:
        return function(weights, x)
    context = jax.sharding.get_abstract_mesh()
    axes = {*AXES[1:]} - {*context.manual_axes}

    def spec(array: jax.Array, names: Sequence[Axes]) -> PartitionSpec:
        return _spec(array.shape, mesh, names, context.manual_axes)

    rows = spec(x, (ROWS,))
    return jax.shard_map(
        lambda weights, x: jax.lax.psum(function(weights, x), "model"),
        mesh=context if context.manual_axes else mesh,
        in_specs=(
            jax.tree_util.tree_map_with_path(lambda p, w: spec(w, axes_of_weight(p, w)), weights),
            rows,
        ),
        out_specs=rows,
        axis_names=axes,
        check_vma=False,
    )(weights, x)


def _spec(
    shape: Sequence[int], mesh: Mesh, axes: Sequence[Axes], manual: Sequence[str]
) -> PartitionSpec:
    """Return how the axes of the mesh that are not manual divide an array, where they do."""

    def left(size: int, names: Axes) -> Axes:
        names = [names] if isinstance(names, str) else names or []
        names = tuple(name for name in names if name not in manual)
        return names if names and size % axis_size(mesh, names) == 0 else None

    return PartitionSpec(*map(left, shape, axes))
