"""Flash attention for TPUs in Pallas; see `flash.Kernel`.

The method is FlashAttention-2 (Dao, arXiv:2307.08691). A program of the grid has one block of
queries of one head, and all keys of that head in the on-chip memory. It goes over the keys block by
block and skips the blocks that no query attends to. Keys that all rows share are read in place.

The scores are computed with the keys on the first axis, `[s, t]`. The log-sum-exps are then rows,
as TPUs store them, and need no transposition.

Axis letters: B batch, T tokens, S keys, H query heads, K key-value heads,
G = H / K query heads per key-value head, h head size; t and s a block of queries and of keys.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from softprompt.backbones.flash import Scoring

_BLOCKS = (512, 256, 128)  # a TPU stores 128 numbers in a row
_MASKED = -1e30  # finite, so that a query without keys gets a finite output
_FOR_SCORES = 16 * 2**20  # bytes of on-chip memory for arrays of one block, such as scores


def forward(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    scoring: Scoring,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Return the output and the log-sum-exps; see `flash.Kernel`.

    Args:
      queries, keys, values, scoring: see `flash.Kernel`.
      interpret: whether to run without a TPU, for tests.
    """
    layout = _Layout.of(queries, keys)
    size = queries.shape[-1]
    output, sums = pl.pallas_call(
        partial(_forward, layout=layout, scoring=scoring),
        grid=layout.grid,
        in_specs=[layout.query_block, layout.all_keys, layout.all_keys],
        out_specs=[layout.query_block, layout.row_block],
        out_shape=[layout.like_queries, layout.like_rows],
        scratch_shapes=[
            pltpu.VMEM((1, layout.block), jnp.float32),
            pltpu.VMEM((1, layout.block), jnp.float32),
            pltpu.VMEM((size, layout.block), jnp.float32),
        ],
        compiler_params=layout.compiler_params,
        interpret=interpret,
    )(layout.queries(queries), layout.keys(keys), layout.keys(values))
    return layout.unpadded(output), sums[:, :, 0, : queries.shape[1]]


def backward(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    output: jax.Array,
    sums: jax.Array,
    gradient: jax.Array,
    scoring: Scoring,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of queries, keys and values; see `flash.Kernel`.

    Args:
      queries, keys, values, output, sums, gradient, scoring: see `flash.Kernel`.
      interpret: whether to run without a TPU, for tests.
    """
    layout = _Layout.of(queries, keys)
    along_output = (output.astype(jnp.float32) * gradient.astype(jnp.float32)).sum(axis=-1)
    of_queries, of_keys, of_values = pl.pallas_call(
        partial(_backward, layout=layout, scoring=scoring),
        grid=layout.grid,
        in_specs=[
            *(layout.query_block, layout.all_keys, layout.all_keys),
            *(layout.row_block, layout.row_block, layout.query_block),
        ],
        out_specs=[layout.query_block, layout.all_keys, layout.all_keys],
        out_shape=[layout.like_queries, layout.like_keys, layout.like_keys],
        scratch_shapes=[pltpu.VMEM((layout.block, queries.shape[-1]), jnp.float32)],
        compiler_params=layout.compiler_params,
        interpret=interpret,
    )(
        *(layout.queries(queries), layout.keys(keys), layout.keys(values)),
        layout.rows(sums, padding=-_MASKED),  # makes the weights of padded queries 0
        *(layout.rows(along_output.transpose(0, 2, 1)), layout.queries(gradient)),
    )
    return (
        layout.unpadded(of_queries),
        layout.unpadded_keys(of_keys).astype(keys.dtype),
        layout.unpadded_keys(of_values).astype(values.dtype),
    )


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How the arrays are laid out and divided into blocks.

    The grid is `(K, B, G, T / t)`. Heads come before tokens. Tokens are padded to whole blocks.
    """

    rows_heads: tuple[int, int, int]  # B, K, G
    num_queries: int
    num_keys: int
    size: int
    shared: bool  # whether all rows share the keys
    dtype: Any

    @classmethod
    def of(cls, queries: jax.Array, keys: jax.Array) -> "_Layout":
        rows, length, heads, size = queries.shape
        num_keys, kv_heads = keys.shape[-3:-1]
        counts = rows, kv_heads, heads // kv_heads
        return cls(counts, length, num_keys, size, keys.ndim == 3, queries.dtype)

    @property
    def block(self) -> int:
        return _block(self.num_queries)

    @property
    def key_block(self) -> int:
        return _block(self.num_keys)

    @property
    def key_blocks(self) -> int:
        return pl.cdiv(self.num_keys, self.key_block)

    @property
    def grid(self) -> tuple[int, int, int, int]:
        rows, kv_heads, groups = self.rows_heads
        return kv_heads, rows, groups, pl.cdiv(self.num_queries, self.block)

    @property
    def query_block(self) -> pl.BlockSpec:
        groups = self.rows_heads[2]
        return pl.BlockSpec(
            (None, None, self.block, self.size), lambda k, b, g, i: (b, k * groups + g, i, 0)
        )

    @property
    def row_block(self) -> pl.BlockSpec:
        groups = self.rows_heads[2]
        return pl.BlockSpec(
            (None, None, 1, self.block), lambda k, b, g, i: (b, k * groups + g, 0, i)
        )

    @property
    def all_keys(self) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, self.key_blocks * self.key_block, self.size),
            lambda k, b, g, i: (0 if self.shared else b, k, 0, 0),
        )

    @property
    def like_queries(self) -> jax.ShapeDtypeStruct:
        rows, kv_heads, groups = self.rows_heads
        shape = rows, kv_heads * groups, self.grid[3] * self.block, self.size
        return jax.ShapeDtypeStruct(shape, self.dtype)

    @property
    def like_rows(self) -> jax.ShapeDtypeStruct:
        rows, heads, length, _ = self.like_queries.shape
        return jax.ShapeDtypeStruct((rows, heads, 1, length), jnp.float32)

    @property
    def like_keys(self) -> jax.ShapeDtypeStruct:  # in float32, because gradients are added up
        rows, kv_heads, _ = self.rows_heads
        length = self.key_blocks * self.key_block
        shape = 1 if self.shared else rows, kv_heads, length, self.size
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    @property
    def compiler_params(self) -> pltpu.CompilerParams:
        # Keys, values and their gradients, each twice: the next ones are read ahead.
        kept = 2 * 2 * self.key_blocks * self.key_block * max(self.size, 128) * (4 + 4)
        return pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"),
            vmem_limit_bytes=kept + _FOR_SCORES,
        )

    def queries(self, array: jax.Array) -> jax.Array:
        """Transpose `[B, T, H, h]` to `[B, H, T, h]` and pad it."""
        return _padded(array.transpose(0, 2, 1, 3), self.block, axis=2)

    def keys(self, array: jax.Array) -> jax.Array:
        """Transpose `[B, S, K, h]` or `[S, K, h]` to `[B or 1, K, S, h]` and pad it."""
        array = array.reshape(-1, *array.shape[-3:])
        return _padded(array.transpose(0, 2, 1, 3), self.key_block, axis=2)

    def rows(self, array: jax.Array, padding: float = 0.0) -> jax.Array:
        """Reshape `[B, H, T]` to `[B, H, 1, T]` and pad it."""
        return _padded(array[:, :, None], self.block, axis=3, value=padding)

    def unpadded(self, array: jax.Array) -> jax.Array:
        """Undo `queries`."""
        return array[:, :, : self.num_queries].transpose(0, 2, 1, 3)

    def unpadded_keys(self, array: jax.Array) -> jax.Array:
        """Undo `keys`."""
        array = array[:, :, : self.num_keys].transpose(0, 2, 1, 3)
        return array[0] if self.shared else array


def _forward(
    queries, keys, values, output, sums, largest, total, mixed, *, layout: _Layout, scoring: Scoring
):
    first = scoring.offset + pl.program_id(3) * layout.block
    largest[...] = jnp.full_like(largest, _MASKED)
    total[...] = jnp.zeros_like(total)
    mixed[...] = jnp.zeros_like(mixed)  # [h, t]

    def add(j, _):
        block = pl.ds(j * layout.key_block, layout.key_block)
        scores = _scores(queries[...], keys[block], first, j, layout, scoring)
        before, now = largest[...], jnp.maximum(largest[...], scores.max(axis=0, keepdims=True))
        weights = jnp.exp(scores - now)
        kept = jnp.exp(before - now)
        largest[...] = now
        total[...] = kept * total[...] + weights.sum(axis=0, keepdims=True)
        added = _dot(values[block], weights.astype(values.dtype), 0, 0)
        mixed[...] = kept * mixed[...] + added

    start, end = _key_blocks(first, layout, scoring)
    jax.lax.fori_loop(start, end, add, None)
    # A query without keys has a sum of 0, or of masked scores.
    safe = jnp.maximum(total[...], 1e-30)
    output[...] = (mixed[...] / safe).T.astype(output.dtype)
    sums[...] = largest[...] + jnp.log(safe)


def _backward(
    queries, keys, values, sums, along_output, gradient,
    of_queries, of_keys, of_values, sum_of_queries, *, layout: _Layout, scoring: Scoring,
):  # fmt: skip
    _, row, group, block_number = map(pl.program_id, range(4))
    first = scoring.offset + block_number * layout.block
    starts = (group == 0) & (block_number == 0)
    if layout.shared:
        starts &= row == 0

    @pl.when(starts)
    def zero():
        of_keys[...] = jnp.zeros_like(of_keys)
        of_values[...] = jnp.zeros_like(of_values)

    sum_of_queries[...] = jnp.zeros_like(sum_of_queries)

    def add(j, _):
        block = pl.ds(j * layout.key_block, layout.key_block)
        scores = _scores(queries[...], keys[block], first, j, layout, scoring)
        weights = jnp.exp(scores - sums[...])
        of_values[block] += _dot(weights.astype(gradient.dtype), gradient[...], 1, 0)
        of_weights = _dot(values[block], gradient[...], 1, 1)
        of_products = weights * (of_weights - along_output[...]) * scoring.slope(scores)
        of_products = of_products.astype(keys.dtype)
        of_keys[block] += _dot(of_products, queries[...], 1, 0)
        sum_of_queries[...] += _dot(of_products, keys[block], 0, 0)

    start, end = _key_blocks(first, layout, scoring)
    jax.lax.fori_loop(start, end, add, None)
    of_queries[...] = sum_of_queries[...].astype(of_queries.dtype)


def _key_blocks(first, layout: _Layout, scoring: Scoring):
    """Return the first key block that some query attends to, and the one after the last.

    Args:
      first: the position of the first query of the block, counted from the first key.
      layout, scoring: of the kernel.
    """
    end = jnp.minimum(layout.key_blocks, pl.cdiv(first + layout.block, layout.key_block))
    if scoring.window is None:
        return 0, end
    start = jax.lax.div(jnp.maximum(first - scoring.window + 1, 0), layout.key_block)
    return start, end


def _scores(queries, keys, first, j, layout: _Layout, scoring: Scoring):
    """Return the scores `[s, t]` of queries `[t, h]` and key block j `[s, h]`."""
    scores = scoring.scores(_dot(keys, queries, 1, 1))
    key = j * layout.key_block + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    distance = first + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) - key
    return jnp.where(scoring.visible(distance) & (key < layout.num_keys), scores, _MASKED)


def _dot(one, other, axis, other_axis):
    """Sum products over an axis of one matrix and an axis of another."""
    numbers = ((axis,), (other_axis,)), ((), ())
    return jax.lax.dot_general(one, other, numbers, preferred_element_type=jnp.float32)


def _block(length: int) -> int:
    """Return the largest size of a block that needs no more padding than the smallest."""
    padded = -length % _BLOCKS[-1] + length
    return next(block for block in _BLOCKS if padded % block == 0)


def _padded(array: jax.Array, block: int, axis: int, value: float = 0.0) -> jax.Array:
    """Pad an axis at its end to whole blocks."""
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, -array.shape[axis] % block)
    return jnp.pad(array, padding, constant_values=value)
