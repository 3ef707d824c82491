"""Attention over several sets of keys and values with one softmax.

Axis letters: B batch, Z groups of B / Z consecutive rows, T tokens, S keys, H query heads,
K key-value heads, G = H / K query heads per key-value head, h head size.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

MASKED_POSITION = 2**30  # the position of a key that no query can attend to


@dataclasses.dataclass(frozen=True)
class Source:
    """Keys and values to attend to.

    In `visible` and `bias`, B is 1 if all rows share them, and T is 1 if all queries do.

    Attributes:
      keys, values: `[Z, S, K, h]`. The rows of a group share them: Z is B if each row has its own,
        and 1 if all rows share them.
      visible: booleans `[B, T, S]`, the keys that each query attends to; None for all keys.
      bias: `[B, H, T, S]`, added to the scores; None for no bias.
    """

    keys: jax.Array
    values: jax.Array
    visible: jax.Array | None = None
    bias: jax.Array | None = None


def attend(
    queries: jax.Array, sources: Sequence[Source], *, scale: float, softcap: float | None = None
) -> jax.Array:
    """Compute softmax attention over several sources without concatenating them.

    The scores of each source are computed separately and normalized by one common sum. The
    softmax is computed in float32.

    Args:
      queries: `[B, T, H, h]`.
      sources: at least one. Each query must have a visible key in at least one of them.
      scale: the factor of the scores.
      softcap: caps the scores at ±c by c·tanh(score / c) (Gemma 2, arXiv:2408.00118); None for
        no cap.

    Returns:
      `[B, T, H, h]`, in the dtype of the values.
    """
    batch, length, heads, size = queries.shape
    kv_heads = sources[0].keys.shape[-2]
    dtype = sources[0].values.dtype
    # With the key-value heads as the first axis, a shared source needs one matrix product per head.
    queries = (queries.astype(jnp.float32) * scale).astype(queries.dtype)
    queries = queries.reshape(batch, length, kv_heads, -1, size).transpose(2, 0, 1, 3, 4)

    def product(equation: str, x: jax.Array, of_source: jax.Array) -> jax.Array:
        """Multiply `[K, B, T, G, ...]` by keys or values."""
        groups = x.reshape(kv_heads, len(of_source), -1, *x.shape[2:])  # [K, Z, B / Z, T, G, ...]
        result = jnp.einsum(equation, groups, of_source, preferred_element_type=jnp.float32)
        return result.reshape(*x.shape[:-1], -1)

    def scores(source: Source) -> jax.Array:  # [K, B, T, G, S]
        scores = product("kzbtgh,zskh->kzbtgs", queries, source.keys)
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        if source.bias is not None:
            rows, _, *size = source.bias.shape
            bias = source.bias.reshape(rows, kv_heads, -1, *size)  # [B, K, G, T, S]
            scores += bias.transpose(1, 0, 3, 2, 4)
        if source.visible is not None:
            visible = source.visible[None, :, :, None]
            scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
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
        mixed = mixed + product("kzbtgs,zskh->kzbtgh", weights.astype(dtype), source.values)
    mixed = (mixed / total).astype(dtype).transpose(1, 2, 0, 3, 4)  # [B, T, K, G, h]
    return mixed.reshape(batch, length, heads, size)


def causal_mask(queries: jax.Array, keys: jax.Array, window: int | None) -> jax.Array:
    """Return which keys are at the query's own or an earlier position and within its window.

    Args:
      queries: positions `[B, T]`.
      keys: positions `[B, S]`.
      window: the number of positions a query attends to, including its own; None for all.

    Returns:
      Booleans `[B, T, S]`.
    """
    distance = queries[:, :, None] - keys[:, None, :]
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def same_sequence(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Return which keys belong to the same sequence as the query.

    Args:
      queries: segments `[B, T]`: 0 for the input, which all candidates of a row share, 1, 2, … for
        the candidates, -1 for padding.
      keys: segments `[B, S]`.

    Returns:
      Booleans `[B, T, S]`. Only padding attends to padding.
    """
    own, other = queries[:, :, None], keys[:, None, :]
    return (other == 0) | (other == own)
