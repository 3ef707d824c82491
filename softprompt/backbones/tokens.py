"""Groups of tokens that attend, or are attended to, in a causal model.

A prefix, an opening and a cache come before the tokens of a row.

Axis letters: B batch, T tokens of a row, S keys, G packs, N tokens of a pack, M targets of a pack,
P tokens of an opening.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from softprompt.backbones.attention import causal_mask, same_sequence
from softprompt.backbones.batch import Batch
from softprompt.backbones.cache import CacheView
from softprompt.backbones.opening import Opening
from softprompt.backbones.prefix import Prefix, positions_within

Take = Callable[[jax.Array], jax.Array]


def same(tokens: jax.Array) -> jax.Array:
    """Return tokens unchanged."""
    return tokens


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A group of tokens, as rows.

    Attributes:
      positions: `[B or 1, T]`, counted from the first token of the group.
      before: the number of tokens before the group, a number or `[B or 1, 1]`.
      segments: `[B, T]`, see `same_sequence`; None if each row is one sequence.
      is_whole: whether later groups attend to all of these tokens, if there is no window.
      to_rows: takes the tokens as rows `[B, T, ...]` from all tokens of a layer `[G, P + N, ...]`.
      from_rows: the inverse.
    """

    positions: jax.Array
    before: int | jax.Array = 0
    segments: jax.Array | None = None
    is_whole: bool = False
    to_rows: Take = same
    from_rows: Take = same

    def mask(self, keys: "Tokens", window: int | None) -> jax.Array:
        """Return which keys each token attends to, booleans `[B or 1, T, S]`.

        Args:
          keys: the tokens of the keys.
          window: the number of positions a token attends to, including its own; None for all.
        """
        shift = 0 if self.before is keys.before else self.before - keys.before
        mask = causal_mask(self.positions + shift, keys.positions, window)
        if self.segments is None or keys.segments is None:
            return mask
        return mask & same_sequence(self.segments, keys.segments)


def tokens_before(
    prefix: Prefix | None, opening: Opening | None, cache: CacheView | None = None
) -> tuple[dict[str, Tokens], int | jax.Array]:
    """Return the groups of tokens before the rows, and the number of their tokens.

    Args:
      prefix: the prefix, or None.
      opening: comes after the prefix and before the rows of each pack.
      cache: the tokens of each row that have been read.

    Returns:
      The groups by name, and a number or `[B or 1, 1]`, in which the cache does not count.
    """
    groups: dict[str, Tokens] = {}
    before: int | jax.Array = 0
    if prefix is not None:
        positions, before = positions_within(prefix.spans, prefix.length)
        groups["prefix"] = Tokens(positions, is_whole=prefix.spans is None)
    if opening is not None:
        size, is_whole = opening.length, opening.spans is None
        positions, length = positions_within(opening.spans, size)
        groups["opening"] = Tokens(
            positions, before, is_whole=is_whole, to_rows=lambda packed: packed[:, :size]
        )
        before = before + length
    if cache is not None:
        groups["cache"] = Tokens(cache.positions, before)
    return groups, before


def tokens_of_batch(batch: Batch, before: int | jax.Array, opening: int) -> Tokens:
    """Return the tokens of a batch.

    Args:
      batch: the batch.
      before: see `Tokens`.
      opening: P, the number of tokens before the rows of each pack.
    """
    rows = batch.rows
    positions, segments = jnp.arange(rows.row_length)[None], None
    if batch.positions is not None:
        positions = rows.to_rows(batch.positions)
        segments = rows.to_rows(batch.segments + 1) - 1

    def to_rows(packed: jax.Array) -> jax.Array:
        return rows.to_rows(packed[:, opening:])

    return Tokens(positions, before, segments, to_rows=to_rows, from_rows=rows.from_rows)


def tokens_of_targets(batch: Batch, before: int | jax.Array, opening: int) -> tuple[Tokens, Take]:
    """Return the tokens from which the targets of a batch are predicted.

    Args:
      batch, before, opening: as in `tokens_of_batch`.

    Returns:
      The tokens, and a function that takes them from the tokens of a layer: `[G, P + N, ...]` to
      `[G, M, ...]`. This is what their `to_rows` takes.
    """

    def take(packed: jax.Array, skipped: int) -> jax.Array:
        shape = *batch.targets.shape, *[1] * (packed.ndim - 2)
        return jnp.take_along_axis(packed, batch.target_indices.reshape(shape) + skipped, axis=1)

    rows, segments = batch.target_rows, None
    positions = take(batch.rows.positions if batch.positions is None else batch.positions, 0)
    if batch.segments is not None:
        segments = rows.to_rows(take(batch.segments, 0) + 1) - 1
    tokens = Tokens(
        rows.to_rows(positions), before, segments, to_rows=rows.to_rows, from_rows=rows.from_rows
    )
    return tokens, lambda packed: take(packed, opening)
