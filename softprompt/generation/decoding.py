"""The two compiled programs of generation: read inputs, and write on from them.

Axis letters: B rows, T tokens of an input, N room for new tokens, V vocabulary.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from softprompt.generation.sampling import Sampling, choose


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """How far a batch has been written.

    Attributes:
      count: tokens written, the same for all rows.
      cache: the backbone's; all but the last token have been read into it.
      written: `[B, N]` ids; behind the end of a row they mean nothing.
      lengths: `[B]`, tokens that each row has written, its end-of-text token among them.
      done: `[B]` booleans, whether a row has ended.
      keys: `[B]`, random keys.
      seen: `[B, V]` booleans, tokens read and written, or None.
    """

    count: jax.Array
    cache: Any
    written: jax.Array
    lengths: jax.Array
    done: jax.Array
    keys: jax.Array
    seen: jax.Array | None


@partial(jax.jit, static_argnames=("room", "samples"))
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
    room: int,
    samples: int = 1,
) -> State:
    """Read a batch of inputs, and write the first token.

    Args:
      backbone: any backbone.
      prefix: what stands in front of the rows, or None.
      tokens: `[B / samples, T]` ids, padded on the right.
      lengths: `[B / samples]`, real tokens of each; behind one of 0 nothing is written.
      seeds: `[B]`, of what is random in each row.
      seen: `[B, V]` booleans, tokens that a repetition penalty is for, or None.
      sampling: how a token is chosen.
      ends: ids that end a row.
      room: N, the most tokens to write.
      samples: how often each input is written on from, in rows next to one another.
    """
    hidden, cache = backbone.start(tokens, lengths, prefix, room)
    number = jnp.repeat(jnp.arange(len(tokens)), samples)
    state = State(
        count=jnp.array(0),
        cache=cache if samples == 1 else cache.take(number),
        written=jnp.zeros((len(number), room), jnp.int32),
        lengths=jnp.zeros(len(number), jnp.int32),
        done=lengths[number] == 0,
        keys=jax.vmap(jax.random.key)(seeds),
        seen=seen,
    )
    return _written(state, backbone.logits(hidden)[number], sampling, ends)


@partial(jax.jit, donate_argnames="state")
def continue_decoding(
    backbone, prefix, state: State, sampling: Sampling, ends: jax.Array, until: jax.Array
) -> State:
    """Write until all rows have ended, or have so many tokens.

    Args:
      backbone, sampling, ends: as for `start`.
      prefix: what stands in front of each of the B rows, or None.
      state: is donated.
      until: tokens, at most N.
    """

    def unfinished(state: State):
        return (state.count < until) & ~state.done.all()

    def write(state: State) -> State:
        last = jax.lax.dynamic_index_in_dim(state.written, state.count - 1, 1, keepdims=False)
        hidden, cache = backbone.decode(last, state.cache, prefix)
        state = dataclasses.replace(state, cache=cache)
        return _written(state, backbone.logits(hidden), sampling, ends)

    return jax.lax.while_loop(unfinished, write, state)


def _written(state: State, logits: jax.Array, sampling: Sampling, ends: jax.Array) -> State:
    """The state with one more token, chosen by logits `[B, V]`."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.count)
    token = choose(logits, state.seen, keys, sampling)
    seen = state.seen
    if seen is not None:
        seen = seen.at[jnp.arange(len(token)), token].set(True)
    return dataclasses.replace(
        state,
        count=state.count + 1,
        written=jax.lax.dynamic_update_index_in_dim(state.written, token, state.count, 1),
        lengths=state.lengths + ~state.done,
        done=state.done | jnp.isin(token, ends),
        seen=seen,
    )
