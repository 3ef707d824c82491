"""DePT, decomposed prompt tuning (Shi & Lipani 2023, arXiv:2309.05173).

Axis letters: P virtual tokens, D hidden, S positions, R rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from softprompt.backbones.loading import Backbone, Base
from softprompt.experiment.schema import Experiment
from softprompt.methods.backbone_arrays import copied
from softprompt.methods.initializers import INITIALIZATION_SETTINGS, initial_vectors
from softprompt.methods.method import Axes, Method, OffsetParam, PromptParam


class DecomposedPrompt(Method):
    """A short soft prompt, and low-rank offsets that are added to the input embeddings.

    (Section 2.2 of the paper.) The offset of a token depends only on its position after the
    opening. Tokens from position S on have none. Virtual tokens that the template places inside
    the rows count as tokens of the row.

    Args:
      vectors: `[P, D]`, the soft prompt.
      down: `[S, R]`; `down @ up` are the offsets `[S, D]`.
      up: `[R, D]`.
      opening: see `Method`.

    Examples:
      >>> base = load_base("smollm2-135m-instruct")
      >>> vectors = SoftPrompt.from_vocabulary(base, 10, jax.random.key(0)).vectors[...]
      >>> down = jnp.zeros((64, 8))  # [S, R]
      >>> up = jax.random.normal(jax.random.key(1), (8, vectors.shape[1]))  # [R, D]
      >>> DecomposedPrompt(vectors, down, up, opening=~jnp.arange(10))
      DecomposedPrompt(10 virtual tokens, hidden size 576, offsets of rank 8 at 64 positions)
    """

    name: ClassVar[str] = "dept"
    label: ClassVar[str] = "DePT"
    default_learning_rate: ClassVar[float | None] = 2e-2
    size_settings: ClassVar[Sequence[str]] = ("prompt.length", "dept.positions", "dept.rank")
    trainable: ClassVar[Any] = PromptParam

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

    @classmethod
    def check(cls, experiment: Experiment) -> None:
        """Reject a reparametrization of the soft prompt."""
        if experiment.prompt.reparametrization:
            raise ValueError("method: dept does not support prompt.reparametrization")

    @classmethod
    def virtual_tokens(cls, experiment: Experiment) -> tuple[int, int]:
        """Return `prompt.length` and 0."""
        return experiment.prompt.length, 0

    @classmethod
    def initial_prompts(cls, experiment: Experiment) -> Sequence[str]:
        """Return `prompt.init_prompts`."""
        return experiment.prompt.init_prompts or ()

    @classmethod
    def offsets_learning_rate(cls, experiment: Experiment) -> float | None:
        """Return `dept.learning_rate`."""
        return experiment.dept.learning_rate

    @classmethod
    def varying_settings(cls, experiment: Experiment) -> Mapping[str, set[str]]:
        """Return the initialization and the learning rate of the offsets."""
        return {"prompt": INITIALIZATION_SETTINGS, "dept": {"learning_rate"}}

    @classmethod
    def build(
        cls,
        experiment: Experiment,
        base: Base,
        opening: Sequence[int],
        given: Sequence[jax.Array] = (),
    ) -> "DecomposedPrompt":
        """Start from the vectors of the section `prompt` and from offsets of zero.

        `down` is zero, and `up` is normal with the standard deviation of the vectors.
        """
        vectors = initial_vectors(experiment, experiment.prompt, base, given)
        settings, key = experiment.dept, jax.random.key(experiment.seed)
        up = jax.random.normal(key, (settings.rank, vectors.shape[1])) * jnp.std(vectors)
        return cls(vectors, jnp.zeros((settings.positions, settings.rank)), up, opening)

    def adapt(self, backbone: Backbone, key: jax.Array | None = None) -> Backbone:
        """Return a backbone that embeds virtual tokens as the vectors and adds the offsets."""
        backbone = copied(backbone)
        backbone.embedding.virtual = nnx.Param(self.vectors[...])
        backbone.embedding.offsets = nnx.Param(self.down[...] @ self.up[...])
        return backbone

    def arrays(self, backbone: Backbone) -> dict[str, jax.Array]:
        """Return `vectors`, `down` and `up`."""
        return {"vectors": self.vectors[...], "down": self.down[...], "up": self.up[...]}

    @classmethod
    def saved_axes(cls, description: Mapping[str, Any], backbone: Backbone) -> Mapping[str, Axes]:
        """Return the axes of `vectors`, `down` and `up`."""
        size = backbone.arch.hidden_size
        return {"vectors": ("P", size), "down": ("S", "R"), "up": ("R", size)}

    @classmethod
    def saved_virtual_tokens(cls, shapes: Mapping[str, Sequence[int]]) -> tuple[int, int]:
        """Return the number of vectors and 0."""
        return shapes["vectors"][0], 0

    @classmethod
    def load(
        cls,
        arrays: Mapping[str, jax.Array],
        description: Mapping[str, Any],
        opening: jax.Array | Sequence[int],
    ) -> "DecomposedPrompt":
        """Make the method from `vectors`, `down` and `up`."""
        return cls(arrays["vectors"], arrays["down"], arrays["up"], opening)

    def __repr__(self) -> str:
        length, size = self.vectors.shape
        positions, rank = self.down.shape
        return (
            f"DecomposedPrompt({length} virtual tokens, hidden size {size}, "
            f"offsets of rank {rank} at {positions} positions)"
        )
