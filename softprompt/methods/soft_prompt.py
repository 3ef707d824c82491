"""The soft prompt (Lester et al. 2021, arXiv:2104.08691), and DePT.

Axis letters: B batch, T tokens, P virtual tokens (k), D hidden, S positions, R rank.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from softprompt.backbones.loading import Backbone
from softprompt.methods.method import Constant, Method, copied


class PromptParam(nnx.Param):
    """A learned part of a prompt."""


class OffsetParam(PromptParam):
    """A learned part of DePT's offsets, which have a learning rate of their own."""


class SoftPrompt(Method):
    """Learned vectors `[P, D]`, the embeddings of virtual tokens.

    By default these stand in front of every input. Calling it prepends them to input
    embeddings, which is what the method is. `apply` is what training and inference use:
    the same function, its cost not multiplied by the batch.

    Args:
      vectors: `[P, D]`.
      opening: `[S]`, see `Method`. Virtual tokens that are not in it stand in the rows.
    """

    trainable = PromptParam

    def __init__(self, vectors: jax.Array, opening: jax.Array | Sequence[int] | None = None):
        super().__init__(~jnp.arange(len(vectors)) if opening is None else opening)
        self.vectors = PromptParam(vectors)

    def __call__(self, embeddings: jax.Array) -> jax.Array:
        """Input embeddings `[B, T, D]` with the vectors in front, `[B, P + T, D]`."""
        vectors = self.vectors[...].astype(embeddings.dtype)
        rows = jnp.broadcast_to(vectors, (embeddings.shape[0], *vectors.shape))
        return jnp.concatenate([rows, embeddings], axis=1)

    def can_be_padded(self, backbone: Backbone) -> bool:
        """Whether all vectors stand in the opening of a causal model."""
        in_opening = int((np.asarray(self.opening[...]) < 0).sum())
        return backbone.caches_prompt and in_opening == len(self.vectors[...])

    def padded(self, length: int) -> "SoftPrompt":
        """The same prompt with `length` vectors and an opening that is longer by as many.

        What is added stands at the end, and no row attends to it, so that prompts of several
        lengths can be of one shape. It is for those that `can_be_padded`.
        """
        # On the host: on a device every length would be a program of its own.
        more = (0, length - len(self.vectors[...]))
        vectors = np.pad(np.asarray(self.vectors[...]), (more, (0, 0)))
        opening = np.pad(np.asarray(self.opening[...]), more)
        padded = SoftPrompt(jnp.asarray(vectors), jnp.asarray(opening))
        padded.span = Constant(jnp.array([[0, self.opening[...].size]]))
        return padded

    def adapt(self, backbone: Backbone, key: jax.Array | None = None) -> Backbone:
        """The backbone, to which the ids of virtual tokens mean these vectors."""
        backbone = copied(backbone)
        backbone.embedding.virtual = nnx.Param(self.vectors[...])
        return backbone

    def arrays(self, backbone: Backbone) -> dict[str, jax.Array]:
        """`vectors`."""
        return {"vectors": self.vectors[...]}


class Reparametrized(Method):
    """A soft prompt whose vectors are made from something else while it is trained.

    Args:
      source: a module whose call gives the vectors `[P, D]`.
      opening: see `SoftPrompt`.
    """

    trainable = PromptParam

    def __init__(self, source: Callable[[], jax.Array], opening: jax.Array | Sequence[int]):
        super().__init__(opening)
        self.source = source

    def adapt(self, backbone: Backbone, key: jax.Array | None = None) -> Backbone:
        """As that of the soft prompt that it folds to."""
        return self.folded().adapt(backbone)

    def folded(self) -> SoftPrompt:
        """The plain soft prompt."""
        return SoftPrompt(self.source(), self.opening[...])


class DecomposedPrompt(Method):
    """DePT: a short prompt, and low-rank offsets of the input embeddings.

    (Shi & Lipani 2023, arXiv:2309.05173, section 2.2) The offset `[D]` of a row's token
    depends on its position alone, counted behind the opening; the tokens behind S have
    none. Virtual tokens that stand in the rows are among the tokens of these.

    Args:
      vectors, opening: as of `SoftPrompt`.
      down, up: `[S, R]` and `[R, D]`, whose product are the offsets.
    """

    trainable = PromptParam

    def __init__(
        self,
        vectors: jax.Array,
        down: jax.Array,
        up: jax.Array,
        opening: jax.Array | Sequence[int],
    ):
        super().__init__(opening)
        self.vectors = PromptParam(vectors)
        self.down, self.up = OffsetParam(down), OffsetParam(up)

    def adapt(self, backbone: Backbone, key: jax.Array | None = None) -> Backbone:
        """The backbone, which adds the offsets to what it reads behind the opening."""
        backbone = copied(backbone)
        backbone.embedding.virtual = nnx.Param(self.vectors[...])
        backbone.embedding.offsets = nnx.Param(self.down[...] @ self.up[...])
        return backbone

    def arrays(self, backbone: Backbone) -> dict[str, jax.Array]:
        """`vectors`, `down` and `up`."""
        return {"vectors": self.vectors[...], "down": self.down[...], "up": self.up[...]}
