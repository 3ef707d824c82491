"""Multi-task prompts.

Axis letters: N tasks, P virtual tokens of each, D hidden.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from softprompt.methods.method import PromptParam


class MultiTask(nnx.Module):
    """A prompt for each of several tasks: one that they share, times a matrix of rank 1.

    (MPT: Wang et al. 2023, arXiv:2303.02861, section 3.1; without its distillation from
    prompts of single tasks) The matrices start as ones.

    Args:
      vectors: `[P, D]`, the first shared prompt.
      tasks: N.
    """

    def __init__(self, vectors: jax.Array, tasks: int):
        length, size = vectors.shape
        self.shared = PromptParam(vectors)
        self.columns = PromptParam(jnp.ones((tasks, length)))
        self.rows = PromptParam(jnp.ones((tasks, size)))

    def __call__(self) -> jax.Array:
        """The prompts one behind the other, `[N·P, D]`."""
        matrices = self.columns[...][:, :, None] * self.rows[...][:, None]  # [N, P, D]
        return (self.shared[...][None] * matrices).reshape(-1, self.shared.shape[1])
