"""Attention over what comes before and a batch's own tokens, under one softmax.

Axis letters: B batch, T tokens, S keys, H query heads, K key-value heads,
G = H / K query heads per key-value head, h head size.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

NOWHERE = 2**30  # position of a key that no query may see


@dataclasses.dataclass(frozen=True)
class Source:
    """Keys and values to attend to.

    Attributes:
      keys, values: `[B, S, K, h]`, or `[S, K, h]` where all rows share them.
      visible: `[B, T, S]` booleans, B being 1 if it is the same for all rows: which keys
        each query may look at. None: all.
      bias: `[B, H, T, S]`, B being 1 if it is the same for all rows; added to the scores.
    """

    keys: jax.Array
    values: jax.Array
    visible: jax.Array | None = None
    bias: jax.Array | None = None


def attend(
    queries: jax.Array, sources: Sequence[Source], *, scale: float, softcap: float | None = None
) -> jax.Array:
    """Softmax attention over several sources, without joining them in memory.

    Scores against each source are computed apart, and all are divided by one common sum.
    The softmax is taken in float32.

    Args:
      queries: `[B, T, H, h]`.
      sources: at least one; each query must see a key in one of them.
      scale: factor of the scores.
      softcap: bound c of the scores, by c·tanh(score / c) (Gemma 2, arXiv:2408.00118).

    Returns:
      `[B, T, H, h]`, in the type of the values.
    """
    batch, length, heads, size = queries.shape
    kv_heads = sources[0].keys.shape[-2]
    kind = sources[0].values.dtype
    # The key-value heads stand first, so that a shared source meets all rows in one product a head.
    queries = (queries.astype(jnp.float32) * scale).astype(queries.dtype)
    queries = queries.reshape(batch, length, kv_heads, -1, size).transpose(2, 0, 1, 3, 4)

    def scores(source: Source) -> jax.Array:  # [K, B, T, G, S]
        keys = "skh" if source.keys.ndim == 3 else "bskh"
        scores = jnp.einsum(
            f"kbtgh,{keys}->kbtgs", queries, source.keys, preferred_element_type=jnp.float32
        )
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        if source.bias is not None:
            rows, _, *size = source.bias.shape
            bias = source.bias.reshape(rows, kv_heads, -1, *size)  # [B, K, G, T, S]
            scores += bias.transpose(1, 0, 3, 2, 4)
        if source.visible is not None:
            seen = source.visible[None, :, :, None]
            scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
        return scores

    all_scores = [scores(source) for source in sources]
    largest = all_scores[0].max(axis=-1, keepdims=True)
    for part in all_scores[1:]:
        largest = jnp.maximum(largest, part.max(axis=-1, keepdims=True))
    largest = jax.lax.stop_gradient(largest)

    total = mixed = jnp.zeros(())
    for part, source in zip(all_scores, sources, strict=True):
        weights = jnp.exp(part - largest)
        total = total + weights.sum(axis=-1, keepdims=True)
        values = "skh" if source.values.ndim == 3 else "bskh"
        mixed = mixed + jnp.einsum(
            f"kbtgs,{values}->kbtgh",
            weights.astype(kind),
            source.values,
            preferred_element_type=jnp.float32,
        )
    mixed = (mixed / total).astype(kind).transpose(1, 2, 0, 3, 4)  # [B, T, K, G, h]
    return mixed.reshape(batch, length, heads, size)


def causal_mask(queries: jax.Array, keys: jax.Array, window: int | None) -> jax.Array:
    """Whether a key is at a query's own or an earlier position, and within its window.

    Args:
      queries: positions `[B, T]`.
      keys: positions `[B, S]`.
      window: number of positions a query sees, its own included; None: all.

    Returns:
      `[B, T, S]` booleans.
    """
    distance = queries[:, :, None] - keys[:, None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def same_sequence(segments: jax.Array) -> jax.Array:
    """Whether two tokens of a row belong to one sequence.

    Args:
      segments: `[B, T]`: 0 for the part of a row that is common to all its continuations,
        a number from 1 for each continuation, -1 for padding.

    Returns:
      `[B, T, T]` booleans, queries before keys; no token sees padding but padding itself.
    """
    own, other = segments[:, :, None], segments[:, None, :]
    return (other == 0) | (other == own)
