"""The two compiled programs of generation: prefill and decode.

All state is kept per row. Rows may differ in input length, generated length, sampling settings
and end tokens. A row that has ended does not change while others continue.

Axis letters: B rows, T tokens of an input, N capacity for new tokens, E end tokens,
V vocabulary.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from softprompt.generation.sampling import Sampling, choose
from softprompt.parallel.mesh import whole


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The state of a batch during decoding.

    Attributes:
      cache: the backbone's KV cache. It holds all tokens of a row but the last.
      tokens: `[B, N]`, the generated ids; entries from a row's length on are unused. A row ends
        with -1 if its logits are not finite.
      lengths: `[B]`, the number of generated tokens, including an end token.
      done: `[B]` booleans, whether a row has ended.
      keys: `[B]`, random keys. The n-th token of a row is drawn with the row's key and n.
      sampling: the sampling settings of each row.
      ends: `[B, E]`, the ids that end each row; -1 for unused entries.
      seen: `[B, V]` booleans, the tokens to which a row's repetition penalty applies. None if
        no row has a penalty.
    """

    cache: Any
    tokens: jax.Array
    lengths: jax.Array
    done: jax.Array
    keys: jax.Array
    sampling: Sampling
    ends: jax.Array
    seen: jax.Array | None


@partial(jax.jit, static_argnames=("capacity", "samples"))
def start(
    backbone,
    prefix,
    tokens: jax.Array,
    lengths: jax.Array,
    seeds: jax.Array,
    seen: jax.Array | None,
    sampling: Sampling,
    ends: jax.Array,
    *,
    capacity: int,
    samples: int = 1,
) -> State:
    """Prefill: read a batch of inputs and generate the first token of each row.

    Args:
      backbone: any backbone.
      prefix: what the inputs attend to first, or None.
      tokens: `[B / samples, T]` ids, padded on the right.
      lengths: `[B / samples]`, the number of tokens that are not padding. An input of length
        0 fills up the batch; nothing is generated for it.
      seeds: `[B]`, random seeds.
      seen: `[B, V]` booleans, see `State`.
      sampling: the sampling settings of each of the B rows.
      ends: `[B, E]`, see `State`.
      capacity: N, the maximum number of new tokens.
      samples: the number of consecutive rows that continue each input.
    """
    hidden, cache = backbone.start(tokens, lengths, prefix, capacity)
    rows = len(tokens) * samples
    active = jnp.repeat(lengths > 0, samples)
    state = State(
        cache=cache.repeated(samples),
        tokens=jnp.zeros((rows, capacity), jnp.int32),
        lengths=jnp.zeros(rows, jnp.int32),
        done=~active,
        keys=jax.vmap(jax.random.key)(seeds),
        sampling=sampling,
        ends=ends,
        seen=seen,
    )
    state = _append(state, jnp.repeat(backbone.logits(hidden), samples, axis=0), active)
    return _readable(state, backbone.mesh)


@partial(jax.jit, donate_argnames="state")
def continue_decoding(backbone, prefix, state: State, until: jax.Array) -> State:
    """Decode until each row has ended or has `until` tokens.

    Args:
      backbone: as for `start`.
      prefix: what each of the B rows attends to first, or None.
      state: is donated.
      until: `[B]`, at most N.
    """

    def active(state: State) -> jax.Array:
        return ~state.done & (state.lengths < until)

    def step(state: State) -> State:
        last = jnp.take_along_axis(state.tokens, state.lengths[:, None] - 1, axis=1)[:, 0]
        hidden, cache = backbone.decode(last, state.cache, prefix)
        continues = active(state)
        lengths = jnp.where(continues, cache.lengths, state.cache.lengths)
        state = dataclasses.replace(state, cache=dataclasses.replace(cache, lengths=lengths))
        return _append(state, backbone.logits(hidden), continues)

    state = jax.lax.while_loop(lambda state: active(state).any(), step, state)
    return _readable(state, backbone.mesh)


def _readable(state: State, mesh: Mesh | None) -> State:
    """Return a state whose tokens each process can read; the cache stays divided."""
    tokens, lengths, done = whole((state.tokens, state.lengths, state.done), mesh)
    return dataclasses.replace(state, tokens=tokens, lengths=lengths, done=done)


def _append(state: State, logits: jax.Array, active: jax.Array) -> State:
    """Choose a token from logits `[B, V]` and add it to the rows where `active` `[B]` is True."""
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.lengths)
    token = choose(logits, state.seen, keys, state.sampling)
    rows = jnp.arange(len(token))
    slots = jnp.where(active, state.lengths, state.tokens.shape[1])  # out of range: dropped
    return dataclasses.replace(
        state,
        tokens=state.tokens.at[rows, slots].set(token, mode="drop"),
        lengths=state.lengths + active,
        done=state.done | (active & ((token[:, None] == state.ends).any(axis=1) | (token < 0))),
        seen=None if state.seen is None else state.seen.at[rows, token].max(active),
    )
