"""Batches of rows that a backbone reads, with the targets that it predicts.

Axis letters: B batch, T tokens, M target positions, D hidden, V vocabulary.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

Array = Any  # a NumPy array on the host, a JAX array in a compiled function, or None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows padded on the right, each with an input and its candidates.

    In a causal model, a row holds the input followed by all of its candidates. The tokens of a
    candidate attend to the input and to each other, but not to other candidates (see
    `attention.same_sequence`), so one forward pass scores all candidates. The last token of a
    candidate is predicted but never read: it is in `targets` and not in `tokens`.

    In an encoder-decoder, `tokens` holds only the input, and the decoder reads the targets.

    Attributes:
      tokens: `[B, T]` ids.
      lengths: `[B]`, the number of tokens in each row that are not padding.
      targets: `[B, M]` ids.
      target_candidates: `[B, M]`, the candidate each target belongs to, -1 for padding.
      target_indices: `[B, M]`, the index in the row of the token from which each target is
        predicted; None for an encoder-decoder.
      positions: `[B, T]`. The positions of every candidate continue those of the input. None
        if no row holds more than one candidate.
      segments: `[B, T]`: 0 for the input, 1, 2, … for the candidates, -1 for padding. None
        if `positions` is: padding on the right then needs no mask beyond the causal one.
    """

    tokens: Array
    lengths: Array
    targets: Array
    target_candidates: Array
    target_indices: Array
    positions: Array
    segments: Array

    def __repr__(self) -> str:
        rows, tokens = self.tokens.shape[-2:]
        return f"Batch({rows} rows, {tokens} tokens, {self.targets.shape[-1]} targets)"

    @property
    def padding(self) -> float:
        """The fraction of `tokens` that is padding."""
        return 1 - float(self.lengths.sum()) / self.tokens.size


def target_log_probabilities(backbone, prefix, batch: Batch) -> jax.Array:
    """Return the log-probability of each target token given the tokens before it.

    Args:
      backbone: a `Backbone`.
      prefix: a prefix of the backbone, or None.
      batch: B rows with M target positions.

    Returns:
      `[B, M]` float32, with arbitrary values at padding.
    """
    hidden = backbone.target_states(batch, prefix)  # [B, M, D]
    log_probabilities = jax.nn.log_softmax(backbone.logits(hidden))  # [B, M, V]
    return jnp.take_along_axis(log_probabilities, batch.targets[..., None], axis=-1)[..., 0]
