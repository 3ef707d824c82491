"""What a backbone reads, and is asked to predict.

Axis letters: B batch, T tokens, M target positions, D hidden, V vocabulary.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

Array = Any  # NumPy's where it is made, JAX's in a compiled function, or None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Right-padded rows: an input, and the candidates that continue it.

    A causal model reads the candidates behind the input, side by side: a candidate's
    tokens see the input and one another but no other candidate's (see
    `attention.same_sequence`), so one pass over a row scores all of them. The last token
    of a candidate is predicted, never read, and so is in `targets` but not in `tokens`.
    An encoder-decoder reads the input alone with its encoder, and its decoder the targets.

    Attributes:
      tokens: `[B, T]` ids.
      lengths: `[B]`, tokens of each row that are no padding.
      targets: `[B, M]` ids.
      target_candidates: `[B, M]`, the candidate a target belongs to, -1 for padding.
      target_indices: `[B, M]`, where in the row each target is predicted from; None for
        an encoder-decoder.
      positions: `[B, T]`; each candidate goes on from the end of the input.
      segments: `[B, T]`: 0 for the input, 1, 2, … for the candidates, -1 for padding.
        Both are None where no row holds more than one sequence; padding on the right
        then needs no mask in a causal model.
    """

    tokens: Array
    lengths: Array
    targets: Array
    target_candidates: Array
    target_indices: Array
    positions: Array
    segments: Array

    @property
    def padding(self) -> float:
        """Share of `tokens` that are padding."""
        return 1 - float(self.lengths.sum()) / self.tokens.size


def target_log_probabilities(backbone, prefix, batch: Batch) -> jax.Array:
    """Log-probability of every target token given what stands before it, `[B, M]` float32."""
    hidden = backbone.target_states(batch, prefix)  # [B, M, D]
    log_probabilities = jax.nn.log_softmax(backbone.logits(hidden))  # [B, M, V]
    return jnp.take_along_axis(log_probabilities, batch.targets[..., None], axis=-1)[..., 0]
