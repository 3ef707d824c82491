"""Divergences between the distributions of two models over the vocabulary.

Axis letters: V vocabulary, k tokens.
"""

import jax
import jax.numpy as jnp

_NO_TOKEN = -1e30  # its logit; infinity would make gradients NaN


def kl_divergence(logits: jax.Array, other: jax.Array) -> jax.Array:
    """Return KL(p ‖ q) over the whole vocabulary.

    Args:
      logits: `[..., V]`, the logits of p.
      other: `[..., V]`, the logits of q.

    Returns:
      `[...]`, in nats.
    """
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(other)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def with_others(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Return the log-probabilities of some tokens, and of all other tokens together.

    Args:
      logits: `[..., V]`.
      ids: `[..., k]`, different tokens.

    Returns:
      `[..., k + 1]`. The last value is very low, but finite, if there are no other tokens.
    """
    others = jnp.put_along_axis(logits, ids, _NO_TOKEN, axis=-1, inplace=False)
    chosen = jnp.take_along_axis(logits, ids, axis=-1)
    rest = jax.nn.logsumexp(others, axis=-1, keepdims=True)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return jnp.concatenate([chosen, rest], axis=-1) - total
