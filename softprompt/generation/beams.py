"""Beam search, with the results of stock transformers (`generation/utils.py`, `_beam_search`).

Each input has K running beams and keeps its K best finished texts. A step looks at the 2K best
continuations of the running beams. Those among the first K that end are finished; the best K
that do not end stay running. All beams of a batch advance together, so the number of tokens
and the length penalty are scalars here.

Axis letters: B inputs, K beams, T tokens of an input, N capacity for new tokens, E end tokens,
V vocabulary.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from softprompt.backbones.cache import take_rows
from softprompt.generation.sampling import penalize
from softprompt.parallel.mesh import on_own_rows, whole

_EXCLUDED = -jnp.inf  # the score of a text that must not be chosen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Texts:
    """K running or finished texts of each input.

    Attributes:
      tokens: `[B, K, N]` ids.
      lengths: `[B, K]`, the number of tokens, including an end token.
      scores: `[B, K]`. For running texts the log-probability; for finished ones the
        log-probability divided by length ** length_penalty.
    """

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array

    def best(self, count: int) -> tuple["Texts", jax.Array]:
        """The `count` texts with the highest scores, and their indices `[B, count]`."""
        _, indices = jax.lax.top_k(self.scores, count)
        return jax.tree.map(partial(_pick, indices=indices), self), indices


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The state of a search.

    Attributes:
      count: the number of tokens that every running beam has.
      cache: the KV cache of `B * K` rows. It holds all tokens of a beam but the last.
      running, finished: the beams and the finished texts.
      open: `[B]` booleans, whether a better text may still be found.
      seen: `[B * K, V]` booleans, the tokens that the repetition penalty applies to, or None.
    """

    count: jax.Array
    cache: Any
    running: Texts
    finished: Texts
    open: jax.Array
    seen: jax.Array | None


@partial(jax.jit, static_argnames=("capacity", "beams"))
def start(
    backbone,
    prefix,
    tokens: jax.Array,
    lengths: jax.Array,
    seen: jax.Array | None,
    repetition_penalty: jax.Array,
    ends: jax.Array,
    length_penalty: jax.Array,
    until: jax.Array,
    *,
    capacity: int,
    beams: int,
) -> State:
    """Prefill: read a batch of inputs and generate the first token of each beam.

    Args:
      backbone: any backbone.
      prefix: what the B inputs attend to first, or None.
      tokens: `[B, T]` ids, padded on the right.
      lengths: `[B]`, the number of tokens that are not padding. An input of length 0 fills up
        the batch; nothing is searched for it.
      seen: `[B * K, V]` booleans, see `State`.
      repetition_penalty: `[B * K]`, used where there is `seen`.
      ends: `[B, E]`, the ids that end a text of each input.
      length_penalty: see `Texts.scores`.
      until: the maximum length of a text, at most N.
      capacity: N.
      beams: K.
    """
    hidden, cache = backbone.start(tokens, lengths, prefix, capacity)
    rows = len(tokens)
    empty = Texts(
        jnp.zeros((rows, beams, capacity), jnp.int32),
        jnp.zeros((rows, beams), jnp.int32),
        jnp.full((rows, beams), _EXCLUDED),
    )
    # All beams are equal at first. Only the first one counts, so that no text appears twice.
    first = jnp.zeros_like(empty.scores).at[:, 1:].set(_EXCLUDED)
    state = State(
        count=jnp.array(0),
        cache=cache.repeated(beams),
        running=dataclasses.replace(empty, scores=first),
        finished=empty,
        open=lengths > 0,
        seen=seen,
    )
    logits = jnp.repeat(backbone.logits(hidden), beams, axis=0)
    return _extend(backbone.mesh, state, logits, repetition_penalty, ends, length_penalty, until)


@partial(jax.jit, donate_argnames="state")
def continue_search(
    backbone, prefix, state: State, repetition_penalty, ends, length_penalty, until
) -> State:
    """Search until no better text can be found or all texts have `until` tokens.

    Args:
      prefix: what each of the `B * K` rows attends to first, or None.
      state: is donated.
      backbone, repetition_penalty, ends, length_penalty, until: as for `start`.
    """

    def unfinished(state: State) -> jax.Array:
        return (state.count < until) & state.open.any()

    def step(state: State) -> State:
        tokens = state.running.tokens.reshape(-1, state.running.tokens.shape[-1])
        last = jax.lax.dynamic_index_in_dim(tokens, state.count - 1, 1, keepdims=False)
        hidden, cache = backbone.decode(last, state.cache, prefix)
        state = dataclasses.replace(state, cache=cache)
        logits = backbone.logits(hidden)
        return _extend(
            backbone.mesh, state, logits, repetition_penalty, ends, length_penalty, until
        )

    state = jax.lax.while_loop(unfinished, step, state)
    running, finished = whole((state.running, state.finished), backbone.mesh)
    return dataclasses.replace(state, running=running, finished=finished)


def _extend(
    mesh: Mesh | None,
    state: State,
    logits: jax.Array,
    repetition_penalty,
    ends,
    length_penalty,
    until,
) -> State:
    """Add one token to each running beam, from logits `[B * K, V]`."""
    running, finished = state.running, state.finished
    rows, beams, _ = running.tokens.shape
    log_probabilities = jax.nn.log_softmax(logits)
    if state.seen is not None:
        log_probabilities = penalize(log_probabilities, state.seen, repetition_penalty)
    total = log_probabilities.reshape(rows, beams, -1) + running.scores[..., None]
    each = min(2 * beams, total.shape[-1])
    # [B, K, 2K]
    of_beam, token = on_own_rows(lambda total: jax.lax.top_k(total, each), mesh, total)
    scores, place = jax.lax.top_k(of_beam.reshape(rows, -1), 2 * beams)  # [B, 2K]
    parent = place // each
    token = jnp.take_along_axis(token.reshape(rows, -1), place, axis=1)

    count = state.count + 1
    tokens = jax.lax.dynamic_update_index_in_dim(
        _pick(running.tokens, parent), token, state.count, 2
    )
    continued = Texts(tokens, jnp.full_like(parent, count), scores)  # [B, 2K]
    ended = (token[..., None] == ends[:, None]).any(axis=-1) | (count == until)

    may_finish = ended & (jnp.arange(2 * beams) < beams)[None] & state.open[:, None]
    final = jnp.where(may_finish, scores / count**length_penalty, _EXCLUDED)
    candidates = dataclasses.replace(continued, scores=final)
    joined = jax.tree.map(lambda *each: jnp.concatenate(each, axis=1), finished, candidates)
    finished, _ = joined.best(beams)

    kept = dataclasses.replace(continued, scores=jnp.where(ended, _EXCLUDED, scores))
    running, indices = kept.best(beams)
    parent = jnp.take_along_axis(parent, indices, axis=1)  # [B, K]
    seen = state.seen
    if seen is not None:
        last = jnp.take_along_axis(token, indices, axis=1).reshape(-1)
        seen = take_rows(seen, parent).at[jnp.arange(len(last)), last].set(True)

    best_to_come = running.scores[:, 0] / count**length_penalty
    worst = finished.scores.min(axis=1)  # `_EXCLUDED` while there are fewer than K
    return State(
        count=count,
        cache=state.cache.take(parent),
        running=running,
        finished=finished,
        open=state.open & (best_to_come > worst),
        seen=seen,
    )


def _pick(array: jax.Array, indices: jax.Array) -> jax.Array:
    """Entries `[B, n, ...]` of `[B, m, ...]` at indices `[B, n]`."""
    return jax.vmap(lambda one, chosen: one[chosen])(array, indices)
