"""Flash attention by cuDNN for NVIDIA GPUs; see `flash.Kernel`.

cuDNN can mask by position only if there are as many queries as keys. All rows share the keys of a
prefix. Therefore the queries of all rows attend to these keys without a mask, as if they were one
row. If a window hides some of these keys, XLA computes attention to them.

JAX's public function rounds the log-sum-exps to bfloat16, and its backward pass does not accept a
joint output. This module therefore calls the private operations of that function.

Axis letters: B batch, T tokens, S keys, H query heads, K key-value heads, h head size.
"""

from typing import Any

import jax
import jax.numpy as jnp

from softprompt.backbones import dense_kernel
from softprompt.backbones.flash import Scoring


def forward(
    queries: jax.Array, keys: jax.Array, values: jax.Array, scoring: Scoring
) -> tuple[jax.Array, jax.Array]:
    """Return the output and the log-sum-exps; see `flash.Kernel`."""
    if not _supports(queries, keys, scoring):
        return dense_kernel.forward(queries, keys, values, scoring)
    operations, options = _operations_and_options(queries, keys, scoring)
    arrays = _one_row(queries, keys), _with_rows(keys), _with_rows(values)
    output, sums = operations._dot_product_attention_fwd_p_wrapper.bind(
        *arrays, *_unused(queries, 7), is_training=True, **options
    )
    return output.reshape(queries.shape), _sums_of_rows(sums, queries)


def backward(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    output: jax.Array,
    sums: jax.Array,
    gradient: jax.Array,
    scoring: Scoring,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of queries, keys and values; see `flash.Kernel`."""
    if not _supports(queries, keys, scoring):
        return dense_kernel.backward(queries, keys, values, output, sums, gradient, scoring)
    operations, options = _operations_and_options(queries, keys, scoring)
    of_queries, of_keys, of_values = operations._dot_product_attention_bwd_p_wrapper.bind(
        *(_one_row(queries, keys), _with_rows(keys), _with_rows(values)),
        *_unused(queries, 7),
        _sums_of_one_row(sums, keys),
        *(_one_row(output, keys), _one_row(gradient, keys)),
        **options,
    )
    return (
        of_queries.reshape(queries.shape),
        of_keys.reshape(keys.shape),
        of_values.reshape(values.shape),
    )


def _supports(queries: jax.Array, keys: jax.Array, scoring: Scoring) -> bool:
    return keys.ndim == 4 or scoring.sees_all(queries.shape[1], len(keys))


def _operations_and_options(
    queries: jax.Array, keys: jax.Array, scoring: Scoring
) -> tuple[Any, dict[str, Any]]:
    from jax._src.cudnn import fused_attention_stablehlo as operations

    is_own = keys.ndim == 4
    mask = operations.MaskType.CAUSAL if is_own else operations.MaskType.NO_MASK
    return operations, {
        "scale": scoring.scale,
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # no bias
        "mask_type": mask,
        "layout": operations.AttentionLayout.BTNH.value,
        "sliding_window_length": scoring.window if is_own else None,
    }


def _unused(queries: jax.Array, count: int) -> list[jax.Array]:
    """Return values for the inputs that are not used: bias, lengths, offsets and page tables."""
    return [jnp.zeros(0, queries.dtype)] * count


def _one_row(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Reshape `[B, T, H, h]` to `[1, B·T, H, h]` if all rows share the keys."""
    return queries if keys.ndim == 4 else queries.reshape(1, -1, *queries.shape[2:])


def _with_rows(keys: jax.Array) -> jax.Array:
    return keys if keys.ndim == 4 else keys[None]


def _sums_of_one_row(sums: jax.Array, keys: jax.Array) -> jax.Array:
    """Reshape `[B, H, T]` to `[1, H, B·T]` if all rows share the keys."""
    return sums if keys.ndim == 4 else sums.transpose(1, 0, 2).reshape(1, sums.shape[1], -1)


def _sums_of_rows(sums: jax.Array, queries: jax.Array) -> jax.Array:
    """Undo `_sums_of_one_row`."""
    rows, length, heads, _ = queries.shape
    if len(sums) == rows:
        return sums
    return sums.reshape(heads, rows, length).transpose(1, 0, 2)
