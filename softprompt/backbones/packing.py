"""Sequences packed end to end, and the same sequences as padded rows.

Work on single tokens, such as matrix products and norms, is done on packed tokens, so that no time
is spent on padding. Attention needs rows.

Axis letters: G packs, N tokens of a pack, R rows of a pack, B = G·R rows, T tokens of a row.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where the tokens of each row are in its pack.

    The rows of a pack follow each other without gaps. The pack ends with padding.

    Attributes:
      positions: the position of each token in its row, `[G, N]`.
      row_length: T, at least the number of tokens in each row.
    """

    positions: jax.Array
    row_length: int
    _indices_of_rows: jax.Array  # [G, R·T], indices in the pack; N for padding
    _indices_in_rows: jax.Array  # [G, N], the inverse; R·T for padding

    @classmethod
    def of(cls, lengths: jax.Array, size: int, row_length: int) -> "Packing":
        """Return where the tokens of rows are.

        Args:
          lengths: `[G, R]`, the number of tokens in each row.
          size: N, at least the number of tokens in each pack.
          row_length: T, at least the number of tokens in each row.
        """
        ends = jnp.cumsum(lengths, axis=1)  # [G, R]
        starts = ends - lengths
        tokens, offsets = jnp.arange(size), jnp.arange(row_length)
        of_rows = jnp.where(offsets < lengths[..., None], starts[..., None] + offsets, size)
        rows = jnp.sum(ends[:, None] <= tokens[:, None], axis=-1)  # [G, N], the row of each token
        rows = jnp.minimum(rows, lengths.shape[1] - 1)  # padding belongs to the last row
        positions = tokens - jnp.take_along_axis(starts, rows, axis=1)
        in_rows = rows * row_length + positions
        in_rows = jnp.where(tokens < ends[:, -1:], in_rows, lengths.shape[1] * row_length)
        return cls(positions, row_length, of_rows.reshape(len(lengths), -1), in_rows)

    def to_rows(self, tokens: jax.Array) -> jax.Array:
        """Copy packed tokens `[G, N, ...]` to rows `[B, T, ...]`. Padding becomes zero."""
        rows = _exchange(tokens, self._indices_of_rows, self._indices_in_rows)
        return rows.reshape(-1, self.row_length, *tokens.shape[2:])

    def from_rows(self, rows: jax.Array) -> jax.Array:
        """Copy rows `[B, T, ...]` to packed tokens `[G, N, ...]`. Padding becomes zero."""
        flat = rows.reshape(len(self.positions), -1, *rows.shape[2:])
        return _exchange(flat, self._indices_in_rows, self._indices_of_rows)


class _AsRows:
    """Rows that are not packed, with the methods of `Packing`."""

    def to_rows(self, tokens: jax.Array) -> jax.Array:
        """Return rows `[B, T, ...]` unchanged."""
        return tokens

    def from_rows(self, rows: jax.Array) -> jax.Array:
        """Return rows `[B, T, ...]` unchanged."""
        return rows


AS_ROWS = _AsRows()
Rows = Packing | _AsRows


@jax.custom_vjp
def _exchange(x: jax.Array, indices: jax.Array, inverse: jax.Array) -> jax.Array:
    """Take entries of `x` `[G, M, ...]` at `indices` `[G, N]`; zero where an index is too large.

    The gradient takes entries at `inverse` `[G, M]`. JAX would add each entry to an array of zeros
    instead, which is slow.
    """
    return jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=0))(x, indices)


_exchange.defvjp(
    lambda x, indices, inverse: (_exchange(x, indices, inverse), (indices, inverse)),
    lambda indices, gradient: (_exchange(gradient, *indices[::-1]), None, None),
)
