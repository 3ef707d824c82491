"""The compiled programs of continuous batching.

A fixed number of rows, the slots, share one KV cache on the device. A request occupies a slot.
Its prefix is copied into the cache, its input is read in chunks (prefill), and then it generates
together with all other slots (decode). The state of a request is kept per row. Therefore slots are
filled and freed one by one, and no shape depends on the requests.

Axis letters: B slots, b slots of one call, N tokens of all chunks of a call, S cache slots of a
row, C steps of a call, M most likely tokens, E end tokens, V vocabulary, P tokens of a prefix, W
its padded length, L layers, K key-value heads, h head size.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from softprompt.backbones.cache import Cache
from softprompt.backbones.packing import Packing
from softprompt.generation.sampling import Sampling, choose

STEPS = 8
"""The maximum number of tokens that one call of `decode` generates in each slot, C."""

TOP = 20
"""The number of most likely tokens whose log-probabilities are returned, M."""

ENDS = 4
"""The maximum number of tokens that can end a row, E."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """The state of all slots.

    Attributes:
      cache: the KV cache. It contains the prefix and all tokens of a row except the last.
      last: `[B]`, the last token of each row.
      generated: `[B]`, the number of generated tokens.
      limits: `[B]`, the number of tokens after which a row stops.
      active: `[B]` booleans, whether a row generates.
      keys: `[B]`, random keys. The n-th token of a row is drawn with the row's key and n.
      sampling: the sampling settings of each row.
      ends: `[B, E]`, the ids that end each row; -1 for unused entries.
      seen: `[B, V]` booleans, the tokens to which a row's repetition penalty applies.
      scored: `[B]` booleans, whether log-probabilities are returned.
    """

    cache: Cache
    last: jax.Array
    generated: jax.Array
    limits: jax.Array
    active: jax.Array
    keys: jax.Array
    sampling: Sampling
    ends: jax.Array
    seen: jax.Array
    scored: jax.Array


class Occupant(NamedTuple):
    """The values that a request sets in its slot: attributes of `Slots` without the axis B.

    `seed` is the seed of the random key.
    """

    limit: Any
    seed: Any
    sampling: Sampling
    ends: Any
    seen: Any
    scored: Any


class Scores(NamedTuple):
    """Log-probabilities of tokens, before temperature and penalties. Zeros if nothing needs them.

    Attributes:
      chosen: `[...]`, the log-probability of each token.
      top: `[..., M]`, the log-probabilities of the most likely tokens, in descending order.
      top_ids: `[..., M]`.
    """

    chosen: jax.Array
    top: jax.Array
    top_ids: jax.Array

    @classmethod
    def zeros(cls, *shape: int) -> "Scores":
        """Return zeros for tokens of a shape."""
        return cls(jnp.zeros(shape), jnp.zeros((*shape, TOP)), jnp.zeros((*shape, TOP), jnp.int32))


class Generated(NamedTuple):
    """The result of one call of `decode`.

    Attributes:
      tokens: `[B, C]` ids. A row ends with -1 if its logits are not finite.
      counts: `[B]`, how many of the C tokens are new.
      active: `[B]` booleans, whether each row continues.
      scores: `[B, C]`.
    """

    tokens: jax.Array
    counts: jax.Array
    active: jax.Array
    scores: Scores


class Chunks(NamedTuple):
    """Chunks of the inputs of several slots, packed end to end.

    Attributes:
      rows: `[b]`, different slots. Numbers beyond the last slot are padding.
      lengths: `[b]`, the number of tokens of each chunk; 0 for padding.
      tokens: `[N]` ids. Padding follows the last chunk.
      following: `[N]`, the id after each token; -1 if it is not scored.
      complete: `[b]` booleans, whether a chunk is the last one of its input.
    """

    rows: Any
    lengths: Any
    tokens: Any
    following: Any
    complete: Any


class Read(NamedTuple):
    """The result of one call of `read`.

    Attributes:
      tokens: `[b]`, the first generated token of each row that is complete; -1 if its logits are
        not finite.
      active: `[b]` booleans, whether each row continues.
      scores: of the first token, `[b]`.
      input_scores: of the tokens that follow each token of the chunks, `[N]`.
    """

    tokens: jax.Array
    active: jax.Array
    scores: Scores
    input_scores: Scores


def empty_slots(backbone, count: int, length: int) -> Slots:
    """Return slots without requests.

    Args:
      backbone: a causal model.
      count: B.
      length: S.
    """
    layers, _, heads, size = backbone.prefix_shape(0)
    dtype = backbone.embedding.table.dtype
    shape = layers, count, length, heads, size

    def full(value: float, dtype: Any) -> jax.Array:
        return jnp.full(count, value, dtype)

    return Slots(
        cache=Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), full(0, jnp.int32)),
        last=full(0, jnp.int32),
        generated=full(0, jnp.int32),
        limits=full(0, jnp.int32),
        active=full(False, bool),
        keys=jax.vmap(jax.random.key)(full(0, jnp.uint32)),
        sampling=Sampling(
            full(0, jnp.float32),
            full(0, jnp.int32),
            full(1, jnp.float32),
            full(0, jnp.float32),
            full(1, jnp.float32),
        ),
        ends=jnp.full((count, ENDS), -1, jnp.int32),
        seen=jnp.zeros((count, backbone.arch.vocab_size), bool),
        scored=full(False, bool),
    )


@partial(jax.jit, donate_argnames="slots")
def occupy(
    slots: Slots, row: jax.Array, bank: Any, entries: jax.Array, length: jax.Array, new: Occupant
) -> Slots:
    """Put a request into a slot: its settings, and its prefix as the first tokens of the row.

    Args:
      slots: are donated.
      row: the number of the slot.
      bank: keys and values `[L, P, K, h]`.
      entries: `[W]`, the places of the prefix in the bank, padded.
      length: the number of entries that are not padding.
      new: the settings.
    """
    cache = slots.cache

    def copied(array: jax.Array, stored: jax.Array) -> jax.Array:
        prefix = jnp.take(stored, entries, axis=1, mode="clip")[:, None]
        return jax.lax.dynamic_update_slice(array, prefix, (0, row, 0, 0, 0))

    keys, values = bank
    cache = Cache(
        copied(cache.keys, keys), copied(cache.values, values), cache.lengths.at[row].set(length)
    )
    return dataclasses.replace(
        slots,
        cache=cache,
        generated=slots.generated.at[row].set(0),
        limits=slots.limits.at[row].set(new.limit),
        active=slots.active.at[row].set(False),
        keys=slots.keys.at[row].set(jax.random.key(new.seed)),
        sampling=jax.tree.map(lambda a, value: a.at[row].set(value), slots.sampling, new.sampling),
        ends=slots.ends.at[row].set(new.ends),
        seen=slots.seen.at[row].set(new.seen),
        scored=slots.scored.at[row].set(new.scored),
    )


@partial(jax.jit, donate_argnames="slots", static_argnames=("longest", "attended"))
def read(
    backbone, slots: Slots, chunks: Chunks, *, longest: int, attended: int
) -> tuple[Slots, Read]:
    """Read a chunk of the input of some rows. Rows that are complete generate their first token.

    Args:
      backbone: a causal model.
      slots: are donated.
      chunks: the chunks.
      longest: at least the number of tokens of each chunk.
      attended: at least the number of tokens that each row has read before.
    """
    rows, lengths, tokens = chunks.rows, chunks.lengths, chunks.tokens[None]
    packing = Packing.of(lengths[None], tokens.shape[1], longest)
    view = slots.cache.view(rows, attended)
    hidden, keys, values = backbone.extend(tokens, view, rows=packing)
    slots = dataclasses.replace(slots, cache=slots.cache.write(rows, keys, values, lengths))
    last = hidden[0].at[jnp.cumsum(lengths) - 1].get(mode="clip")
    slots, chosen, scores = _advance(slots, backbone.logits(last), rows, chunks.complete)

    def score() -> Scores:
        return scores_of(backbone.logits(hidden[0]), chunks.following)

    wanted = (chunks.following >= 0).any()
    input_scores = jax.lax.cond(wanted, score, lambda: Scores.zeros(tokens.shape[1]))
    active = slots.active.at[rows].get(mode="clip")
    return slots, Read(chosen, active, scores, input_scores)


@partial(jax.jit, donate_argnames="slots", static_argnames=("rows", "attended"))
def decode(
    backbone, slots: Slots, steps: jax.Array, *, rows: int, attended: int
) -> tuple[Slots, Generated]:
    """Generate tokens in all active slots.

    Args:
      backbone: a causal model.
      slots: are donated.
      steps: the number of tokens in each row, at most `STEPS`.
      rows: b. All active slots are among the first b.
      attended: at least the number of tokens of each active row after these steps.
    """
    numbers = jnp.arange(rows)
    before = slots.generated

    def step(carry):
        number, slots, tokens, scores = carry
        active = slots.active[:rows]
        last = slots.last[:rows, None]
        hidden, keys, values = backbone.extend(last, slots.cache.view(rows, attended))
        cache = slots.cache.write(numbers, keys, values, active.astype(jnp.int32))
        slots = dataclasses.replace(slots, cache=cache)
        slots, chosen, found = _advance(slots, backbone.logits(hidden[:, 0]), numbers, active)

        def put(array: jax.Array, value: jax.Array) -> jax.Array:
            return array.at[:rows, number].set(value)

        return number + 1, slots, put(tokens, chosen), jax.tree.map(put, scores, found)

    def more(carry):
        number, slots, *_ = carry
        return (number < steps) & slots.active.any()

    count = len(slots.active)
    start = 0, slots, jnp.zeros((count, STEPS), jnp.int32), Scores.zeros(count, STEPS)
    _, slots, tokens, scores = jax.lax.while_loop(more, step, start)
    return slots, Generated(tokens, slots.generated - before, slots.active, scores)


def _advance(
    slots: Slots, logits: jax.Array, rows: jax.Array, advancing: jax.Array
) -> tuple[Slots, jax.Array, Scores]:
    """Choose the next token of some rows from logits `[b, V]`, and its scores.

    Args:
      slots: the slots.
      logits: `[b, V]`.
      rows: `[b]`.
      advancing: `[b]` booleans, the rows to which the token is added.
    """

    def of(array):
        return array.at[rows].get(mode="clip")

    generated = of(slots.generated)
    keys = jax.vmap(jax.random.fold_in)(of(slots.keys), generated)
    seen, sampling = of(slots.seen), jax.tree.map(of, slots.sampling)
    tokens = choose(logits, seen, keys, sampling)
    wanted = (of(slots.scored) & advancing).any()
    scores = jax.lax.cond(
        wanted, lambda: scores_of(logits, tokens), lambda: Scores.zeros(len(tokens))
    )
    ended = (tokens[:, None] == of(slots.ends)).any(axis=1) | (tokens < 0)
    goes_on = advancing & ~ended & (generated + 1 < of(slots.limits))
    places = jnp.where(advancing, rows, len(slots.last))  # out of range: dropped
    slots = dataclasses.replace(
        slots,
        last=slots.last.at[places].set(tokens, mode="drop"),
        generated=slots.generated.at[places].add(1, mode="drop"),
        active=slots.active.at[places].set(goes_on, mode="drop"),
        seen=slots.seen.at[places, tokens].set(True, mode="drop"),
    )
    return slots, tokens, scores


def scores_of(logits: jax.Array, tokens: jax.Array) -> Scores:
    """Return the scores of tokens `[...]` under logits `[..., V]`."""
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, jnp.maximum(tokens, 0)[..., None], axis=-1) - total
    top, ids = jax.lax.top_k(logits, TOP)
    return Scores(chosen[..., 0], top - total, ids.astype(jnp.int32))


@partial(jax.jit, donate_argnames="slots")
def release(slots: Slots, rows: jax.Array) -> Slots:
    """Stop generating in some slots, given as booleans `[B]`."""
    return dataclasses.replace(slots, active=slots.active & ~rows)
