"""Prefix tuning (Li & Liang 2021, arXiv:2101.00190), and with it P-tuning v2.

Axis letters: P virtual tokens, L layers, K key-value heads, h head size, F hidden layer.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from softprompt.backbones.loading import Backbone, Prefix
from softprompt.methods.method import Constant, Method
from softprompt.methods.soft_prompt import PromptParam


class PrefixTuning(Method):
    """Learned keys (as after rotary embedding) and values of virtual tokens in every layer.

    Args:
      keys, values: `[L, P, K, h]`.
      opening: see `Method`; it is run behind them.
    """

    trainable = PromptParam

    def __init__(self, keys: jax.Array, values: jax.Array, opening: jax.Array | Sequence[int] = ()):
        super().__init__(opening)
        self.keys, self.values = PromptParam(keys), PromptParam(values)

    def make_prefix(self, backbone: Backbone) -> Prefix:
        """The keys and values, and behind them the opening's."""
        kind = backbone.embedding.table.dtype
        prefix: Any = backbone.prefix_from(
            self.keys[...].astype(kind), self.values[...].astype(kind)
        )
        if not self.opening.size:
            return prefix
        return backbone.prefill(backbone.embedding(self.opening[...]), prefix)

    def arrays(self, backbone: Backbone) -> dict[str, jax.Array]:
        """`keys` and `values`."""
        return {"keys": self.keys[...], "values": self.values[...]}


class ReparametrizedPrefix(Method):
    """A prefix to which a network of one hidden layer adds, that all virtual tokens share.

    Li & Liang's network makes the keys and values; here it makes their difference from
    the first ones, so that training starts from these. It folds to a plain prefix.

    Args:
      keys, values: `[L, P, K, h]`, the first ones.
      size: of the hidden layer.
      key: of the random first weights.
      opening: see `Method`.
    """

    trainable = PromptParam

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

    def make_prefix(self, backbone: Backbone) -> Prefix:
        """That of the folded method."""
        return self.folded().make_prefix(backbone)

    def folded(self) -> PrefixTuning:
        """The plain keys and values."""
        inner = jnp.tanh(self.inputs[...] @ self.down[...] + self.down_bias[...][None])  # [P, F]
        first = self.first[...]
        change = (inner @ self.up[...]).reshape(first.shape[2], 2, first.shape[1], *first.shape[3:])
        keys, values = first + change.transpose(1, 2, 0, 3, 4)
        return PrefixTuning(keys, values, self.opening[...])
