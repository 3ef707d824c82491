"""Multi-task prompt tuning (MPT, Wang et al. 2023, arXiv:2303.02861).

Axis letters: N tasks, P virtual tokens of each, D hidden.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from softprompt.methods.method import PromptParam


class MultiTask(nnx.Module):
    """One prompt per task: a shared prompt times a matrix of rank 1, elementwise.

    Section 3.1 of the paper, without the distillation from prompts of single tasks. All entries
    of the matrices start at one.

    Args:
      vectors: `[P, D]`, the initial shared prompt.
      tasks: N, the number of tasks.
    """

    def __init__(self, vectors: jax.Array, tasks: int):
        length, size = vectors.shape
        self.shared = PromptParam(vectors)
        self.columns = PromptParam(jnp.ones((tasks, length)))
        self.rows = PromptParam(jnp.ones((tasks, size)))

    def __call__(self) -> jax.Array:
        """Return the prompts of all tasks, one after another, `[N·P, D]`."""
        matrices = self.columns[...][:, :, None] * self.rows[...][:, None]  # [N, P, D]
        return (self.shared[...][None] * matrices).reshape(-1, self.shared.shape[1])
