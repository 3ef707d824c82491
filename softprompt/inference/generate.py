"""Writing on from inputs, greedily.

Axis letters: B batch, T tokens, N new tokens.
"""

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.jit, static_argnames=("count",))
def greedy(
    backbone, prefix, tokens: jax.Array, lengths: jax.Array, end: int, *, count: int
) -> jax.Array:
    """The likeliest next token, again and again, until a row has its `end` token.

    Args:
      backbone: any backbone.
      prefix: what stands in front of every row, or None.
      tokens: `[B, T]` ids, padded on the right.
      lengths: `[B]`, real tokens of each row; nothing is written behind one of 0.
      end: id of the end-of-text token.
      count: N, the most tokens to write.

    Returns:
      `[B, N]` ids; behind the end of a row there are more of `end`.
    """
    rows = len(tokens)
    hidden, cache = backbone.start(tokens, lengths, prefix, count)

    def unfinished(state):
        number, _, _, _, done = state
        return (number < count) & ~done.all()

    def write(state):
        number, hidden, cache, written, done = state
        token = jnp.where(done, end, jnp.argmax(backbone.logits(hidden), axis=-1)).astype(jnp.int32)
        written = written.at[:, number].set(token)
        hidden, cache = backbone.decode(token, cache, prefix)
        return number + 1, hidden, cache, written, done | (token == end)

    written = jnp.full((rows, count), end, jnp.int32)
    state = (0, hidden, cache, written, lengths == 0)
    return jax.lax.while_loop(unfinished, write, state)[3]
