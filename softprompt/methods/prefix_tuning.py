"""Prefix tuning (Li & Liang 2021, arXiv:2101.00190) and P-tuning v2 (arXiv:2110.07602).

Axis letters: P virtual tokens, L layers, K key-value heads, h head size,
F size of the hidden layer.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from softprompt.backbones.loading import Backbone, Base, Prefix
from softprompt.errors import UserError
from softprompt.experiment.schema import Experiment
from softprompt.methods.initializers import INITIALIZATION_SETTINGS, initial_vectors
from softprompt.methods.method import Adapter, Axes, Constant, Method, PromptParam
from softprompt.methods.peft_layout import prefix_adapter


class PrefixTuning(Method):
    """Learned keys and values of virtual tokens in every layer.

    Args:
      keys: `[L, P, K, h]`, after rotary embedding.
      values: `[L, P, K, h]`.
      opening: see `Method`. It comes after the learned keys and values.

    Examples:
      >>> base = load_base("smollm2-135m-instruct")
      >>> start = SoftPrompt.from_vocabulary(base, 20, jax.random.key(0))
      >>> keys, values = base.backbone.initial_prefix(start.vectors[...], jax.random.key(0))
      >>> method = PrefixTuning(keys, values)
      >>> method
      PrefixTuning(20 virtual tokens, 30 layers, 3 key-value heads of size 64)
      >>> backbone, prefix = method.apply(base.backbone)
    """

    name: ClassVar[str] = "prefix"
    label: ClassVar[str] = "prefix tuning"
    default_learning_rate: ClassVar[float | None] = 3e-2
    size_settings: ClassVar[Sequence[str]] = ("prefix.length", "prefix.frozen", "prefix.size")
    trainable: ClassVar[Any] = PromptParam
    is_pure_prefix: ClassVar[bool] = True

    def __init__(self, keys: jax.Array, values: jax.Array, opening: jax.Array | Sequence[int] = ()):
        super().__init__(opening)
        self.keys, self.values = PromptParam(keys), PromptParam(values)

    @classmethod
    def virtual_tokens(cls, experiment: Experiment) -> tuple[int, int]:
        """Return 0 and `prefix.length`."""
        return 0, experiment.prefix.length

    @classmethod
    def initial_prompts(cls, experiment: Experiment) -> Sequence[str]:
        """Return `prefix.init_prompts`."""
        return experiment.prefix.init_prompts or ()

    @classmethod
    def varying_settings(cls, experiment: Experiment) -> Mapping[str, set[str]]:
        """Return the initialization."""
        return {"prefix": INITIALIZATION_SETTINGS}

    @classmethod
    def build(
        cls,
        experiment: Experiment,
        base: Base,
        opening: Sequence[int],
        given: Sequence[jax.Array] = (),
    ) -> "PrefixTuning | ReparametrizedPrefix | PartlyFrozenPrefix":
        """Start from the keys and values that the model computes for initial vectors.

        A model with an encoder starts from random keys and values instead: see
        `Backbone.initial_prefix`.

        Raises:
          UserError: if the settings do not fit the base model.
        """
        settings, key = experiment.prefix, jax.random.key(experiment.seed)
        if base.backbone.separate_targets and settings.init == "teacher":
            raise UserError(
                "prefix.init: teacher needs a causal base model; the prefix of an encoder-decoder "
                "starts from random keys and values"
            )
        vectors = initial_vectors(experiment, settings, base, given)
        keys, values = base.backbone.initial_prefix(vectors, key)
        first = settings.frozen
        trained: PrefixTuning | ReparametrizedPrefix
        if settings.size is None:
            trained = cls(keys[:, first:], values[:, first:], opening)
        else:
            trained = ReparametrizedPrefix(
                keys[:, first:], values[:, first:], settings.size, key, opening
            )
        return PartlyFrozenPrefix(keys[:, :first], values[:, :first], trained) if first else trained

    def learned_prefix(self, backbone: Backbone) -> Prefix:
        """Return the learned keys and values."""
        dtype = backbone.embedding.table.dtype
        prefix: Any = backbone.prefix_from(
            self.keys[...].astype(dtype), self.values[...].astype(dtype)
        )
        return prefix

    def arrays(self, backbone: Backbone) -> dict[str, jax.Array]:
        """Return `keys` and `values`."""
        return {"keys": self.keys[...], "values": self.values[...]}

    @classmethod
    def saved_axes(cls, description: Mapping[str, Any], backbone: Backbone) -> Mapping[str, Axes]:
        """Return the axes of `keys` and `values`."""
        layers, _, kv_heads, size = backbone.prefix_shape(0)
        return dict.fromkeys(("keys", "values"), (layers, "P", kv_heads, size))

    @classmethod
    def saved_virtual_tokens(cls, shapes: Mapping[str, Sequence[int]]) -> tuple[int, int]:
        """Return 0 and the length of the prefix."""
        return 0, shapes["keys"][1]

    @classmethod
    def load(
        cls,
        arrays: Mapping[str, jax.Array],
        description: Mapping[str, Any],
        opening: jax.Array | Sequence[int],
    ) -> "PrefixTuning":
        """Make the prefix from `keys` and `values`."""
        return cls(arrays["keys"], arrays["values"], opening)

    def peft_adapter(self, base: Base, prefix: Prefix | None) -> Adapter:
        """Return a PREFIX_TUNING adapter."""
        return prefix_adapter(base, prefix)

    def peft_prefix(self, base: Base, prefix: Prefix | None) -> Adapter:
        """Return the same as `peft_adapter`."""
        return prefix_adapter(base, prefix)

    def __repr__(self) -> str:
        layers, length, heads, size = self.keys.shape
        return (
            f"PrefixTuning({length} virtual tokens, {layers} layers, "
            f"{heads} key-value heads of size {size})"
        )


class _FoldedPrefix(Method):
    """A prefix that is trained in another form and can be folded into a plain `PrefixTuning`."""

    name: ClassVar[str] = "prefix"
    label: ClassVar[str] = "prefix tuning"
    trainable: ClassVar[Any] = PromptParam

    def learned_prefix(self, backbone: Backbone) -> Prefix | None:
        """Fold, and return the prefix."""
        return self.folded().learned_prefix(backbone)


class ReparametrizedPrefix(_FoldedPrefix):
    """A prefix plus the output of a network that all virtual tokens share.

    The network of Li & Liang computes the keys and values themselves. This one computes a change
    of the initial keys and values, so that training starts from them. It folds to a plain
    `PrefixTuning`.

    Args:
      keys: `[L, P, K, h]`, the initial keys.
      values: `[L, P, K, h]`, the initial values.
      size: F, the size of the hidden layer.
      key: for the random initial weights.
      opening: see `Method`.
    """

    def __init__(
        self,
        keys: jax.Array,
        values: jax.Array,
        size: int,
        key: jax.Array,
        opening: jax.Array | Sequence[int] = (),
    ):
        super().__init__(opening)
        length = keys.shape[1]
        self.first = Constant(jnp.stack([keys, values]))  # [2, L, P, K, h]
        drawn = jax.random.split(key)
        self.inputs = PromptParam(jax.random.normal(drawn[0], (length, size)))
        self.down = PromptParam(jax.random.normal(drawn[1], (size, size)) / jnp.sqrt(size))
        self.down_bias = PromptParam(jnp.zeros(size))
        self.up = PromptParam(jnp.zeros((size, self.first.size // length)))

    def folded(self) -> PrefixTuning:
        """Return the plain prefix with the current keys and values."""
        inner = jnp.tanh(self.inputs[...] @ self.down[...] + self.down_bias[...][None])  # [P, F]
        first = self.first[...]
        change = (inner @ self.up[...]).reshape(first.shape[2], 2, first.shape[1], *first.shape[3:])
        keys, values = first + change.transpose(1, 2, 0, 3, 4)
        return PrefixTuning(keys, values, self.opening[...])

    def __repr__(self) -> str:
        length, size = self.inputs.shape
        return f"ReparametrizedPrefix({length} virtual tokens, network of size {size})"


class PartlyFrozenPrefix(_FoldedPrefix):
    """A prefix whose first keys and values are frozen while the others are trained.

    Cartridges (Eyuboglu et al. 2025, arXiv:2506.06266) freezes the first token, because many tokens
    attend to it whatever it is (an attention sink). The method folds to a plain `PrefixTuning`.

    Args:
      keys: `[L, n, K, h]`, the keys of the first n virtual tokens.
      values: `[L, n, K, h]`.
      trained: the other virtual tokens, with the opening.
    """

    def __init__(
        self, keys: jax.Array, values: jax.Array, trained: PrefixTuning | ReparametrizedPrefix
    ):
        super().__init__(trained.opening[...])
        self.keys, self.values = Constant(keys), Constant(values)
        self.trained = trained

    def folded(self) -> PrefixTuning:
        """Return the plain prefix with the frozen and the trained keys and values."""
        rest = self.trained.folded()
        assert isinstance(rest, PrefixTuning)
        keys = jnp.concatenate([self.keys[...], rest.keys[...]], axis=1)
        values = jnp.concatenate([self.values[...], rest.values[...]], axis=1)
        return PrefixTuning(keys, values, self.opening[...])

    def __repr__(self) -> str:
        return f"PartlyFrozenPrefix({self.keys.shape[1]} frozen virtual tokens, {self.trained!r})"
