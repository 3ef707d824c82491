"""Grouped-query attention over a shared prefix and a batch's own tokens.

Axis letters: B batch, T tokens, S keys, P virtual tokens, H query heads,
K key-value heads, G = H / K query heads per key-value head, h head size, L layers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """Keys (after rotary embedding) and values that every row of a batch attends to.

    Both are `[L, P, K, h]`: there is no batch axis, so nothing is copied per row.
    """

    keys: jax.Array
    values: jax.Array

    @property
    def length(self) -> int:
        """Number of virtual tokens, P; a row's own first token has this position."""
        return self.keys.shape[1]


def visibility(positions: jax.Array, segments: jax.Array) -> jax.Array:
    """Which of a row's own tokens each of its tokens may look at.

    A token sees the tokens at its own or an earlier position whose segment is 0 (the
    part of the row that is common to all) or its own. Padding has segment -1, which no
    real token sees.

    Args:
      positions: `[B, T]`, counted from the row's first real token.
      segments: `[B, T]`, -1 for padding, 0 for the common part, and one number from 1
        for each continuation of it.

    Returns:
      `[B, T, T]` booleans, queries before keys.
    """
    query, key = positions[:, :, None], positions[:, None, :]
    own, other = segments[:, :, None], segments[:, None, :]
    return (key <= query) & ((other == 0) | (other == own))


def attend(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    visible: jax.Array,
    prefix_keys: jax.Array | None = None,
    prefix_values: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention over `[prefix | own keys]`, without joining the two in memory.

    Scores against the prefix and against the row's own keys are computed apart, and
    both are divided by one common sum. The softmax is taken in float32.

    Args:
      queries: `[B, T, H, h]`.
      keys, values: `[B, S, K, h]`.
      visible: `[B, T, S]`, the own keys that each query may look at.
      prefix_keys, prefix_values: `[P, K, h]`, seen by every query of every row.

    Returns:
      `[B, T, H, h]`, in the type of `values`.
    """
    batch, length, heads, size = queries.shape
    # The key-value heads stand first, so that the prefix meets all rows in one product a head.
    queries = (queries * size**-0.5).reshape(batch, length, keys.shape[2], -1, size)
    queries = queries.transpose(2, 0, 1, 3, 4)  # [K, B, T, G, h]

    scores = jnp.einsum("kbtgh,bskh->kbtgs", queries, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[None, :, :, None], scores, jnp.finfo(jnp.float32).min)
    largest = scores.max(axis=-1, keepdims=True)
    if prefix_keys is not None:
        prefix_scores = jnp.einsum(
            "kbtgh,pkh->kbtgp", queries, prefix_keys, preferred_element_type=jnp.float32
        )
        largest = jnp.maximum(largest, prefix_scores.max(axis=-1, keepdims=True))
    largest = jax.lax.stop_gradient(largest)

    weights = jnp.exp(scores - largest)
    total = weights.sum(axis=-1, keepdims=True)
    mixed = jnp.einsum("kbtgs,bskh->kbtgh", weights.astype(values.dtype), values)
    if prefix_keys is not None:
        weights = jnp.exp(prefix_scores - largest)
        total += weights.sum(axis=-1, keepdims=True)
        mixed += jnp.einsum("kbtgp,pkh->kbtgh", weights.astype(values.dtype), prefix_values)
    mixed = (mixed / total.astype(values.dtype)).transpose(1, 2, 0, 3, 4)  # [B, T, K, G, h]
    return mixed.reshape(batch, length, heads, size)


def rotary_angles(positions: jax.Array, size: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of rotary position embedding (Su et al. 2021, arXiv:2104.09864).

    Args:
      positions: `[B, T]`.
      size: head size h.
      theta: base of the wavelengths.

    Returns:
      Two float32 arrays `[B, T, 1, h / 2]`.
    """
    frequencies = (theta ** (-np.arange(0, size, 2) / size)).astype(np.float32)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(heads: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn `[B, T, heads, h]` by `rotary_angles`; the first half pairs with the second."""
    cosines, sines = (part.astype(heads.dtype) for part in angles)
    first, second = jnp.split(heads, 2, axis=-1)
    return jnp.concatenate(
        [first * cosines - second * sines, second * cosines + first * sines], axis=-1
    )
