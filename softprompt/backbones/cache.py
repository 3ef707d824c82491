"""The KV caches of generation.

Axis letters: B batch, b selected rows, P tokens of a prefix, S slots of a cache, T tokens of an
input, K key-value heads, H heads, h head size, L layers.
"""

import dataclasses

import jax
import jax.numpy as jnp

from softprompt.backbones.attention import MASKED_POSITION


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The KV cache of a causal decoder; it does not include the prefix.

    A token's slot is its position in the row. Rows may differ in length.

    Attributes:
      keys, values: `[L, B, S, K, h]`.
      lengths: `[B]`, the number of tokens that each row has read, and its next free slot.
    """

    keys: jax.Array
    values: jax.Array
    lengths: jax.Array

    def __repr__(self) -> str:
        layers, rows, slots = self.keys.shape[:3]
        return f"Cache({layers} layers, {rows} rows, {slots} slots)"

    def append(self, keys: jax.Array, values: jax.Array) -> "Cache":
        """Add one token to each row, with keys and values `[L, B, 1, K, h]`."""
        return dataclasses.replace(
            self,
            keys=_append(self.keys, keys, self.lengths),
            values=_append(self.values, values, self.lengths),
            lengths=self.lengths + 1,
        )

    def view(self, rows: int | jax.Array | None = None, slots: int | None = None) -> "CacheView":
        """Return the first slots of some rows. By default, return all slots of all rows.

        Args:
          rows: the indices of the rows, `[b]`. A number means the first rows. An index beyond the
            last row means the last row.
          slots: at least the number of tokens of each row.
        """
        _, all_rows, all_slots, _, _ = self.keys.shape
        return CacheView(self, all_rows if rows is None else rows, slots or all_slots)

    def write(
        self, rows: jax.Array, keys: jax.Array, values: jax.Array, counts: jax.Array
    ) -> "Cache":
        """Add tokens to some rows.

        Args:
          rows: `[b]`, different rows. Nothing is written for indices beyond the last row.
          keys, values: `[L, b, T, K, h]`.
          counts: `[b]`, how many of the T tokens to add to each row.
        """
        places = jnp.arange(keys.shape[2])[None]
        slots = self.lengths.at[rows].get(mode="clip")[:, None] + places
        slots = jnp.where(places < counts[:, None], slots, self.keys.shape[2])  # dropped
        at = (slice(None), rows[:, None], slots)
        return Cache(
            self.keys.at[at].set(keys, mode="drop"),
            self.values.at[at].set(values, mode="drop"),
            self.lengths.at[rows].add(counts, mode="drop"),
        )

    def repeated(self, count: int) -> "Cache":
        """Return a cache in which each row is repeated `count` times."""
        return Cache(
            jnp.repeat(self.keys, count, axis=1),
            jnp.repeat(self.values, count, axis=1),
            jnp.repeat(self.lengths, count),
        )

    def take(self, rows: jax.Array) -> "Cache":
        """Take rows of each group, see `take_rows`."""
        return Cache(
            take_rows(self.keys, rows, axis=1),
            take_rows(self.values, rows, axis=1),
            take_rows(self.lengths, rows),
        )


@dataclasses.dataclass(frozen=True)
class CacheView:
    """The first slots of some rows of a cache. It is not a copy.

    Attributes:
      cache: the cache.
      rows: the indices of the rows, `[B]`. A number means the first rows.
      slots: S.
    """

    cache: Cache
    rows: int | jax.Array
    slots: int

    @property
    def lengths(self) -> jax.Array:
        """The number of tokens that each row has read, `[B]`."""
        if isinstance(self.rows, int):
            return self.cache.lengths[: self.rows]
        return self.cache.lengths.at[self.rows].get(mode="clip")

    @property
    def positions(self) -> jax.Array:
        """The position of the token in each slot, `[B, S]`; `MASKED_POSITION` if it is free."""
        slots = jnp.arange(self.slots)[None]
        return jnp.where(slots < self.lengths[:, None], slots, MASKED_POSITION)

    def of_layer(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the keys and values of a layer, `[B, S, K, h]`."""
        return self._of_layer(self.cache.keys, layer), self._of_layer(self.cache.values, layer)

    def _of_layer(self, array: jax.Array, layer: jax.Array) -> jax.Array:
        def block(start: int | jax.Array, count: int) -> jax.Array:
            shape = 1, count, self.slots, *array.shape[3:]
            return jax.lax.dynamic_slice(array, (layer, start, 0, 0, 0), shape)[0]

        if isinstance(self.rows, int):
            return block(0, self.rows)
        return jax.vmap(lambda row: block(row, 1)[0])(self.rows)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class T5Cache:
    """The KV cache of T5's decoder: its own tokens and the encoded input.

    Attributes:
      keys, values: of the decoder's own tokens, `[L, B, S, H, h]`.
      lengths: `[B]`, the number of the decoder's tokens in each row, and its next free slot.
      input_keys, input_values: of the encoded inputs, `[L, B, P + T, H, h]`.
      input_mask: `[B, P + T]` booleans, False for padding.
    """

    keys: jax.Array
    values: jax.Array
    lengths: jax.Array
    input_keys: jax.Array
    input_values: jax.Array
    input_mask: jax.Array

    def __repr__(self) -> str:
        layers, rows, slots = self.keys.shape[:3]
        inputs = self.input_mask.shape[1]
        return f"T5Cache({layers} layers, {rows} rows, {slots} slots, {inputs} input tokens)"

    def append(self, keys: jax.Array, values: jax.Array) -> "T5Cache":
        """Add one token to each row, with keys and values `[L, B, 1, H, h]`."""
        return dataclasses.replace(
            self,
            keys=_append(self.keys, keys, self.lengths),
            values=_append(self.values, values, self.lengths),
            lengths=self.lengths + 1,
        )

    def repeated(self, count: int) -> "T5Cache":
        """Return a cache in which each row is repeated `count` times."""
        return T5Cache(
            jnp.repeat(self.keys, count, axis=1),
            jnp.repeat(self.values, count, axis=1),
            jnp.repeat(self.lengths, count),
            jnp.repeat(self.input_keys, count, axis=1),
            jnp.repeat(self.input_values, count, axis=1),
            jnp.repeat(self.input_mask, count, axis=0),
        )

    def take(self, rows: jax.Array) -> "T5Cache":
        """Take rows of each group, see `take_rows`."""
        return T5Cache(
            take_rows(self.keys, rows, axis=1),
            take_rows(self.values, rows, axis=1),
            take_rows(self.lengths, rows),
            take_rows(self.input_keys, rows, axis=1),
            take_rows(self.input_values, rows, axis=1),
            take_rows(self.input_mask, rows),
        )


def take_rows(array: jax.Array, rows: jax.Array, axis: int = 0) -> jax.Array:
    """Take rows of each of B groups of consecutive rows, such as the beams of each input.

    On a mesh, the rows of a group are on one device, and no other device needs them.

    Args:
      array: its axis `axis` has B groups of n rows.
      rows: `[B, n]`, the indices of the rows to take, counted from the first row of the group.
      axis: the axis of the rows.
    """
    grouped = array.reshape(*array.shape[:axis], *rows.shape, *array.shape[axis + 1 :])
    after = range(axis + 2, grouped.ndim)
    indices = jnp.expand_dims(rows, (*range(axis), *after))
    return jnp.take_along_axis(grouped, indices, axis=axis + 1).reshape(array.shape)


_SLOT_OF_EACH_ROW = jax.lax.ScatterDimensionNumbers(
    update_window_dims=(0, 2, 3),
    inserted_window_dims=(2,),
    scatter_dims_to_operand_dims=(2,),
    operand_batching_dims=(1,),
    scatter_indices_batching_dims=(0,),
)


def _append(cached: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
    """Write `[L, B, 1, K, h]` into `[L, B, S, K, h]`, each row at its own slot.

    XLA does this in place inside a loop, and on a mesh each device writes its own rows. (A vmapped
    `dynamic_update_slice` would copy, and `cached.at[:, rows, slots]` would gather new rows.)
    """
    return jax.lax.scatter(
        cached, slots[:, None], new[:, :, 0], _SLOT_OF_EACH_ROW, mode="drop", unique_indices=True
    )
