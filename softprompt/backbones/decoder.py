"""One configurable causal decoder: a frozen language model as a Flax NNX module.

Axis letters: B batch, T tokens, S cached tokens, P virtual tokens, D hidden,
F feed-forward, H query heads, K key-value heads, h head size, L layers, V vocabulary,
M target positions.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from softprompt.backbones.architecture import Architecture, LayerKind
from softprompt.backbones.attention import Source, attend, causal_mask, same_sequence
from softprompt.backbones.batch import Batch
from softprompt.backbones.flash import flash_attend
from softprompt.backbones.layers import (
    Attention,
    Embedding,
    Experts,
    FeedForward,
    LayerNorm,
    Linear,
    RMSNorm,
    heads,
    join_heads,
)
from softprompt.backbones.prefix import Cache, Prefix, positions_within
from softprompt.backbones.rope import angles, rotate


class Block(nnx.Module):
    """One layer: attention and a feed-forward layer, each with its norms, added back."""

    def __init__(self, arch: Architecture, int8: bool):
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
            int8=int8,
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
                int8=int8,
                num_experts=arch.num_experts,
                experts_per_token=arch.experts_per_token,
                normalized=arch.normalized_experts,
            )
        else:
            self.feed_forward = FeedForward(
                *sizes,
                activation=arch.activation,
                gated=arch.gated,
                bias=arch.feed_forward_bias,
                int8=int8,
            )

    def __call__(self, x, turns, mix):
        """One layer.

        Args:
          x: `[B, T, D]`.
          turns: rotary angles, or None.
          mix: from queries, keys and values to `[B, T, H, h]`: the attention proper.

        Returns:
          `[B, T, D]`, and this layer's own keys and values `[B, T, K, h]`.
        """
        mixed, keys_values = self._attention(x, turns, mix)
        middle = x + mixed
        x = middle + self._feed_forward(x if self.arch.parallel else middle)
        return x, keys_values

    def _attention(self, x, turns, mix):
        arch = self.arch
        if arch.norm_before:
            x = self.attention_norm(x)
        queries, keys = self.attention.query(x), self.attention.key(x)
        if arch.query_key_norm == "width":
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        queries, keys = heads(queries, arch.head_size), heads(keys, arch.head_size)
        if arch.query_key_norm == "head":
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        if turns is not None:
            queries, keys = rotate(queries, turns), rotate(keys, turns)
        values = heads(self.attention.value(x), arch.head_size)
        mixed = self.attention.output(join_heads(mix(queries, keys, values)))
        if arch.norm_behind:
            mixed = self.attention_norm_behind(mixed)
        return mixed * arch.residual_scale, (keys, values)

    def _feed_forward(self, x):
        arch = self.arch
        x = self.feed_forward(self.feed_forward_norm(x) if arch.norm_before else x)
        if arch.norm_behind:
            x = self.feed_forward_norm_behind(x)
        return x * arch.residual_scale


class Decoder(nnx.Module):
    """A causal language model. Its layers are stacked `[L, ...]` and run by one scan."""

    separate_targets = False
    caches_prompt = True
    tied_head_scale = 1.0
    auto_class = "AutoModelForCausalLM"
    decoder_start_token: int | None = None

    def __init__(
        self, arch: Architecture, *, int8: bool = False, attention: Literal["xla", "cudnn"] = "xla"
    ):
        self.arch, self.attention = arch, attention
        self.embedding = Embedding(arch.vocab_size, arch.hidden_size, arch.embedding_scale)
        if arch.learned_positions:
            self.positions = nnx.Param(jnp.zeros((arch.context_length, arch.hidden_size)))
        self.layers = nnx.vmap(lambda _: Block(arch, int8))(jnp.arange(len(arch.layers)))
        norm = LayerNorm if arch.norm == "layer" else RMSNorm
        self.norm = norm(arch.hidden_size, arch.norm_epsilon)
        if not arch.tied_head:
            self.head = Linear(arch.hidden_size, arch.vocab_size, int8=int8)

    def __repr__(self) -> str:
        arch = self.arch
        return f"Decoder({len(arch.layers)} layers, hidden size {arch.hidden_size})"

    def __call__(
        self,
        embeddings: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        prefix: Prefix | None = None,
    ) -> jax.Array:
        """Hidden states after the last norm.

        Args:
          embeddings: `[B, T, D]`, what the first layer reads: see `Embedding`.
          positions: `[B, T]`, counted from each row's own first token.
          segments: `[B, T]`, see `attention.same_sequence`. Both may be None where each row
            is one sequence, padded on the right if at all.
          prefix: what all rows attend to before their own tokens.

        Returns:
          `[B, T, D]`.
        """
        return self._run(embeddings, positions, segments, prefix)[0]

    def prefix_shape(self, length: int) -> tuple[int, int, int, int]:
        """That of the keys, and of the values, of so many virtual tokens: `[L, P, K, h]`."""
        arch = self.arch
        return len(arch.layers), length, arch.num_kv_heads, arch.head_size

    def prefix_from(self, keys: jax.Array, values: jax.Array) -> Prefix:
        """Make a prefix from keys and values `[L, P, K, h]`."""
        return Prefix(keys, values)

    def initial_prefix(self, vectors: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Start prefix tuning from the keys and values that the model computes for `vectors`."""
        vectors = vectors.astype(self.embedding.table.dtype)
        prefix = jax.jit(lambda backbone, x: backbone.prefill(x))(self, vectors)
        return prefix.keys.astype(jnp.float32), prefix.values.astype(jnp.float32)

    def prefill(self, embeddings: jax.Array, prefix: Prefix | None = None) -> Prefix:
        """Run vectors `[P, D]` through the model once and keep each layer's keys and values.

        In a causal model nothing behind them can change these, so a prefix made from
        prompt vectors stands exactly for the vectors themselves in front of every row.
        What it is run behind, if anything, becomes its beginning.
        """
        _, (keys, values) = self._run(embeddings[None], prefix=prefix)
        keys, values = keys[:, 0], values[:, 0]
        if prefix is not None:
            keys = jnp.concatenate([prefix.keys, keys], axis=1)
            values = jnp.concatenate([prefix.values, values], axis=1)
        return Prefix(keys, values)

    def target_states(self, batch: Batch, prefix: Prefix | None) -> jax.Array:
        """The hidden states that a batch's targets are predicted from, `[B, M, D]`."""
        embeddings = self.embedding.with_offsets(batch.tokens, batch.positions)
        hidden = self(embeddings, batch.positions, batch.segments, prefix)
        return jnp.take_along_axis(hidden, batch.target_indices[..., None], axis=1)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states `[..., D]` to float32 logits `[..., V]`."""
        if self.arch.tied_head:
            table = self.embedding.table[...]
            logits = jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
        else:
            logits = self.head(hidden).astype(jnp.float32)
        logits = logits * self.arch.logit_scale
        if cap := self.arch.logit_softcap:
            logits = cap * jnp.tanh(logits / cap)
        return logits

    def start(
        self, tokens: jax.Array, lengths: jax.Array, prefix: Prefix | None, capacity: int
    ) -> tuple[jax.Array, Cache]:
        """Prefill: read inputs in preparation for `decode`.

        Args:
          tokens: `[B, T]` ids, padded on the right.
          lengths: `[B]`, the number of tokens in each row that are not padding, at least 1.
          prefix: what the rows attend to first.
          capacity: the number of tokens that can be decoded with the returned cache.

        Returns:
          The hidden states `[B, D]` from which the next tokens are predicted, and the cache.
        """
        embeddings = self.embedding.with_offsets(tokens)
        hidden, (keys, values) = self._run(embeddings, prefix=prefix)
        free = [(0, 0), (0, 0), (0, capacity), (0, 0), (0, 0)]
        cache = Cache(jnp.pad(keys, free), jnp.pad(values, free), lengths)
        return hidden[jnp.arange(len(tokens)), lengths - 1], cache

    def decode(
        self, tokens: jax.Array, cache: Cache, prefix: Prefix | None
    ) -> tuple[jax.Array, Cache]:
        """Read the next token of each row, ids `[B]`; returns the same as `start`."""
        positions = cache.lengths[:, None]
        embeddings = self.embedding.with_offsets(tokens[:, None], positions)
        hidden, (keys, values) = self._run(embeddings, positions, None, prefix, cache)
        return hidden[:, 0], cache.append(keys, values)

    def _run(self, x, positions=None, segments=None, prefix=None, cache=None):
        arch = self.arch
        scale = arch.attention_scale or arch.head_size**-0.5
        spans = None if prefix is None else prefix.spans
        flash = (
            self.attention == "cudnn" and positions is None and segments is None and spans is None
        )
        if positions is None:
            positions = jnp.arange(x.shape[1])[None]
        start: int | jax.Array = prefix.length if prefix else 0
        virtual = jnp.arange(start)[None]  # positions of virtual tokens
        if spans is not None:
            virtual, start = positions_within(spans, virtual.size)
        if arch.learned_positions:
            x = x + self.positions[...][positions + start]

        def view(kind: LayerKind):
            """Rotary angles, and what is visible of a row's own tokens, the prefix, the cache."""
            own = causal_mask(positions, positions, kind.window)
            if segments is not None:
                own &= same_sequence(segments)
            hidden = prefix is not None and (spans is not None or windows)
            return (
                None if kind.rope is None else angles(kind.rope, positions + start),
                own,
                causal_mask(positions + start, virtual, kind.window) if hidden else None,
                causal_mask(positions, cache.positions, kind.window) if cache else None,
            )

        windows = any(kind.window for kind in arch.layers)
        kinds = list(dict.fromkeys(arch.layers))
        views = jax.tree.map(lambda *each: jnp.stack(each), *map(view, kinds))
        kind_of = jnp.array([kinds.index(kind) for kind in arch.layers])

        # Backward, keep the outputs of the weight matrices and recompute the rest, which is
        # cheap: on a CPU that is faster than keeping all, for it saves memory traffic.
        @partial(
            jax.checkpoint,
            policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            prevent_cse=False,
        )
        def layer(x, block_and_rest):
            block, kind, before, read = block_and_rest
            turns, own, of_prefix, of_cache = jax.tree.map(lambda each: each[kind], views)

            def mix(queries, keys, values):
                if flash:
                    forms = [partial(flash_attend, scale=scale, window=k.window) for k in kinds]
                    return jax.lax.switch(kind, forms, queries, keys, values, before)
                sources = [Source(keys, values, own)]
                if before is not None:
                    sources.append(Source(before[0], before[1], of_prefix))
                if read is not None:
                    sources.append(Source(read[0], read[1], of_cache))
                return attend(queries, sources, scale=scale, softcap=arch.attention_softcap)

            return block(x, turns, mix)

        before = (prefix.keys, prefix.values) if prefix else None
        read = (cache.keys, cache.values) if cache else None
        x, keys_values = jax.lax.scan(layer, x, (self.layers, kind_of, before, read))
        return self.norm(x), keys_values
