"""One configurable causal decoder: a frozen language model as a Flax NNX module.

Axis letters: B batch, T tokens, P virtual tokens, D hidden, F feed-forward, H query
heads, K key-value heads, h head size, L layers, V vocabulary, M target positions.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from softprompt.backbones.attention import Prefix, attend, rotary_angles, rotate, visibility


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Everything that tells one decoder from another, apart from its weights."""

    vocab_size: int  # V
    hidden_size: int  # D
    feed_forward_size: int  # F
    num_layers: int  # L
    num_heads: int  # H
    num_kv_heads: int  # K
    head_size: int  # h
    context_length: int  # most tokens the model was made for, virtual tokens included
    rope_theta: float
    norm_epsilon: float
    tied_head: bool

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not field.type or (field.type is not bool and value <= 0):
                raise ValueError(f"{field.name} {value!r}")
        if self.num_heads % self.num_kv_heads or self.head_size % 2:
            raise ValueError("sizes of attention heads that do not fit one another")


class Linear(nnx.Module):
    """`x @ kernel`, kernel `[in, out]`."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (inputs, outputs)) * inputs**-0.5)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel[...]


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation, in float32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(size))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.epsilon)
        return wide.astype(x.dtype) * self.scale[...]


class Block(nnx.Module):
    """One layer: attention, then a gated feed-forward, each behind a norm and added back."""

    def __init__(self, arch: Architecture, *, rngs: nnx.Rngs):
        self.arch = arch
        width, kv_width = arch.num_heads * arch.head_size, arch.num_kv_heads * arch.head_size
        self.attention_norm = RMSNorm(arch.hidden_size, arch.norm_epsilon)
        self.query = Linear(arch.hidden_size, width, rngs=rngs)
        self.key = Linear(arch.hidden_size, kv_width, rngs=rngs)
        self.value = Linear(arch.hidden_size, kv_width, rngs=rngs)
        self.output = Linear(width, arch.hidden_size, rngs=rngs)
        self.feed_forward_norm = RMSNorm(arch.hidden_size, arch.norm_epsilon)
        self.gate = Linear(arch.hidden_size, arch.feed_forward_size, rngs=rngs)
        self.up = Linear(arch.hidden_size, arch.feed_forward_size, rngs=rngs)
        self.down = Linear(arch.feed_forward_size, arch.hidden_size, rngs=rngs)

    def __call__(self, x, angles, visible, prefix: tuple[jax.Array, jax.Array] | None):
        """`[B, T, D]` to `[B, T, D]`, and this layer's own keys and values `[B, T, K, h]`."""
        heads = (*x.shape[:2], -1, self.arch.head_size)
        normed = self.attention_norm(x)
        queries = rotate(self.query(normed).reshape(heads), angles)
        keys = rotate(self.key(normed).reshape(heads), angles)
        values = self.value(normed).reshape(heads)
        mixed = attend(queries, keys, values, visible, *(prefix or ()))
        x = x + self.output(mixed.reshape(*x.shape[:2], -1))
        normed = self.feed_forward_norm(x)
        x = x + self.down(jax.nn.silu(self.gate(normed)) * self.up(normed))
        return x, (keys, values)


class Decoder(nnx.Module):
    """A causal language model. Its layers are stacked `[L, ...]` and run by one scan."""

    def __init__(self, arch: Architecture, *, rngs: nnx.Rngs):
        self.arch = arch
        self.embedding = nnx.Param(
            jax.random.normal(rngs.params(), (arch.vocab_size, arch.hidden_size)) * 0.02
        )
        self.layers = nnx.vmap(lambda rngs: Block(arch, rngs=rngs))(rngs.split(arch.num_layers))
        self.norm = RMSNorm(arch.hidden_size, arch.norm_epsilon)
        if not arch.tied_head:
            self.head = Linear(arch.hidden_size, arch.vocab_size, rngs=rngs)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Token ids `[...]` to input embeddings `[..., D]`."""
        return self.embedding[...][tokens]

    def __call__(
        self,
        embeddings: jax.Array,
        positions: jax.Array,
        segments: jax.Array,
        prefix: Prefix | None = None,
    ) -> jax.Array:
        """Hidden states after the last norm.

        Args:
          embeddings: `[B, T, D]`, see `embed`.
          positions: `[B, T]`, counted from each row's own first token.
          segments: `[B, T]`, see `attention.visibility`.
          prefix: what all rows attend to before their own tokens.

        Returns:
          `[B, T, D]`.
        """
        return self._run(embeddings, positions, segments, prefix)[0]

    def prefill(self, embeddings: jax.Array) -> Prefix:
        """Run P vectors `[P, D]` through the model once and keep each layer's keys and values.

        In a causal model nothing behind them can change these, so a prefix made from
        prompt vectors stands exactly for the vectors themselves in front of every row.
        """
        positions = jnp.arange(embeddings.shape[0])[None]
        _, (keys, values) = self._run(embeddings[None], positions, jnp.zeros_like(positions), None)
        return Prefix(keys[:, 0], values[:, 0])

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states `[..., D]` to float32 logits `[..., V]`."""
        if self.arch.tied_head:
            logits = jnp.einsum("...d,vd->...v", hidden, self.embedding[...])
        else:
            logits = self.head(hidden)
        return logits.astype(jnp.float32)

    def _run(self, x, positions, segments, prefix):
        visible = visibility(positions, segments)
        start = prefix.length if prefix else 0
        angles = rotary_angles(positions + start, self.arch.head_size, self.arch.rope_theta)

        # Backward, keep the outputs of the weight matrices and recompute the rest, which is
        # cheap: on a CPU that is faster than keeping all, for it saves memory traffic.
        @partial(
            jax.checkpoint,
            policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            prevent_cse=False,
        )
        def layer(x, block_and_prefix):
            block, layer_prefix = block_and_prefix
            return block(x, angles, visible, layer_prefix)

        layer_prefixes = (prefix.keys, prefix.values) if prefix else None
        x, keys_values = jax.lax.scan(layer, x, (self.layers, layer_prefixes))
        return self.norm(x), keys_values
