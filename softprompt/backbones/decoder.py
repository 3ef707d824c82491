"""The backbone of causal language models: one decoder, configured by an `Architecture`.

Axis letters: B batch, T tokens, P virtual tokens, D hidden, F feed-forward, H query heads,
K key-value heads, h head size, L layers, V vocabulary, M target positions.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from softprompt.backbones.architecture import Architecture, LayerKind
from softprompt.backbones.attention import Source, attend, causal_mask, same_sequence
from softprompt.backbones.batch import Batch
from softprompt.backbones.flash import AttentionName, Kernel, flash_attend, kernel_of
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
    vocabulary_logits,
)
from softprompt.backbones.prefix import Cache, Prefix, positions_within
from softprompt.backbones.rope import angles, rotate
from softprompt.parallel.mesh import ROWS, divide
from softprompt.parallel.sharding import gather_layer


class Block(nnx.Module):
    """A decoder layer: attention and a feed-forward layer with norms and residual connections."""

    def __init__(self, arch: Architecture, int8: bool, mesh: Mesh | None):
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
                mesh=mesh,
            )
        else:
            self.feed_forward = FeedForward(
                *sizes,
                activation=arch.activation,
                gated=arch.gated,
                bias=arch.feed_forward_bias,
                int8=int8,
            )

    def __call__(self, x, rotary, attention):
        """Run the layer.

        Args:
          x: `[B, T, D]`.
          rotary: angles as returned by `rope.angles`, or None.
          attention: a function from queries, keys and values to attention outputs
            `[B, T, H, h]`.

        Returns:
          Hidden states `[B, T, D]`, and the layer's keys and values `[B, T, K, h]`.
        """
        mixed, keys_values = self._attention(x, rotary, attention)
        middle = x + mixed
        x = middle + self._feed_forward(x if self.arch.parallel else middle)
        return x, keys_values

    def _attention(self, x, rotary, attention):
        arch = self.arch
        if arch.norm_before:
            x = self.attention_norm(x)
        queries, keys = self.attention.query(x), self.attention.key(x)
        if arch.query_key_norm == "width":
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        queries, keys = heads(queries, arch.head_size), heads(keys, arch.head_size)
        if arch.query_key_norm == "head":
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        if rotary is not None:
            queries, keys = rotate(queries, rotary), rotate(keys, rotary)
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


class Decoder(nnx.Module):
    """A causal language model.

    The parameters of all layers are stacked as `[L, ...]`, and one scan runs the layers.

    Args:
      arch: the architecture.
      int8: whether the weight matrices are int8.
      attention: the implementation of attention.
      mesh: the devices that the parameters are divided over; None for one device.
    """

    separate_targets = False
    caches_prompt = True
    head_scale = 1.0
    auto_class = "AutoModelForCausalLM"
    decoder_start_token: int | None = None

    def __init__(
        self,
        arch: Architecture,
        *,
        int8: bool = False,
        attention: AttentionName = "xla",
        mesh: Mesh | None = None,
    ):
        self.arch, self.attention, self.mesh = arch, attention, mesh
        self.embedding = Embedding(arch.vocab_size, arch.hidden_size, arch.embedding_scale)
        if arch.learned_positions:
            self.positions = nnx.Param(jnp.zeros((arch.context_length, arch.hidden_size)))
        self.layers = nnx.vmap(lambda _: Block(arch, int8, mesh))(jnp.arange(len(arch.layers)))
        norm = LayerNorm if arch.norm == "layer" else RMSNorm
        self.norm = norm(arch.hidden_size, arch.norm_epsilon)
        self.head = None if arch.tied_head else Linear(arch.hidden_size, arch.vocab_size, int8=int8)

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
        """Return the hidden states after the last norm.

        `positions` and `segments` can be None if each row is one sequence, padded on the right.

        Args:
          embeddings: `[B, T, D]`, from `embedding`; learned positions are added to them.
          positions: `[B, T]`, counted from the first token of each row, without the prefix.
          segments: `[B, T]`, see `attention.same_sequence`.
          prefix: the keys and values that rows attend to before their own tokens.

        Returns:
          `[B, T, D]`.
        """
        return self._run(embeddings, positions, segments, prefix)[0]

    def prefix_shape(self, length: int) -> tuple[int, int, int, int]:
        """Return the shape `[L, P, K, h]` of a prefix's keys (and values), with P = `length`."""
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
        """Run embeddings through the model once and keep the keys and values of each layer.

        In a causal model, later tokens cannot change these keys and values. The prefix is
        therefore equivalent to the embeddings themselves at the start of every row.

        Args:
          embeddings: `[P, D]`.
          prefix: a prefix that comes before the embeddings. The result includes it.
        """
        _, (keys, values) = self._run(embeddings[None], prefix=prefix)
        keys, values = keys[:, 0], values[:, 0]
        if prefix is not None:
            keys = jnp.concatenate([prefix.keys, keys], axis=1)
            values = jnp.concatenate([prefix.values, values], axis=1)
        return Prefix(keys, values)

    def target_states(self, batch: Batch, prefix: Prefix | None) -> jax.Array:
        """Return the hidden states `[B, M, D]` from which the targets are predicted."""
        embeddings = self.embedding.with_offsets(batch.tokens, batch.positions)
        hidden = self(embeddings, batch.positions, batch.segments, prefix)
        return jnp.take_along_axis(hidden, batch.target_indices[..., None], axis=1)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Map hidden states `[..., D]` to float32 logits `[..., V]`."""
        logits = vocabulary_logits(hidden, self.embedding, self.head, self.mesh)
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
          lengths: `[B]`, the number of tokens in each row that are not padding. Rows without
            tokens only fill up the batch; what is returned for them has no meaning.
          prefix: what the rows attend to first.
          capacity: the number of tokens that can be decoded with the returned cache.

        Returns:
          The hidden states `[B, D]` from which the next tokens are predicted, and the cache.
        """
        embeddings = self.embedding.with_offsets(tokens)
        hidden, (keys, values) = self._run(embeddings, prefix=prefix)
        free = [(0, 0), (0, 0), (0, capacity), (0, 0), (0, 0)]
        cache = Cache(jnp.pad(keys, free), jnp.pad(values, free), lengths)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return last, cache

    def decode(
        self, tokens: jax.Array, cache: Cache, prefix: Prefix | None
    ) -> tuple[jax.Array, Cache]:
        """Read the next token of each row, ids `[B]`. Return the same as `start`."""
        positions = cache.lengths[:, None]
        embeddings = self.embedding.with_offsets(tokens[:, None], positions)
        hidden, (keys, values) = self._run(embeddings, positions, None, prefix, cache)
        return hidden[:, 0], cache.append(keys, values)

    def _run(self, x, positions=None, segments=None, prefix=None, cache=None):
        """Run all layers on `x` `[B, T, D]`, attending to the prefix, the cache and the row itself.

        Returns:
          Normalized hidden states `[B, T, D]`, and the new keys and values `[L, B, T, K, h]`.
        """
        arch = self.arch
        scale = arch.attention_scale or arch.head_size**-0.5
        spans = None if prefix is None else prefix.spans
        # Flash attention is correct only if a row is one sequence and attends to the whole prefix.
        kernel: Kernel | None = None
        if self.attention != "xla" and positions is None and segments is None and spans is None:
            kernel = kernel_of(self.attention)
        if positions is None:
            positions = jnp.arange(x.shape[1])[None]
        prefix_length: int | jax.Array = prefix.length if prefix else 0
        prefix_positions = jnp.arange(prefix_length)[None]
        if spans is not None:
            prefix_positions, prefix_length = positions_within(spans, prefix_positions.size)
        if arch.learned_positions:
            x = x + self.positions[...][positions + prefix_length]

        kinds = list(dict.fromkeys(arch.layers))
        has_windows = any(kind.window for kind in kinds)
        masks_prefix = prefix is not None and (spans is not None or has_windows)

        def angles_and_masks(kind: LayerKind):
            """Return rotary angles and the masks for the row itself, the prefix and the cache."""
            own_mask = causal_mask(positions, positions, kind.window)
            if segments is not None:
                own_mask &= same_sequence(segments)
            prefix_mask = cache_mask = None
            if masks_prefix:
                prefix_mask = causal_mask(positions + prefix_length, prefix_positions, kind.window)
            if cache:
                cache_mask = causal_mask(positions, cache.positions, kind.window)
            rotary = None if kind.rope is None else angles(kind.rope, positions + prefix_length)
            return rotary, own_mask, prefix_mask, cache_mask

        # All layers run in one scan: each picks the angles and masks of its kind.
        by_kind = jax.tree.map(lambda *each: jnp.stack(each), *map(angles_and_masks, kinds))
        kind_of_layer = jnp.array([kinds.index(kind) for kind in arch.layers])

        # For the backward pass, keep the outputs of the weight matrices and recompute the rest.
        # On a CPU this is faster than keeping everything, because it saves memory traffic.
        @partial(
            jax.checkpoint,
            policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            prevent_cse=False,
        )
        def layer(x, inputs):
            block, kind, from_prefix, from_cache = inputs
            block, x = gather_layer(block, self.mesh), divide(x, self.mesh, ROWS)
            rotary, own_mask, prefix_mask, cache_mask = jax.tree.map(lambda a: a[kind], by_kind)

            def attention(queries, keys, values):
                if kernel is not None:
                    form = partial(
                        flash_attend,
                        kernel=kernel,
                        scale=scale,
                        softcap=arch.attention_softcap,
                        mesh=self.mesh,
                    )
                    forms = [partial(form, window=each.window) for each in kinds]
                    return jax.lax.switch(kind, forms, queries, keys, values, from_prefix)
                sources = [Source(keys, values, own_mask)]
                if from_prefix is not None:
                    sources.append(Source(from_prefix[0], from_prefix[1], prefix_mask))
                if from_cache is not None:
                    sources.append(Source(from_cache[0], from_cache[1], cache_mask))
                return attend(queries, sources, scale=scale, softcap=arch.attention_softcap)

            return block(x, rotary, attention)

        from_prefix = (prefix.keys, prefix.values) if prefix else None
        from_cache = (cache.keys, cache.values) if cache else None
        x, keys_values = jax.lax.scan(
            layer, x, (self.layers, kind_of_layer, from_prefix, from_cache)
        )
        return self.norm(x), keys_values
