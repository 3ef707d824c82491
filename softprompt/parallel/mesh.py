"""The mesh: the devices as a grid with named axes.

A program for one device is written as usual. JAX's compiler (GSPMD) divides it over the devices of
a mesh and adds the communication. It needs to know three things:

- how the parameters are divided. `sharding` has one table for all of them.
- how a few intermediate arrays are divided, where its own choice is bad: `divide`.
- which parts of the program are better divided by hand: `sum_over_data`, `divide_trials`,
  `on_own_rows`, `on_own_heads` and `on_each_device`.

A backbone has its mesh in the attribute `mesh`, which is None for one device. The functions here
then have no effect.

Axis letters: B batch, G packs, P virtual tokens, D hidden.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from softprompt.errors import UserError

AXES = ("trials", "data", "fsdp", "model")
"""The axes of every mesh.

- `trials` divides the trials of a sweep, and the rows of its evaluations.
- `data` divides the rows of a batch. Every part has all weights.
- `fsdp` (fully sharded data parallelism) divides the rows too, and the weights. Each layer gathers
  its weights when it runs, and then forgets them.
- `model` divides the weights of each layer for good: attention heads, feed-forward layers and the
  vocabulary. Its parts add up their results, activations of all their rows, twice in a layer.
"""

ROWS = ("trials", "data", "fsdp")  # the axes that divide rows
ROWS_OF_LOGITS = ("trials", "data")  # there, `fsdp` divides the vocabulary
VOCABULARY = ("model", "fsdp")  # the axes that divide the embedding table and the head

Axes = str | Sequence[str] | None  # the mesh axes that divide one axis of an array


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arrange devices as a mesh, to load a base model on.

    Args:
      sizes: the number of devices along each axis, 1 by default. The axes are `data`, which
        divides the rows of a batch, `fsdp`, which divides rows and weights, and `model`, which
        divides attention heads, feed-forward layers and the vocabulary. (`trials` is for sweeps.)
        One size may be -1, for all remaining devices.
      devices: the devices to use, by default all devices of all processes. A single process may
        have more than the mesh needs. It then uses the first ones.

    Returns:
      A mesh of devices, for `load_base`.

    Raises:
      UserError: if an axis or a size is invalid, or the number of devices does not match.

    Examples:
      >>> mesh = make_mesh({"data": -1})
      >>> base = load_base("smollm2-135m-instruct", mesh=mesh)
    """
    devices = jax.devices() if devices is None else devices
    shape, name = [sizes.get(axis, 1) for axis in AXES], mesh_name(sizes)
    if unknown := [axis for axis in sizes if axis not in AXES]:
        raise UserError(f"mesh {name}: there is no axis {unknown[0]!r} (axes: data, fsdp, model)")
    if any(type(size) is not int or size < -1 or size == 0 for size in shape):
        raise UserError(f"mesh {name}: a size must be a whole number, 1 or more, or -1")
    if shape.count(-1) > 1:
        raise UserError(f"mesh {name}: only one size can be -1")
    if -1 in shape:
        fixed = -math.prod(shape)
        if len(devices) % fixed:
            raise UserError(
                f"mesh {name}: the number of devices ({len(devices)}) is not a multiple of "
                f"{fixed}, the product of the other sizes"
            )
        shape[shape.index(-1)] = len(devices) // fixed
    needed = math.prod(shape)
    several_processes = len({device.process_index for device in devices}) > 1
    if several_processes and needed < len(devices):
        raise UserError(
            f"mesh {name}: has {needed} devices, but several processes need a mesh of all their "
            f"devices, which are {len(devices)}"
        )
    if needed > len(devices):
        hint = ""
        if devices[0].platform == "cpu":
            flag = f"--xla_force_host_platform_device_count={needed}"
            hint = f"; to try it on a CPU, set XLA_FLAGS={flag}"
        raise UserError(f"mesh {name}: needs {needed} devices, but there are {len(devices)}{hint}")
    kinds = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types=kinds, devices=devices[:needed])


def mesh_name(sizes: Mapping[str, int]) -> str:
    """Return the sizes of a mesh as an experiment has them, without those that are 1."""
    return "{" + ", ".join(f"{axis}: {size}" for axis, size in sizes.items() if size != 1) + "}"


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
      axes: for each of the first axes of the array the mesh axes that divide it, see `spec_of`.
        All further axes stay whole.
    """
    if mesh is None:
        return array
    current = _current(mesh)
    spec = spec_of(array.shape, mesh, axes, current.manual_axes)
    return jax.lax.with_sharding_constraint(array, NamedSharding(current, spec))


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
      function: takes a pytree that all parts share, a batch whose arrays have a first axis G, and a
        random key. It returns a pytree of sums over the rows of the batch.
      mesh: the mesh, or None.
    """
    if mesh is None or axis_size(mesh, "data") == 1:
        return function

    def part(shared: Any, batch: Any, key: jax.Array) -> Any:
        key = jax.random.fold_in(key, jax.lax.axis_index("data"))
        return jax.lax.psum(function(shared, batch, key), "data")

    rows, same = PartitionSpec("data"), PartitionSpec()
    return jax.shard_map(
        part,
        mesh=_current(mesh),
        in_specs=(same, rows, same),
        out_specs=same,
        axis_names={"data"},
        check_vma=False,
    )


def divide_trials(function: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """Return a function that runs on the trials of each part of the axis `trials`.

    The parts do not exchange anything while the function runs.

    Args:
      function: takes a pytree that all trials share, and pytrees of arrays with a first axis N. It
        returns such a pytree.
      mesh: the mesh, or None. Its axis `trials` divides N.
    """
    if axis_size(mesh, "trials") == 1:
        return function

    def divided(shared: Any, *arrays: Any) -> Any:
        each, same = PartitionSpec("trials"), PartitionSpec()
        return jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(same, *[each] * len(arrays)),
            out_specs=each,
            axis_names={"trials"},
            check_vma=False,
        )(shared, *arrays)

    return divided


def on_own_rows(function: Callable[[jax.Array], Any], mesh: Mesh | None, x: jax.Array) -> Any:
    """Call a function on the rows that each device holds.

    It is for functions that the compiler runs on all rows at once, such as `jax.lax.top_k`.

    Args:
      function: takes rows `[B, ...]` and returns arrays `[B, ...]`. A row of its results depends on
        the same row of `x` alone.
      mesh: the mesh, or None.
      x: rows `[B, ...]`.
    """
    if mesh is None:
        return function(x)
    rows = spec_of(x.shape, mesh, (ROWS,))
    divided = jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    return divided(x)


def on_own_heads(
    function: Callable[..., jax.Array],
    mesh: Mesh | None,
    rows: Sequence[jax.Array],
    shared: Sequence[jax.Array],
) -> jax.Array:
    """Call a function on the rows and the heads that each device holds.

    It is for kernels of attention, which the compiler cannot divide.

    Args:
      function: takes the arrays of `rows` and of `shared`, and returns `[B, T, H, h]`. A row
        and a head of its result depend only on the same row and head of its arguments.
      mesh: the mesh, or None.
      rows: queries, keys and values `[B, T, H, h]`.
      shared: keys and values `[P, H, h]` that all rows share.
    """
    if mesh is None or mesh.size == 1:
        return function(*rows, *shared)
    current = _current(mesh)
    manual = current.manual_axes
    own = [spec_of(array.shape, mesh, (ROWS, None, "model"), manual) for array in rows]
    common = [spec_of(array.shape, mesh, (None, "model"), manual) for array in shared]
    return jax.shard_map(
        function,
        mesh=current,
        in_specs=(*own, *common),
        out_specs=own[0],
        axis_names={*AXES} - {*manual},
        check_vma=False,
    )(*rows, *shared)


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
    current = _current(mesh)
    manual = current.manual_axes

    def spec(array: jax.Array, names: Sequence[Axes]) -> PartitionSpec:
        return spec_of(array.shape, mesh, names, manual)

    rows = spec(x, (ROWS,))
    return jax.shard_map(
        lambda weights, x: jax.lax.psum(function(weights, x), "model"),
        mesh=current,
        in_specs=(
            jax.tree_util.tree_map_with_path(lambda p, w: spec(w, axes_of_weight(p, w)), weights),
            rows,
        ),
        out_specs=rows,
        axis_names={*AXES} - {*manual},
        check_vma=False,
    )(weights, x)


def _current(mesh: Mesh) -> Mesh | AbstractMesh:
    """Return the mesh as it is inside `sum_over_data` or `divide_trials`, or the mesh itself."""
    context = jax.sharding.get_abstract_mesh()
    return context if context.manual_axes else mesh


def spec_of(
    shape: Sequence[int], mesh: Mesh, axes: Sequence[Axes], manual: Collection[str] = ()
) -> PartitionSpec:
    """Return how a mesh divides an array, as JAX writes it.

    Args:
      shape: the sizes of the array.
      mesh: the mesh.
      axes: for each of the first axes of the array the mesh axes that divide it. If they do not
        divide its size, only the last of them do, or none.
      manual: mesh axes that a surrounding `shard_map` has divided already.
    """

    def dividing(size: int, names: Axes) -> Axes:
        names = [names] if isinstance(names, str) else names or []
        names = tuple(name for name in names if name not in manual)
        while size % axis_size(mesh, names):
            names = names[1:]
        return names or None

    return PartitionSpec(*map(dividing, shape, axes))
