"""The soft prompt (Lester et al. 2021, arXiv:2104.08691).

Axis letters: B batch, T tokens, P virtual tokens (k), D hidden.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from softprompt.backbones.loading import Backbone, Prefix


class PromptParam(nnx.Param):
    """A learned part of a prompt."""


class SoftPrompt(nnx.Module):
    """Learned vectors `[P, D]` that stand in front of every input.

    Calling it prepends them to input embeddings, which is what the method is. `apply`
    is what training and inference use: the same function, its cost not multiplied by
    the batch.
    """

    trainable = PromptParam  # the filter for what the step updates

    def __init__(self, vectors: jax.Array):
        self.vectors = PromptParam(vectors)

    def __call__(self, embeddings: jax.Array) -> jax.Array:
        """Input embeddings `[B, T, D]` with the vectors in front, `[B, P + T, D]`."""
        vectors = self.vectors[...].astype(embeddings.dtype)
        rows = jnp.broadcast_to(vectors, (embeddings.shape[0], *vectors.shape))
        return jnp.concatenate([rows, embeddings], axis=1)

    def apply(self, backbone: Backbone) -> tuple[Backbone, Prefix]:
        """What to run: the backbone as it is, behind the prefix that the vectors give."""
        vectors = self.vectors[...].astype(backbone.embedding.table[...].dtype)
        return backbone, backbone.prefill(vectors)
