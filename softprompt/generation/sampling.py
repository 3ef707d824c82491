"""The choice of the next token.

Axis letters: B batch, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp

from softprompt.experiment.schema import GenerationSettings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen; None where a rule is not used. See `GenerationSettings`."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None

    @classmethod
    def of(cls, settings: GenerationSettings) -> "Sampling":
        """The rules of an experiment's or a caller's settings."""
        return cls(
            **{field.name: getattr(settings, field.name) for field in dataclasses.fields(cls)}
        )


def choose(
    logits: jax.Array, seen: jax.Array | None, keys: jax.Array, sampling: Sampling
) -> jax.Array:
    """The next token of each row.

    Args:
      logits: `[B, V]`.
      seen: `[B, V]` booleans, tokens that the penalty is for, or None.
      keys: `[B]`, random keys.
      sampling: the rules.

    Returns:
      `[B]` ids: without a temperature the likeliest ones.
    """
    if seen is not None:
        logits = penalised(logits, seen, sampling.repetition_penalty)
    if sampling.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, filtered(logits, sampling)).astype(jnp.int32)


def penalised(logits: jax.Array, seen: jax.Array, penalty) -> jax.Array:
    """Logits with those of seen tokens made less by a factor (Keskar et al. 2019, 1909.05858)."""
    less = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(seen, less, logits)


def filtered(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits `[B, V]` divided by the temperature, -inf where a token may not be chosen.

    The rules apply one after another: `top_k`, then of these the likeliest that together
    have `top_p` (Holtzman et al. 2019, 1904.09751), then those that have at least `min_p`
    times the probability of the likeliest (Nguyen et al. 2024, 2407.01082).
    """
    logits = logits / jnp.asarray(sampling.temperature)
    least = jnp.full_like(logits[:, :1], -jnp.inf)
    if sampling.top_k is not None or sampling.top_p is not None:
        ranked = -jnp.sort(-logits, axis=-1)
        if sampling.top_k is not None:
            last = jnp.minimum(sampling.top_k, ranked.shape[-1]) - 1
            least = jnp.take_along_axis(ranked, jnp.full_like(ranked[:, :1], last, int), axis=-1)
            ranked = jnp.where(ranked < least, -jnp.inf, ranked)
        if sampling.top_p is not None:
            shares = jax.nn.softmax(ranked, axis=-1)
            kept = jnp.cumsum(shares, axis=-1) - shares < sampling.top_p  # of those before it
            kept &= ranked > -jnp.inf
            least = jnp.min(ranked, axis=-1, keepdims=True, where=kept, initial=jnp.inf)
    if sampling.min_p is not None:
        best = logits.max(axis=-1, keepdims=True)
        least = jnp.maximum(least, best + jnp.log(sampling.min_p))
    return jnp.where(logits < least, -jnp.inf, logits)
