"""Soft prompts, as in prompt tuning (Lester et al. 2021, arXiv:2104.08691).

Axis letters: B batch, T tokens, P virtual tokens, D hidden, S tokens of the opening.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from softprompt.backbones.loading import Backbone, Base, Prefix
from softprompt.data.task import Task
from softprompt.errors import UserError
from softprompt.experiment.schema import Experiment
from softprompt.methods.backbone_arrays import copied
from softprompt.methods.initializers import (
    INITIALIZATION_SETTINGS,
    initial_vectors,
    sampled_vocabulary,
    text_vectors,
)
from softprompt.methods.method import Adapter, Axes, Constant, Method, PromptParam
from softprompt.methods.peft_layout import peft_embedding_scale, prefix_adapter
from softprompt.methods.reparametrization import reparametrize
from softprompt.methods.saved import save_prompt


class SoftPrompt(Method):
    """Learned embeddings of virtual tokens, `[P, D]`.

    Calling it prepends the vectors to input embeddings, which is the definition of the method.
    Training and inference use `apply`, which computes the same function. With a causal
    model, it runs the opening only once per batch.

    Args:
      vectors: `[P, D]`.
      opening: `[S]`, the ids that every row begins with; virtual token i has the id `~i`. By
        default the virtual tokens alone, in order. Virtual tokens that are not in the opening
        are among the tokens of the rows.

    Examples:
      A prompt for any model that reads embeddings:

      >>> prompt = SoftPrompt(0.02 * jax.random.normal(jax.random.key(0), (20, 64)))
      >>> prompt
      SoftPrompt(20 virtual tokens, hidden size 64)
      >>> embeddings = jnp.zeros((8, 12, 64))  # [B, T, D]
      >>> prompt(embeddings).shape  # [B, P + T, D]
      (8, 32, 64)

      A prompt on a base model of this package:

      >>> base = load_base("smollm2-135m-instruct")
      >>> prompt = SoftPrompt.from_vocabulary(base, 20, jax.random.key(0))
      >>> backbone, prefix = prompt.apply(base.backbone)
      >>> prefix
      Opening(20 tokens)
    """

    name: ClassVar[str] = "prompt"
    label: ClassVar[str] = "soft prompt"
    default_learning_rate: ClassVar[float | None] = 2e-2
    size_settings: ClassVar[Sequence[str]] = ("prompt.length", "prompt.size")
    trainable: ClassVar[Any] = PromptParam
    is_pure_prefix: ClassVar[bool] = True

    def __init__(self, vectors: jax.Array, opening: jax.Array | Sequence[int] | None = None):
        super().__init__(~jnp.arange(len(vectors)) if opening is None else opening)
        self.vectors = PromptParam(vectors)

    @classmethod
    def from_vocabulary(cls, base: Base, length: int, key: jax.Array) -> "SoftPrompt":
        """Start from embeddings of frequent tokens (Lester et al. 2021, section 3.2).

        They are drawn without repetition from the 5,000 lowest ids that are not special.

        Args:
          base: the base model.
          length: P, the number of virtual tokens.
          key: determines the draw.

        Returns:
          A prompt whose vectors `[P, D]` are float32.

        Examples:
          >>> base = load_base("smollm2-135m-instruct")
          >>> SoftPrompt.from_vocabulary(base, 20, jax.random.key(0))
          SoftPrompt(20 virtual tokens, hidden size 576)
        """
        random = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        return cls(sampled_vocabulary(base, length, random).astype(jnp.float32))

    @classmethod
    def from_text(cls, base: Base, text: str, length: int | None = None) -> "SoftPrompt":
        """Start from the embeddings of a text.

        Args:
          base: the base model.
          text: it is tokenized without special tokens.
          length: P; the text is repeated or truncated to it. By default its number of tokens.

        Returns:
          A prompt whose vectors `[P, D]` are float32.

        Raises:
          UserError: if the text has no tokens.

        Examples:
          >>> base = load_base("smollm2-135m-instruct")
          >>> SoftPrompt.from_text(base, "Is this review positive?", length=10)
          SoftPrompt(10 virtual tokens, hidden size 576)
        """
        return cls(text_vectors(base, length, text).astype(jnp.float32))

    def save(self, folder: Path | str, base: Base, task: Task | None = None) -> None:
        """Save the prompt as a folder that `load_prompt` reads.

        Args:
          folder: the folder to write; a prompt that is already in it is replaced.
          base: the base model.
          task: template and verbalizer; by default the input is `{text}` and the target is
            free text.

        Examples:
          >>> base = load_base("smollm2-135m-instruct")
          >>> prompt = SoftPrompt.from_text(base, "Is this review positive?")
          >>> prompt.save("prompts/question", base)
          >>> loaded = load_prompt("prompts/question", base)
        """
        save_prompt(folder, self, base, task)

    @classmethod
    def virtual_tokens(cls, experiment: Experiment) -> tuple[int, int]:
        """Return `prompt.length` and 0."""
        return experiment.prompt.length, 0

    @classmethod
    def initial_prompts(cls, experiment: Experiment) -> Sequence[str]:
        """Return `prompt.init_prompts`."""
        return experiment.prompt.init_prompts or ()

    @classmethod
    def varying_settings(cls, experiment: Experiment) -> Mapping[str, set[str]]:
        """Return the initialization, and the length if prompts can be padded to one length.

        They cannot if there is a reparametrization, because it depends on the length, or with
        Adafactor, because it normalizes over the whole matrix, padding included.
        """
        can_be_padded = (
            experiment.prompt.reparametrization is None and experiment.optimizer.name != "adafactor"
        )
        length = {"length"} if can_be_padded else set()
        return {"prompt": INITIALIZATION_SETTINGS | length}

    @classmethod
    def tasks(cls, experiment: Experiment) -> Sequence[str]:
        """Return `prompt.tasks`."""
        return experiment.prompt.tasks or ()

    @classmethod
    def build(
        cls,
        experiment: Experiment,
        base: Base,
        opening: Sequence[int],
        given: Sequence[jax.Array] = (),
    ) -> "SoftPrompt | Reparametrized":
        """Start from the vectors that the section `prompt` asks for."""
        settings = experiment.prompt
        vectors = initial_vectors(experiment, settings, base, given)
        if settings.reparametrization is None:
            return cls(vectors, opening)
        source = reparametrize(settings, vectors, jax.random.key(experiment.seed))
        return Reparametrized(source, opening)

    def __call__(self, embeddings: jax.Array) -> jax.Array:
        """Prepend the vectors to input embeddings.

        Args:
          embeddings: `[B, T, D]`.

        Returns:
          `[B, P + T, D]`, of the same type as the embeddings.
        """
        vectors = self.vectors[...].astype(embeddings.dtype)
        rows = jnp.broadcast_to(vectors, (embeddings.shape[0], *vectors.shape))
        return jnp.concatenate([rows, embeddings], axis=1)

    def adapt(self, backbone: Backbone, key: jax.Array | None = None) -> Backbone:
        """Return a backbone that embeds the ids of virtual tokens as the vectors."""
        backbone = copied(backbone)
        backbone.embedding.virtual = nnx.Param(self.vectors[...])
        return backbone

    def can_be_padded(self, backbone: Backbone) -> bool:
        """Return whether the model is causal and all virtual tokens are in the opening."""
        in_opening = int((np.asarray(self.opening[...]) < 0).sum())
        return backbone.caches_prompt and in_opening == len(self.vectors[...])

    def padded(self, length: int) -> "SoftPrompt":
        """Return the same prompt with padding, so that it has `length` vectors.

        The opening gets as many more tokens. The padding is at the end of both, and no row
        attends to it. Requires `can_be_padded`.
        """
        # On the host: on a device, every length would compile a program.
        more = (0, length - len(self.vectors[...]))
        vectors = np.pad(np.asarray(self.vectors[...]), (more, (0, 0)))
        opening = np.pad(np.asarray(self.opening[...]), more)
        padded = SoftPrompt(jnp.asarray(vectors), jnp.asarray(opening))
        padded.span = Constant(jnp.array([[0, self.opening[...].size]]))
        return padded

    def arrays(self, backbone: Backbone) -> dict[str, jax.Array]:
        """Return `vectors`."""
        return {"vectors": self.vectors[...]}

    @classmethod
    def saved_axes(cls, description: Mapping[str, Any], backbone: Backbone) -> Mapping[str, Axes]:
        """Return the axes of `vectors`."""
        return {"vectors": ("P", backbone.arch.hidden_size)}

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
    ) -> "SoftPrompt":
        """Make the prompt from `vectors`."""
        return cls(arrays["vectors"], opening)

    def plain_vectors(self) -> jax.Array:
        """Return the vectors `[P, D]`."""
        return self.vectors[...]

    def peft_adapter(self, base: Base, prefix: Prefix | None) -> Adapter:
        """Return a PROMPT_TUNING adapter."""
        vectors = np.asarray(self.vectors[...], np.float32)
        if not self._all_in_opening() or len(self.opening[...]) > len(vectors):
            raise UserError(
                "peft puts virtual tokens before everything else, but these are elsewhere or "
                "mixed with text; an opening can be exported as peft-prefix"
            )
        layers, *_ = base.backbone.prefix_shape(0)
        return {"prompt_embeddings": vectors / np.float32(peft_embedding_scale(base))}, {
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": len(vectors),
            "token_dim": vectors.shape[1],
            "num_transformer_submodules": 1,
            "num_attention_heads": base.backbone.arch.num_heads,
            "num_layers": layers,
            "prompt_tuning_init": "RANDOM",
            "prompt_tuning_init_text": None,
            "tokenizer_name_or_path": None,
        }

    def peft_prefix(self, base: Base, prefix: Prefix | None) -> Adapter:
        """Return the keys and values of the whole opening as a PREFIX_TUNING adapter."""
        adapter = prefix_adapter(base, prefix)
        if not self._all_in_opening():
            raise UserError("the virtual tokens are inside the inputs, not before them")
        return adapter

    def merge_into(self, backbone: Backbone, adapted: Backbone) -> tuple[Backbone, np.ndarray]:
        """Return the frozen backbone, and the vectors for new tokens."""
        return backbone, np.asarray(self.vectors[...], np.float32)

    def _all_in_opening(self) -> bool:
        opening = np.asarray(self.opening[...])
        return opening[opening < 0].tolist() == [~i for i in range(len(self.vectors[...]))]

    def __repr__(self) -> str:
        length, size = self.vectors.shape
        return f"SoftPrompt({length} virtual tokens, hidden size {size})"


class Reparametrized(Method):
    """A soft prompt whose vectors are computed from other parameters during training.

    Args:
      source: a module that returns the vectors `[P, D]` when it is called.
      opening: see `SoftPrompt`.
    """

    name: ClassVar[str] = "prompt"
    label: ClassVar[str] = "soft prompt"
    trainable: ClassVar[Any] = PromptParam

    def __init__(self, source: Callable[[], jax.Array], opening: jax.Array | Sequence[int]):
        super().__init__(opening)
        self.source = source

    def adapt(self, backbone: Backbone, key: jax.Array | None = None) -> Backbone:
        """Fold to a `SoftPrompt`, then adapt."""
        return self.folded().adapt(backbone)

    def folded(self) -> SoftPrompt:
        """Return the plain soft prompt with the current vectors."""
        return SoftPrompt(self.source(), self.opening[...])

    def __repr__(self) -> str:
        length, size = jax.eval_shape(self.source).shape
        kind = type(self.source).__name__
        return f"Reparametrized({kind}, {length} virtual tokens, hidden size {size})"
