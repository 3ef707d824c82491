"""How the parameters of the backbones are divided over a mesh: one table, by module name."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from softprompt.errors import UserError
from softprompt.parallel.hosts import global_array
from softprompt.parallel.mesh import AXES, ROWS, VOCABULARY, Axes, axis_size, divide

# The mesh axes that divide the inputs and the outputs of a kernel, by the names of its module and
# of the module around it. Arrays that are not in this table are small and stay whole.
_KERNELS: dict[str, tuple[Axes, Axes]] = {
    "attention.query": ("fsdp", "model"),
    "attention.key": ("fsdp", "model"),
    "attention.value": ("fsdp", "model"),
    "attention.output": ("model", "fsdp"),
    "feed_forward.gate": ("fsdp", "model"),
    "feed_forward.up": ("fsdp", "model"),
    "feed_forward.down": ("model", "fsdp"),
}
_KERNELS |= {
    name.replace(module, other): axes
    for name, axes in _KERNELS.items()
    for module, other in (("attention", "cross"), ("feed_forward", "experts"))
    if module in name
}
_MOST_MESHES = 8  # named in an error message


def axes_of(name: str, ndim: int) -> tuple[Axes, ...]:
    """Return the mesh axes that divide each axis of a parameter, or of its optimizer state.

    Args:
      name: the path of the parameter, such as `layers.attention.query.kernel`. Its beginning does
        not matter.
      ndim: the number of axes of the array. Layers and experts are stacked in front.
    """
    *_, parent, module, leaf = ("", "", *name.removesuffix(".value").split("."))
    last: tuple[Axes, ...] = ()
    if (module, leaf) == ("embedding", "table"):
        last = (VOCABULARY, None)
    elif module == "head" or f"{parent}.{module}" in _KERNELS:
        inputs, outputs = _KERNELS.get(f"{parent}.{module}", (None, VOCABULARY))
        last = {"kernel": (inputs, outputs), "scale": (outputs,), "bias": (outputs,)}.get(leaf, ())
    return (*[None] * (ndim - len(last)), *last) if ndim >= len(last) else (None,) * ndim


def shardings(arrays: Any, mesh: Mesh) -> Any:
    """Return the sharding of every array of a pytree, in a pytree of the same structure.

    Args:
      arrays: parameters of a backbone or a method, or optimizer state, with `shape`s.
      mesh: the mesh.
    """

    def sharding(path: Any, array: Any) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*axes_of(_name(path), len(array.shape))))

    return jax.tree_util.tree_map_with_path(sharding, arrays)


def sharding_of(path: Sequence[Any], ndim: int, mesh: Mesh | None) -> NamedSharding | None:
    """Return the sharding of a parameter of a backbone; None without a mesh.

    Args:
      path: the names of the modules around the parameter and its own name.
      ndim: the number of its axes.
      mesh: the mesh, or None.
    """
    if mesh is None:
        return None
    return NamedSharding(mesh, PartitionSpec(*axes_of(".".join(map(str, path)), ndim)))


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
    return jax.tree_util.tree_map_with_path(
        lambda path, array: divide(array, mesh, *axes_of(_name(path), array.ndim)), arrays
    )


def gather_layer(layer: Any, mesh: Mesh | None) -> Any:
    """Gather the weights of one layer that the axis `fsdp` divides.

    Args:
      layer: the module of one layer, inside the scan over layers.
      mesh: the mesh, or None.
    """
    if axis_size(mesh, "fsdp") == 1:
        return layer
    return jax.tree_util.tree_map_with_path(
        lambda path, array: divide(array, mesh, *axes_when_gathered(path, array)), layer
    )


def axes_when_gathered(path: Any, array: jax.Array) -> list[Axes]:
    """Return the mesh axes that divide a weight after `gather_layer`, given its path."""
    axes = axes_of(_name(path), array.ndim)
    return [None if axis == "fsdp" else axis for axis in axes]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def require_divisible(arch: Any, mesh: Mesh | None) -> None:
    """Check that a mesh divides a model.

    Args:
      arch: the architecture of the model.
      mesh: the mesh, or None.

    Raises:
      UserError: names what is not divided, and the meshes of as many devices that would work.
    """
    if mesh is None:
        return
    for what, size, axes in _divided_sizes(arch):
        if size % axis_size(mesh, axes):
            names = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in axes)
            raise UserError(
                f"compute.mesh: {names} does not divide {what} ({size}); {_advice(arch, mesh)}"
            )


def require_rows(rows: int, mesh: Mesh | None) -> None:
    """Check that a mesh divides the rows of a training batch.

    Raises:
      UserError: names the closest batch sizes that work.
    """
    if rows % (parts := axis_size(mesh, ROWS)):
        raise UserError(
            f"training.batch_size {rows}: not divisible by compute.mesh data x fsdp = {parts}; "
            f"use a multiple of {parts}, such as {-(-rows // parts) * parts}"
        )


def meshes_of(arch: Any, devices: int) -> Iterator[dict[str, int]]:
    """Yield the meshes of a number of devices that divide a model, as sizes by axis."""
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    for shape in itertools.product(divisors, repeat=len(AXES) - 1):
        sizes = dict(zip(AXES[1:], shape, strict=True))
        if math.prod(shape) == devices and all(
            size % math.prod(sizes[axis] for axis in axes) == 0
            for _, size, axes in _divided_sizes(arch)
        ):
            yield sizes


def _advice(arch: Any, mesh: Mesh) -> str:
    """Name the meshes with as many devices that divide a model."""
    devices = mesh.size // mesh.shape["trials"]
    listed = [
        "{" + ", ".join(f"{axis}: {size}" for axis, size in sizes.items() if size > 1) + "}"
        for sizes in itertools.islice(meshes_of(arch, devices), _MOST_MESHES)
    ]
    return f"meshes of {devices} devices that work: {', '.join(listed)}"


def _divided_sizes(arch: Any) -> list[tuple[str, int, tuple[str, ...]]]:
    """List what a mesh divides in a model: its name, its size, and the axes of the mesh."""
    return [
        ("the attention heads", arch.num_heads, ("model",)),
        ("the key-value heads", getattr(arch, "num_kv_heads", arch.num_heads), ("model",)),
        ("the feed-forward size", arch.feed_forward_size, ("model",)),
        ("the vocabulary", arch.vocab_size, VOCABULARY),
        ("the hidden size", arch.hidden_size, ("fsdp",)),
    ]
