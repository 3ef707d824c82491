"""How the parameters of the backbones are divided over a mesh: one table, by module name.

`fsdp` and `model` divide different axes of a matrix. `model` divides the outputs of the first
matrix of an attention or feed-forward layer and the inputs of its last one, so that each device
computes some of the heads or of the inner features from beginning to end. `fsdp` divides the other
axis, which has the hidden size.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from softprompt.errors import UserError
from softprompt.parallel.hosts import global_array
from softprompt.parallel.mesh import (
    AXES,
    VOCABULARY,
    Axes,
    axis_size,
    divide,
    mesh_name,
    spec_of,
)

_TABLE = (VOCABULARY, None)  # of the input embeddings, [V, D]

_MATRICES: dict[str, tuple[Axes, Axes]] = {
    "attention.query": ("fsdp", "model"),
    "attention.key": ("fsdp", "model"),
    "attention.value": ("fsdp", "model"),
    "attention.output": ("model", "fsdp"),
    "cross.query": ("fsdp", "model"),
    "cross.key": ("fsdp", "model"),
    "cross.value": ("fsdp", "model"),
    "cross.output": ("model", "fsdp"),
    "feed_forward.gate": ("fsdp", "model"),
    "feed_forward.up": ("fsdp", "model"),
    "feed_forward.down": ("model", "fsdp"),
    "experts.gate": ("fsdp", "model"),
    "experts.up": ("fsdp", "model"),
    "experts.down": ("model", "fsdp"),
    "head": (None, VOCABULARY),
}
"""The mesh axes that divide the inputs and the outputs of a `Linear`, by the end of its path.

All other parameters (norms, positions, relative position biases, the routers of experts, and what
most methods learn) are small. Every device has all of them.
"""

_MOST_MESHES = 8  # named in an error message

Together = Callable[[int], int]


def one_input(inputs: int) -> int:
    """Return 1: the inputs of a matrix can be divided anywhere."""
    return 1


def axes_of(name: str, ndim: int) -> tuple[Axes, ...]:
    """Return the mesh axes that divide each axis of a parameter, or of its optimizer state.

    Args:
      name: the path of the parameter, such as `layers.attention.query.kernel`. It may have any
        beginning: the same parameter has several paths in the pytrees that hold it.
      ndim: the number of axes of the array. Layers and experts are stacked in front.
    """
    *_, around, module, leaf = ["", "", *name.removesuffix(".value").split(".")]
    inputs, outputs = _MATRICES.get(f"{around}.{module}", _MATRICES.get(module, (None, None)))
    last: tuple[Axes, ...] = ()
    if (module, leaf) == ("embedding", "table"):
        last = _TABLE
    elif leaf in ("kernel", "group_scale", "group_offset"):
        last = inputs, outputs
    elif leaf in ("scale", "bias"):
        last = (outputs,)
    last = last[-ndim:] if ndim else ()
    return (*[None] * (ndim - len(last)), *last)


def sharding_of(path: Sequence[Any], ndim: int, mesh: Mesh | None) -> NamedSharding | None:
    """Return the sharding of a parameter of a backbone; None without a mesh.

    Args:
      path: the names of the modules around the parameter and its own name.
      ndim: the number of its axes.
      mesh: the mesh, or None. It divides the model, see `require_divisible`.
    """
    if mesh is None:
        return None
    return NamedSharding(mesh, PartitionSpec(*axes_of(".".join(map(str, path)), ndim)))


def shardings(arrays: Any, mesh: Mesh) -> Any:
    """Return the sharding of every array of a pytree, in a pytree of the same structure.

    Args:
      arrays: parameters of a backbone or of a method, or optimizer state, with `shape`s. An axis
        whose size the mesh does not divide stays whole.
      mesh: the mesh.
    """

    def sharding(array: Any, axes: Sequence[Axes]) -> NamedSharding:
        return NamedSharding(mesh, spec_of(array.shape, mesh, axes))

    return _map_with_axes(sharding, arrays)


def with_shardings(shapes: Any, mesh: Mesh | None) -> Any:
    """Return the `jax.ShapeDtypeStruct`s of a pytree with their shardings on a mesh."""
    if mesh is None:
        return shapes
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings(shapes, mesh),
    )


def place(arrays: Any, mesh: Mesh | None) -> Any:
    """Move the arrays of a pytree to the devices of a mesh, divided as `shardings` says."""
    return arrays if mesh is None else jax.tree.map(global_array, arrays, shardings(arrays, mesh))


def keep_divided(arrays: Any, mesh: Mesh | None) -> Any:
    """Tell the compiler to divide the arrays of a pytree as `shardings` says."""
    if mesh is None:
        return arrays
    return _map_with_axes(lambda array, axes: divide(array, mesh, *axes), arrays)


def gather_layer(layer: Any, mesh: Mesh | None) -> Any:
    """Gather the weights of one layer that the axis `fsdp` divides.

    Args:
      layer: the module of one layer, inside the scan over layers.
      mesh: the mesh, or None.
    """
    if axis_size(mesh, "fsdp") == 1:
        return layer
    return _map_with_axes(lambda array, axes: divide(array, mesh, *_without_fsdp(axes)), layer)


def axes_when_gathered(path: Any, array: jax.Array) -> list[Axes]:
    """Return the mesh axes that divide a weight after `gather_layer`, given its path."""
    return _without_fsdp(axes_of(_name(path), array.ndim))


def _without_fsdp(axes: Sequence[Axes]) -> list[Axes]:
    return [None if names == "fsdp" else names for names in axes]


def _map_with_axes(function: Callable[[Any, Sequence[Axes]], Any], arrays: Any) -> Any:
    """Call a function with each array of a pytree and the mesh axes that divide it."""
    return jax.tree_util.tree_map_with_path(
        lambda path, array: function(array, axes_of(_name(path), len(array.shape))), arrays
    )


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def require_divisible(arch: Any, mesh: Mesh | None, together: Together = one_input) -> None:
    """Check that a mesh divides a model.

    Args:
      arch: the architecture of the model.
      mesh: the mesh, or None.
      together: takes the number of inputs of a matrix, and returns how many neighboring inputs
        must be on the same device.

    Raises:
      UserError: names the size that is not divided, and meshes of as many devices that work.
    """
    if mesh is None:
        return
    sizes = {axis: size for axis, size in mesh.shape.items() if axis != "trials"}
    for what, size, axes in _divided_sizes(arch, together):
        if size % axis_size(mesh, axes):
            parts = " x ".join(f"{axis} {sizes[axis]}" for axis in axes if sizes[axis] > 1)
            devices = math.prod(sizes.values())
            found = itertools.islice(meshes_of(arch, devices, together), _MOST_MESHES)
            working = map(mesh_name, found)
            raise UserError(
                f"mesh {mesh_name(sizes)}: the model has {size} {what}, which {parts} does not "
                f"divide; meshes of {devices} devices that work: {', '.join(working)}"
            )


def require_rows(rows: int, mesh: Mesh | None) -> None:
    """Check that a mesh divides the rows of a training pass.

    Args:
      rows: `training.batch_size`.
      mesh: the mesh, or None.

    Raises:
      UserError: names a batch size that works.
    """
    parts = axis_size(mesh, ("data", "fsdp"))
    if rows % parts:
        raise UserError(
            f"training.batch_size {rows}: must be a multiple of {parts}, which is data x fsdp of "
            f"compute.mesh; use {-(-rows // parts) * parts}"
        )


def meshes_of(arch: Any, devices: int, together: Together = one_input) -> Iterator[dict[str, int]]:
    """Yield the meshes of a number of devices that divide a model, as sizes by axis.

    Args:
      arch, together: see `require_divisible`.
      devices: the number of devices.
    """
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    for shape in itertools.product(divisors, repeat=len(AXES) - 1):
        sizes = dict(zip(AXES[1:], shape, strict=True))
        if math.prod(shape) == devices and all(
            size % math.prod(sizes[axis] for axis in axes) == 0
            for _, size, axes in _divided_sizes(arch, together)
        ):
            yield sizes


def _divided_sizes(arch: Any, together: Together) -> list[tuple[str, int, tuple[str, ...]]]:
    """List what a mesh divides in a model: its name, its size, and the axes of the mesh."""
    inputs = [
        ("attention", arch.num_heads * arch.head_size, ("model",)),
        ("feed-forward", arch.feed_forward_size, ("model",)),
        ("hidden", arch.hidden_size, ("fsdp",)),
    ]
    groups = [
        (f"groups of {size} {what} features", count // size, axes)
        for what, count, axes in inputs
        if (size := together(count)) > 1
    ]
    return [
        ("attention heads", arch.num_heads, ("model",)),
        ("key-value heads", getattr(arch, "num_kv_heads", arch.num_heads), ("model",)),
        ("feed-forward features", arch.feed_forward_size, ("model",)),
        ("tokens in its vocabulary", arch.vocab_size, VOCABULARY),
        ("hidden features", arch.hidden_size, ("fsdp",)),
        *groups,
    ]
