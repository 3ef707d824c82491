"""One layer of a decoder.

Axis letters: B batch, T tokens, M tokens to compute outputs for, D hidden, H query heads,
K key-value heads, h head size.
"""

from functools import partial

import jax
from flax import nnx
from jax.sharding import Mesh

from softprompt.backbones.architecture import Architecture
from softprompt.backbones.layers import (
    Attention,
    Experts,
    FeedForward,
    LayerNorm,
    RMSNorm,
    heads,
    join_heads,
)
from softprompt.backbones.quantization import Quantization
from softprompt.backbones.rope import rotate


class Block(nnx.Module):
    """A decoder layer: attention and a feed-forward layer with norms and residual connections."""

    def __init__(self, arch: Architecture, quantize: Quantization | None, mesh: Mesh | None):
        self.arch = arch
        width = arch.head_size if arch.query_key_norm == "head" else None
        norm = partial(LayerNorm if arch.norm == "layer" else RMSNorm, epsilon=arch.norm_epsilon)
        self.attention = Attention(
            arch.hidden_size,
            arch.num_heads,
            arch.num_kv_heads,
            arch.head_size,
            bias=arch.attention_bias,
            output_bias=arch.output_bias,
            quantize=quantize,
        )
        if arch.query_key_norm != "none":
            self.query_norm = norm(width or arch.num_heads * arch.head_size)
            self.key_norm = norm(width or arch.num_kv_heads * arch.head_size)
        if arch.norm_before:
            self.attention_norm = norm(arch.hidden_size)
            self.feed_forward_norm = norm(arch.hidden_size)
        if arch.norm_behind:
            self.attention_norm_behind = norm(arch.hidden_size)
            self.feed_forward_norm_behind = norm(arch.hidden_size)
        sizes = arch.hidden_size, arch.feed_forward_size
        if arch.num_experts:
            self.feed_forward: Experts | FeedForward = Experts(
                *sizes,
                activation=arch.activation,
                gated=arch.gated,
                quantize=quantize,
                num_experts=arch.num_experts,
                experts_per_token=arch.experts_per_token,
                normalized=arch.normalized_experts,
                mesh=mesh,
            )
        else:
            self.feed_forward = FeedForward(
                *sizes,
                activation=arch.activation,
                gated=arch.gated,
                bias=arch.feed_forward_bias,
                quantize=quantize,
            )

    def __call__(self, x, rotary, attention, select=lambda tokens: tokens):
        """Run the layer.

        Args:
          x: `[B, T, D]`, or packed.
          rotary: angles as returned by `rope.angles`, or None.
          attention: a function from queries, keys and values to attention outputs
            `[B, M, H, h]`.
          select: takes from `[B, T, ...]` the tokens to compute outputs for, `[B, M, ...]`. By
            default these are all tokens.

        Returns:
          Hidden states `[B, M, D]`, and the layer's keys and values `[B, T, K, h]`. If `x` is
          packed, all of these are packed too.
        """
        mixed, keys_values = self._attention(x, rotary, attention, select)
        x = select(x)
        middle = x + mixed
        x = middle + self._feed_forward(x if self.arch.parallel else middle)
        return x, keys_values

    def _attention(self, x, rotary, attention, select):
        arch = self.arch
        if arch.norm_before:
            x = self.attention_norm(x)
        queries, keys = self.attention.query(select(x)), self.attention.key(x)
        if arch.query_key_norm == "width":
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        queries, keys = heads(queries, arch.head_size), heads(keys, arch.head_size)
        if arch.query_key_norm == "head":
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        if rotary is not None:
            queries, keys = rotate(queries, jax.tree.map(select, rotary)), rotate(keys, rotary)
        values = heads(self.attention.value(x), arch.head_size)
        mixed = self.attention.output(join_heads(attention(queries, keys, values)))
        if arch.norm_behind:
            mixed = self.attention_norm_behind(mixed)
        return mixed * arch.residual_scale, (keys, values)

    def _feed_forward(self, x):
        arch = self.arch
        x = self.feed_forward(self.feed_forward_norm(x) if arch.norm_before else x)
        if arch.norm_behind:
            x = self.feed_forward_norm_behind(x)
        return x * arch.residual_scale
