"""How the next token of each row is chosen.

Axis letters: B batch, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.experiment.schema import GenerationSettings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling settings of each row, all `[B]`.

    Rows may differ: a row's token depends on its own settings alone. See `GenerationSettings`
    for what the settings mean.

    Attributes:
      temperature: 0 for greedy decoding. None: all rows are greedy. Programs compiled for None
        contain no sampling, so they compile faster; the tokens are the same.
      top_k: 0 for no limit.
      top_p: 1 for no limit.
      min_p: 0 for no limit.
      repetition_penalty: 1 for no penalty.
    """

    temperature: jax.Array | None
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array

    @classmethod
    def from_settings(cls, settings: GenerationSettings, rows: int) -> "Sampling":
        """The same settings for every row of a batch."""

        def full(value, neutral, dtype=np.float32):
            return np.full(rows, neutral if value is None else value, dtype)

        return cls(
            temperature=None if settings.temperature is None else full(settings.temperature, 0),
            top_k=full(settings.top_k, 0, np.int32),
            top_p=full(settings.top_p, 1),
            min_p=full(settings.min_p, 0),
            repetition_penalty=full(settings.repetition_penalty, 1),
        )


def choose(
    logits: jax.Array, seen: jax.Array | None, keys: jax.Array, sampling: Sampling
) -> jax.Array:
    """Choose the next token of each row.

    Random numbers are drawn only if a row samples, and logits are sorted only if a row uses
    `top_k` or `top_p`. Greedy decoding pays for neither.

    Args:
      logits: `[B, V]`.
      seen: `[B, V]` booleans, the tokens that the repetition penalty applies to. None: no row
        has a penalty.
      keys: `[B]`, random keys.
      sampling: the settings.

    Returns:
      `[B]` ids. The id is -1 in a row without a finite largest logit, as with NaN.
    """
    if seen is not None:
        logits = penalize(logits, seen, sampling.repetition_penalty)
    greedy = jnp.argmax(logits, axis=-1, keepdims=True).astype(jnp.int32)
    # argmax takes NaN for the largest number.
    valid = jnp.isfinite(jnp.take_along_axis(logits, greedy, axis=-1))
    greedy = jnp.where(valid, greedy, -1)[:, 0]
    if sampling.temperature is None:
        return greedy
    samples = sampling.temperature > 0

    def draw() -> jax.Array:
        drawn = jax.vmap(jax.random.categorical)(keys, filter_logits(logits, sampling))
        return jnp.where(samples & (greedy >= 0), drawn.astype(jnp.int32), greedy)

    return jax.lax.cond(samples.any(), draw, lambda: greedy)


def penalize(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Apply a repetition penalty (Keskar et al. 2019, arXiv:1909.05858).

    Args:
      logits: `[B, V]`.
      seen: `[B, V]` booleans, the tokens to penalize.
      penalty: `[B]`; values above 1 make these tokens less likely.

    Returns:
      `[B, V]`, negative logits multiplied by the penalty, and others divided by it.
    """
    factor = penalty[:, None]
    return jnp.where(seen, jnp.where(logits < 0, logits * factor, logits / factor), logits)


def filter_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Divide logits by the temperature and exclude unlikely tokens.

    The rules apply one after another. `top_k` keeps the k most likely tokens. `top_p` keeps
    the smallest set of these with a total probability of at least `top_p` (nucleus sampling,
    Holtzman et al. 2019, arXiv:1904.09751). `min_p` keeps tokens with at least `min_p` times
    the probability of the most likely one (Nguyen et al. 2024, arXiv:2407.01082).

    Args:
      logits: `[B, V]`.
      sampling: the settings, with temperatures; a row of temperature 0 is not divided.

    Returns:
      `[B, V]`, -inf for excluded tokens.
    """
    given = jnp.asarray(sampling.temperature)
    logits = logits / jnp.where(given > 0, given, 1)[:, None]
    top_k, top_p = sampling.top_k[:, None], sampling.top_p[:, None]
    size = logits.shape[-1]

    def smallest_kept() -> jax.Array:
        ranked = -jnp.sort(-logits, axis=-1)
        last = jnp.where(top_k > 0, jnp.minimum(top_k, size), size) - 1
        ranked = jnp.where(ranked < jnp.take_along_axis(ranked, last, axis=-1), -jnp.inf, ranked)
        shares = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(shares, axis=-1) - shares  # the probability of more likely tokens
        kept = ((before < top_p) | (top_p >= 1)) & (ranked > -jnp.inf)
        return jnp.min(ranked, axis=-1, keepdims=True, where=kept, initial=jnp.inf)

    limited = (sampling.top_k > 0) | (sampling.top_p < 1)
    least = jax.lax.cond(
        limited.any(), smallest_kept, lambda: jnp.full_like(logits[:, :1], -jnp.inf)
    )
    best = logits.max(axis=-1, keepdims=True)
    least = jnp.maximum(least, best + jnp.log(sampling.min_p)[:, None])
    return jnp.where(logits < least, -jnp.inf, logits)
