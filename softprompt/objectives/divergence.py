"""Divergences between the distributions of two models over the vocabulary.

Axis letters: V vocabulary.
"""

import jax
import jax.numpy as jnp


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
