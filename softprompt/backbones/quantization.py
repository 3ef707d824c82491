"""Quantized kernels: what stores them, how they are quantized, and how they are read back.

`int8` has one scale per output channel: a value is `code * scale`, with codes from -127 to 127.

`int4` has a scale and an offset for each group of 32 inputs of an output channel: a value is
`code * scale + offset`, with codes from 0 to 15. Scales and offsets are float16. This is the form
of the 4-bit types of GGUF files (llama.cpp, ggml-quants.c), so that their values are kept. A byte
holds two codes: input 2i in the lower half and input 2i + 1 in the upper half.

Axis letters: G groups of inputs.
"""

import math
from collections.abc import Container, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from softprompt.errors import UserError
from softprompt.experiment.compute_settings import Quantization
from softprompt.parallel.sharding import Together, one_input

GROUP = 32  # inputs
COMPANIONS = ("scale", "group_scale", "group_offset")
"""The names of the parameters that are stored beside a quantized kernel."""

_LARGEST_CODE = 15
_KINDS: dict[Any, Quantization] = {np.dtype(np.int8): "int8", np.dtype(np.uint8): "int4"}


def kind_of(kernel: Any) -> Quantization | None:
    """Return how a kernel is quantized; None for a kernel of floating-point numbers."""
    return _KINDS.get(np.dtype(kernel.dtype))


def kernel_shape(kernel: Any) -> tuple[int, ...]:
    """Return the shape `[..., in, out]` of a kernel, which is stored as `kernel`."""
    *stack, rows, outputs = kernel.shape
    return (*stack, 2 * rows if kind_of(kernel) == "int4" else rows, outputs)


def is_companion(path: tuple[Any, ...], paths: Container[tuple[Any, ...]]) -> bool:
    """Return whether a parameter belongs to a quantized kernel, which is among the paths."""
    return path[-1] in COMPANIONS and (*path[:-1], "kernel") in paths


def group_size(inputs: int) -> int:
    """Return the number of inputs in a group: 32, or less if 32 does not divide the inputs.

    Raises:
      UserError: if the inputs are not even.
    """
    if inputs % 2:
        raise UserError(
            f"compute.quantize int4: the model has a matrix with {inputs} inputs, but their number "
            "must be even; use int8"
        )
    return math.gcd(GROUP, inputs)


def inputs_together(kind: Quantization | None) -> Together:
    """Return the function that says how many inputs of a kernel must be on the same device."""
    return group_size if kind == "int4" else one_input


def parameter_count(arrays: Any) -> int:
    """Return the number of parameters of a backbone, before it was quantized.

    Args:
      arrays: its state, or a part of it.
    """
    flat = {path: array for path, array in nnx.to_flat_state(arrays)}
    return sum(
        math.prod(kernel_shape(array)) if path[-1] == "kernel" else math.prod(array.shape)
        for path, array in flat.items()
        if not is_companion(path, flat)
    )


def stored_arrays(
    kind: Quantization | None, inputs: int, outputs: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of the parameters that store a kernel `[in, out]`, by name."""
    if kind is None:
        return {"kernel": jax.ShapeDtypeStruct((inputs, outputs), jnp.float32)}
    if kind == "int8":
        return {
            "kernel": jax.ShapeDtypeStruct((inputs, outputs), jnp.int8),
            "scale": jax.ShapeDtypeStruct((outputs,), jnp.float32),
        }
    groups = jax.ShapeDtypeStruct((inputs // group_size(inputs), outputs), jnp.float16)
    return {
        "kernel": jax.ShapeDtypeStruct((inputs // 2, outputs), jnp.uint8),
        "group_scale": groups,
        "group_offset": groups,
    }


def quantize(
    kind: Quantization, kernel: np.ndarray, grid: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Quantize a kernel.

    Args:
      kind: `int8` rounds each output channel to integer multiples of its largest absolute
        value / 127. `int4` rounds each group to 16 equidistant values from its smallest to its
        largest one.
      kernel: `[in, out]`.
      grid: for `int4`, the scale and the offset of each group, `[2, G, out]`, if the file stores
        the kernel in this form. The result then has the codes of the file.

    Returns:
      The parameters of `stored_arrays`, by name.

    Raises:
      ValueError: if values are too large for the scales.
    """
    kernel = kernel.astype(np.float32)
    if kind == "int8":
        scale = np.abs(kernel).max(axis=0) / 127
        scale[scale == 0] = 1
        return {"kernel": np.rint(kernel / scale).astype(np.int8), "scale": scale}
    inputs, outputs = kernel.shape
    groups = kernel.reshape(-1, group_size(inputs), outputs)  # [G, 32, out]
    if grid is None:
        smallest = groups.min(axis=1)
        grid = np.stack([(groups.max(axis=1) - smallest) / _LARGEST_CODE, smallest])
    with np.errstate(over="ignore"):
        scale, offset = grid.astype(np.float16)
    if not (np.isfinite(scale).all() and np.isfinite(offset).all()):
        raise ValueError("values are too large for int4, whose limit is 65504")
    step = np.where(scale == 0, 1, scale).astype(np.float32)
    codes = np.rint((groups - offset.astype(np.float32)[:, None]) / step[:, None])
    codes = np.clip(codes, 0, _LARGEST_CODE).astype(np.uint8).reshape(-1, 2, outputs)
    packed = codes[:, 0] | codes[:, 1] << 4
    return {"kernel": packed, "group_scale": scale, "group_offset": offset}


def dequantize(arrays: Mapping[str, jax.Array], dtype: Any) -> jax.Array:
    """Return a kernel `[..., in, out]`.

    Args:
      arrays: the parameters that store it, see `stored_arrays`, with any axes in front.
      dtype: the dtype of the result. The values are computed in float32.
    """
    kernel = arrays["kernel"]
    if kind_of(kernel) == "int8":
        values = kernel.astype(jnp.float32) * arrays["scale"][..., None, :]
        return values.astype(dtype)
    if kind_of(kernel) is None:
        return kernel.astype(dtype)
    scale, offset = (
        arrays[name].astype(jnp.float32)[..., None, :] for name in ("group_scale", "group_offset")
    )
    halves = jnp.array([[0], [4]], jnp.uint8)
    codes = (kernel[..., None, :] >> halves) & _LARGEST_CODE  # [..., in/2, 2, out]
    codes = codes.reshape(*scale.shape[:-2], -1, scale.shape[-1])  # [..., G, 32, out]
    values = codes.astype(jnp.float32) * scale + offset
    return values.astype(dtype).reshape(kernel_shape(kernel))
