"""The compiled programs of the bank of prefixes.

The bank is one array on the device that holds the prefixes of many prompts. Its entries are tokens,
and a prefix may use any of them. A new prefix is computed in a slot and then copied to free
entries, so adding a prompt compiles nothing.

Axis letters: P entries of the bank, W padded length of a prefix, T tokens of a chunk, G packs,
M targets of a pack, D hidden, L layers, K key-value heads, h head size.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from softprompt.backbones.batch import Batch, target_log_probabilities
from softprompt.backbones.cache import Cache
from softprompt.backbones.prefix import Prefix
from softprompt.generation.slots import Slots


@partial(jax.jit, donate_argnames="slots")
def place(
    slots: Slots, row: jax.Array, keys: jax.Array, values: jax.Array, length: jax.Array
) -> Slots:
    """Put a prefix into an empty slot.

    Args:
      slots: are donated.
      row: the number of the slot.
      keys, values: `[L, W, K, h]`, padded.
      length: the number of tokens that are not padding.
    """

    def put(array: jax.Array, prefix: jax.Array) -> jax.Array:
        prefix = prefix.astype(array.dtype)[:, None]
        return jax.lax.dynamic_update_slice(array, prefix, (0, row, 0, 0, 0))

    old = slots.cache
    cache = Cache(put(old.keys, keys), put(old.values, values), old.lengths.at[row].set(length))
    active = slots.active.at[row].set(False)
    return dataclasses.replace(slots, cache=cache, active=active)


@partial(jax.jit, donate_argnames="slots")
def read_opening(
    backbone,
    slots: Slots,
    row: jax.Array,
    tokens: jax.Array,
    vectors: jax.Array,
    count: jax.Array,
) -> Slots:
    """Read a chunk of an opening in a slot.

    Args:
      backbone: a causal model.
      slots: are donated.
      row: the number of the slot.
      tokens: `[T]` ids, padded on the right. The ids of virtual tokens are negative.
      vectors: `[T, D]`, the embeddings of the virtual tokens.
      count: the number of tokens that are not padding.
    """
    rows = row[None]
    cache = slots.cache.view(rows)
    _, keys, values = backbone.extend(tokens[None], cache, vectors=vectors[None])
    return dataclasses.replace(slots, cache=slots.cache.write(rows, keys, values, count[None]))


@partial(jax.jit, donate_argnames="bank")
def store(bank: Any, slots: Slots, row: jax.Array, entries: jax.Array) -> Any:
    """Copy the first tokens of a slot into the bank.

    Args:
      bank: keys and values `[L, P, K, h]`; they are donated.
      slots: the slots.
      row: the number of the slot.
      entries: `[W]`, the places in the bank. Numbers beyond the bank are padding.
    """

    def copied(stored: jax.Array, array: jax.Array) -> jax.Array:
        layers, _, _, *rest = array.shape
        shape = layers, 1, len(entries), *rest
        prefix = jax.lax.dynamic_slice(array, (0, row, 0, 0, 0), shape)[:, 0]
        return stored.at[:, entries].set(prefix, mode="drop")

    keys, values = bank
    return copied(keys, slots.cache.keys), copied(values, slots.cache.values)


@jax.jit
def score(backbone, bank: Any, entries: jax.Array, length: jax.Array, batch: Batch) -> jax.Array:
    """Return the log-probability of each target of a batch, `[G, M]`.

    Args:
      backbone: a causal model.
      bank: keys and values `[L, P, K, h]`.
      entries: `[W]`, the places of the prefix that all rows attend to, padded.
      length: the number of entries that are not padding.
      batch: the rows.
    """
    keys, values = (jnp.take(stored, entries, axis=1, mode="clip") for stored in bank)
    span = jnp.stack([jnp.zeros_like(length), length])[None]
    return target_log_probabilities(backbone, Prefix(keys, values, span), batch)
