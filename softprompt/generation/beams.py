"""Beam search, as stock transformers computes it (`generation/utils.py`, `_beam_search`).

Each input has K running beams, and K finished texts, which better ones displace. A step
looks at the 2K best continuations of the running beams; those of the first K that end are
finished, and the best K that do not end run on.

Axis letters: B inputs, K beams, T tokens of an input, N room for new tokens, V vocabulary.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from softprompt.generation.sampling import Sampling, penalised

_NEVER = -jnp.inf  # the score of what shall not be chosen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts of one state of the search.

    Attributes:
      written: `[B, K, N]` ids.
      lengths: `[B, K]`, tokens of each, the end-of-text token among them.
      scores: `[B, K]`: of running ones the log-probability, of finished ones divided by
        their length to the power of the length penalty.
    """

    written: jax.Array
    lengths: jax.Array
    scores: jax.Array

    def best(self, count: int) -> tuple["Texts", jax.Array]:
        """The `count` of highest score, and their numbers `[B, count]`."""
        _, numbers = jax.lax.top_k(self.scores, count)
        return jax.tree.map(partial(_pick, numbers=numbers), self), numbers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """How far the search has come.

    Attributes:
      count: tokens that each running beam has.
      cache: of `B * K` rows; all but the last tokens have been read into it.
      running, finished: the beams, and the texts.
      open: `[B]` booleans, whether a better text may still be found.
      seen: `[B * K, V]` booleans, tokens read and written, or None.
    """

    count: jax.Array
    cache: Any
    running: Texts
    finished: Texts
    open: jax.Array
    seen: jax.Array | None


@partial(jax.jit, static_argnames=("room", "beams"))
def start(
    backbone, prefix, tokens, lengths, seen, sampling, ends, length_penalty, until, *, room, beams
) -> State:
    """Read a batch of inputs, and write the first tokens.

    Args:
      backbone, sampling, ends: as for `decoding.start`; the sampling's penalty alone counts.
      prefix: what stands in front of the B rows, or None.
      tokens: `[B, T]` ids, padded on the right.
      lengths: `[B]`, real tokens of each; behind one of 0 nothing is searched.
      seen: `[B * K, V]` booleans, tokens that a repetition penalty is for, or None.
      length_penalty: see `Texts.scores`.
      until: the most tokens of a text, at most N.
      room: N.
      beams: K.
    """
    hidden, cache = backbone.start(tokens, lengths, prefix, room)
    rows = len(tokens)
    number = jnp.repeat(jnp.arange(rows), beams)
    nothing = Texts(
        jnp.zeros((rows, beams, room), jnp.int32),
        jnp.zeros((rows, beams), jnp.int32),
        jnp.full((rows, beams), _NEVER),
    )
    first = jnp.zeros_like(nothing.scores).at[:, 1:].set(_NEVER)  # one beam, so none stands twice
    state = State(
        count=jnp.array(0),
        cache=cache.take(number),
        running=dataclasses.replace(nothing, scores=first),
        finished=nothing,
        open=lengths > 0,
        seen=seen,
    )
    return _searched(state, backbone.logits(hidden)[number], sampling, ends, length_penalty, until)


@partial(jax.jit, donate_argnames="state")
def search_on(backbone, prefix, state: State, sampling, ends, length_penalty, until) -> State:
    """Search until no better text can be found, or all have `until` tokens.

    Args:
      prefix: what stands in front of each of the `B * K` rows, or None.
      state: is donated.
      backbone, sampling, ends, length_penalty, until: as for `start`.
    """

    def unfinished(state: State):
        return (state.count < until) & state.open.any()

    def search(state: State) -> State:
        written = state.running.written.reshape(-1, state.running.written.shape[-1])
        last = jax.lax.dynamic_index_in_dim(written, state.count - 1, 1, keepdims=False)
        hidden, cache = backbone.decode(last, state.cache, prefix)
        state = dataclasses.replace(state, cache=cache)
        return _searched(state, backbone.logits(hidden), sampling, ends, length_penalty, until)

    return jax.lax.while_loop(unfinished, search, state)


def _searched(state: State, logits, sampling: Sampling, ends, length_penalty, until) -> State:
    """The state with one more token of each beam, from logits `[B * K, V]`."""
    running, finished = state.running, state.finished
    rows, beams, _ = running.written.shape
    log_probabilities = jax.nn.log_softmax(logits)
    if state.seen is not None:
        log_probabilities = penalised(log_probabilities, state.seen, sampling.repetition_penalty)
    total = log_probabilities.reshape(rows, beams, -1) + running.scores[..., None]
    each = min(2 * beams, total.shape[-1])
    of_beam, token = jax.lax.top_k(total, each)  # [B, K, 2K]
    scores, place = jax.lax.top_k(of_beam.reshape(rows, -1), 2 * beams)  # [B, 2K]
    parent = place // each
    token = jnp.take_along_axis(token.reshape(rows, -1), place, axis=1)

    count = state.count + 1
    written = jax.lax.dynamic_update_index_in_dim(
        _pick(running.written, parent), token, state.count, 2
    )
    next_texts = Texts(written, jnp.full_like(parent, count), scores)  # [B, 2K]
    ended = jnp.isin(token, ends) | (count == until)

    may_finish = ended & (jnp.arange(2 * beams) < beams)[None] & state.open[:, None]
    final = jnp.where(may_finish, scores / count**length_penalty, _NEVER)
    candidates = dataclasses.replace(next_texts, scores=final)
    joined = jax.tree.map(lambda *each: jnp.concatenate(each, axis=1), finished, candidates)
    finished, _ = joined.best(beams)

    kept = dataclasses.replace(next_texts, scores=jnp.where(ended, _NEVER, scores))
    running, numbers = kept.best(beams)
    parent = jnp.take_along_axis(parent, numbers, axis=1)  # [B, K]
    flat = (jnp.arange(rows)[:, None] * beams + parent).reshape(-1)
    seen = state.seen
    if seen is not None:
        last = jnp.take_along_axis(token, numbers, axis=1).reshape(-1)
        seen = seen[flat].at[jnp.arange(len(flat)), last].set(True)

    best_to_come = running.scores[:, 0] / count**length_penalty
    worst = finished.scores.min(axis=1)  # `_NEVER` while there are fewer than K
    return State(
        count=count,
        cache=state.cache.take(flat),
        running=running,
        finished=finished,
        open=state.open & (best_to_come > worst),
        seen=seen,
    )


def _pick(array: jax.Array, numbers: jax.Array) -> jax.Array:
    """Entries `[B, n, ...]` of `[B, m, ...]` by their numbers `[B, n]`."""
    return jax.vmap(lambda one, chosen: one[chosen])(array, numbers)
