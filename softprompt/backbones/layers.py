"""The building blocks of backbones, as Flax NNX modules.

Parameters are initialized with zeros because a backbone is always loaded from a file. Kernels
can be quantized, see `quantization`. Norms are always float32. `Embedding` and `Linear` have
attributes that are None in a loaded model and that methods set (`virtual`, `offsets`, `low_rank`).

Axis letters: B batch, T tokens, S positions with an offset, D hidden, F feed-forward, K key-value
heads, h head size, E experts, N = B·T, V vocabulary, P virtual tokens, R rank.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from softprompt.backbones.quantization import (
    COMPANIONS,
    Quantization,
    dequantize,
    kernel_shape,
    stored_arrays,
)
from softprompt.parallel.mesh import on_each_device
from softprompt.parallel.sharding import axes_when_gathered

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


class Embedding(nnx.Module):
    """Input embeddings, with the virtual tokens and offsets of a method.

    Attributes:
      table: `[V, D]`.
      scale: the factor of the table's rows (Gemma, Granite).
      virtual: `[P, D]`, the embeddings of virtual tokens, or None. They are used as they are,
        without `scale`. Virtual token i has the id `~i`, which is -1 - i.
      offsets: `[S, D]`, added to the embeddings at the first S positions of a row, or None.
    """

    def __init__(self, vocab_size: int, hidden_size: int, scale: float = 1.0):
        self.table = nnx.Param(jnp.zeros((vocab_size, hidden_size)))
        self.scale = scale
        self.virtual: nnx.Param | None = nnx.data(None)
        self.offsets: nnx.Param | None = nnx.data(None)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Look up ids `[...]` and return embeddings `[..., D]` without offsets."""
        if self.virtual is None:
            return self.table[...][tokens] * self.scale
        ordinary = self.table[...][jnp.maximum(tokens, 0)] * self.scale
        virtual = self.virtual[...].astype(ordinary.dtype)[jnp.maximum(~tokens, 0)]
        return jnp.where((tokens < 0)[..., None], virtual, ordinary)

    def with_offsets(self, tokens: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """Look up ids and add the offsets of their positions.

        Args:
          tokens: ids `[B, T]`, or packed, `[G, N]`.
          positions: of each token in its row, in the shape of `tokens`. The default, 0, 1, …, is
            for rows.

        Returns:
          `[B, T, D]` or `[G, N, D]`.
        """
        embeddings = self(tokens)
        if self.offsets is None:
            return embeddings
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None]
        offsets = self.offsets[...].astype(embeddings.dtype)
        return embeddings + offsets.at[positions].get(mode="fill", fill_value=0)


class LowRankAddition(nnx.Module):
    """The term that LoRA adds to the output of a `Linear`: `dropout(x) @ down @ up * scale`.

    Attributes:
      down, up: `[in, R]` and `[R, out]`.
      scale: the factor of the term.
      dropout: the probability with which an input is set to zero. It has no effect without `key`.
      key: the random key for dropout in training, or None.
    """

    def __init__(
        self, down: jax.Array, up: jax.Array, scale: float, dropout: float, key: jax.Array | None
    ):
        self.down, self.up, self.key = nnx.Param(down), nnx.Param(up), nnx.data(key)
        self.scale, self.dropout = scale, dropout

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[..., in]` to `[..., out]`."""
        if self.key is not None and self.dropout:
            kept = jax.random.bernoulli(self.key, 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), 0)
        return (x @ self.down[...].astype(x.dtype)) @ self.up[...].astype(x.dtype) * self.scale


class Linear(nnx.Module):
    """A linear layer `x @ kernel + bias`, or one such layer without bias for each expert.

    Attributes:
      kernel: `[in, out]`, or `[E, in, out]` with experts. An int4 kernel has two inputs in each
        byte, so it is `[in/2, out]` or `[E, in/2, out]`.
      scale: `[out]` or `[E, out]`, the scale of each output channel of an int8 kernel, or None.
      group_scale, group_offset: `[G, out]` or `[E, G, out]`, the scale and the offset of each
        group of inputs of an int4 kernel, or None.
      bias: `[out]` or None.
      low_rank: the term that LoRA adds, or None. Experts cannot have one.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool = False,
        quantize: Quantization | None = None,
        experts: int | None = None,
    ):
        stack = () if experts is None else (experts,)
        arrays = {
            name: nnx.Param(jnp.zeros((*stack, *array.shape), array.dtype))
            for name, array in stored_arrays(quantize, inputs, outputs).items()
        }
        self.kernel = arrays["kernel"]
        self.scale, self.group_scale, self.group_offset = map(arrays.get, COMPANIONS)
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None
        self.low_rank: LowRankAddition | None = nnx.data(None)

    def __call__(self, x: jax.Array, of_expert: jax.Array | None = None) -> jax.Array:
        """Apply the layer.

        Args:
          x: `[..., in]`, or with experts `[N, in]` sorted by expert.
          of_expert: `[N]`, the expert of each row; None without experts.

        Returns:
          `[..., out]`.
        """
        kernel = self._kernel(x.dtype)
        if of_expert is None:
            y = x @ kernel
        else:
            sizes = jnp.bincount(of_expert, length=kernel.shape[0])
            y = jax.lax.ragged_dot(x, kernel, sizes)
        if self.scale is not None:
            scale = self.scale[...] if of_expert is None else self.scale[...][of_expert]
            y = (y.astype(jnp.float32) * scale).astype(x.dtype)
        if self.low_rank is not None:
            y = y + self.low_rank(x)
        return y if self.bias is None else y + self.bias[...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape `[..., in, out]` of the kernel before it was quantized."""
        return kernel_shape(self.kernel)

    def _kernel(self, dtype: Any) -> jax.Array:
        """Return the kernel in a dtype. The scale of an int8 kernel is left for the output."""
        if self.group_scale is None or self.group_offset is None:
            return self.kernel[...].astype(dtype)
        names = "kernel", "group_scale", "group_offset"
        return dequantize({name: getattr(self, name)[...] for name in names}, dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalization in float32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, epsilon: float):
        self.scale = nnx.Param(jnp.zeros(size))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.epsilon)
        return (wide * self.scale[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalization in float32 (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, size: int, epsilon: float):
        self.scale = nnx.Param(jnp.zeros(size))
        self.bias = nnx.Param(jnp.zeros(size))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide - wide.mean(axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.epsilon)
        return (wide * self.scale[...] + self.bias[...]).astype(x.dtype)


class Attention(nnx.Module):
    """The four linear layers of an attention layer. The block that owns them computes attention."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        *,
        bias: bool = False,
        output_bias: bool = False,
        quantize: Quantization | None = None,
    ):
        width, kv_width = num_heads * head_size, num_kv_heads * head_size
        self.query = Linear(hidden_size, width, bias=bias, quantize=quantize)
        self.key = Linear(hidden_size, kv_width, bias=bias, quantize=quantize)
        self.value = Linear(hidden_size, kv_width, bias=bias, quantize=quantize)
        self.output = Linear(width, hidden_size, bias=output_bias, quantize=quantize)


def heads(x: jax.Array, size: int) -> jax.Array:
    """Reshape `[B, T, heads · h]` to `[B, T, heads, h]`."""
    return x.reshape(*x.shape[:-1], -1, size)


def join_heads(x: jax.Array) -> jax.Array:
    """Reshape `[B, T, heads, h]` to `[B, T, heads · h]`."""
    return x.reshape(*x.shape[:-2], -1)


class FeedForward(nnx.Module):
    """A feed-forward layer, optionally gated (Shazeer 2020, arXiv:2002.05202).

    It computes `down(activation(up(x)))`, or gated `down(activation(gate(x)) * up(x))`.
    """

    def __init__(
        self,
        hidden_size: int,
        size: int,
        *,
        activation: str,
        gated: bool,
        bias: bool = False,
        quantize: Quantization | None = None,
        experts: int | None = None,
    ):
        linear = partial(Linear, bias=bias, quantize=quantize, experts=experts)
        self.gate = linear(hidden_size, size) if gated else None
        self.up = linear(hidden_size, size)
        self.down = linear(size, hidden_size)
        self.activation = activation

    def __call__(self, x: jax.Array, of_expert: jax.Array | None = None) -> jax.Array:
        activation, up = ACTIVATIONS[self.activation], self.up(x, of_expert)
        inner = activation(up) if self.gate is None else activation(self.gate(x, of_expert)) * up
        return self.down(inner, of_expert)


class Experts(nnx.Module):
    """A mixture of feed-forward layers (Shazeer et al. 2017, arXiv:1701.06538).

    A router chooses a few experts for each token. Tokens are sorted by expert, so that each
    expert computes only its own tokens.
    """

    def __init__(
        self,
        hidden_size: int,
        size: int,
        *,
        activation: str,
        gated: bool,
        quantize: Quantization | None,
        num_experts: int,
        experts_per_token: int,
        normalized: bool,
        mesh: Mesh | None = None,
    ):
        self.mesh = mesh
        self.router = Linear(hidden_size, num_experts)
        self.experts = FeedForward(
            hidden_size,
            size,
            activation=activation,
            gated=gated,
            quantize=quantize,
            experts=num_experts,
        )
        self.experts_per_token, self.normalized = experts_per_token, normalized

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[B, T, D]` to `[B, T, D]`."""
        graphdef, weights = nnx.split(self)
        return on_each_device(
            lambda weights, x: nnx.merge(graphdef, weights).mix(x),
            self.mesh,
            weights,
            axes_when_gathered,
            x,
        )

    def mix(self, x: jax.Array) -> jax.Array:
        """Map `[B, T, D]` to `[B, T, D]` on one device."""
        tokens = x.reshape(-1, x.shape[-1])  # [N, D]
        weights = jax.nn.softmax(self.router(tokens).astype(jnp.float32))  # [N, E]
        weights, chosen = jax.lax.top_k(weights, self.experts_per_token)
        if self.normalized:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        order = jnp.argsort(chosen.reshape(-1))
        of_token = order // self.experts_per_token
        mixed = self.experts(tokens[of_token], chosen.reshape(-1)[order])
        mixed = mixed * weights.reshape(-1)[order][:, None].astype(x.dtype)
        return jnp.zeros_like(tokens).at[of_token].add(mixed).reshape(x.shape)
