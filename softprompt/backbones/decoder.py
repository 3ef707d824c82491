"""The backbone of causal language models: one decoder, configured by an `Architecture`.

Axis letters: B batch, T tokens, P virtual tokens, D hidden, H query heads, K key-value heads,
h head size, L layers, V vocabulary, G packs, N tokens of a pack, M targets of a pack.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from softprompt.backbones.architecture import Architecture
from softprompt.backbones.batch import Batch
from softprompt.backbones.block import Block
from softprompt.backbones.cache import Cache, CacheView
from softprompt.backbones.decoder_layers import LayerFunctions, kinds_of
from softprompt.backbones.flash import AttentionName, Kernel, kernel_of
from softprompt.backbones.head import OutputHead
from softprompt.backbones.layers import Embedding, LayerNorm, Linear, RMSNorm
from softprompt.backbones.opening import Opening, computed
from softprompt.backbones.packing import AS_ROWS, Packing, Rows
from softprompt.backbones.prefix import Prefix
from softprompt.backbones.quantization import Quantization
from softprompt.backbones.tokens import (
    Tokens,
    tokens_before,
    tokens_of_batch,
    tokens_of_targets,
)


class Decoder(nnx.Module):
    """A causal language model.

    The parameters of all layers are stacked as `[L, ...]`, and one scan runs the layers.

    Args:
      arch: the architecture.
      quantize: how the kernels are quantized, see `quantization`; None for floating point.
      attention: the implementation of attention.
      mesh: the devices that the parameters are divided over; None for one device.

    Attributes:
      trained: whether the parameters of the layers are trained.
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
        quantize: Quantization | None = None,
        attention: AttentionName = "xla",
        mesh: Mesh | None = None,
    ):
        self.arch, self.attention, self.mesh = arch, attention, mesh
        self.trained = False
        self.embedding = Embedding(arch.vocab_size, arch.hidden_size, arch.embedding_scale)
        if arch.learned_positions:
            self.positions = nnx.Param(jnp.zeros((arch.context_length, arch.hidden_size)))
        self.layers = nnx.vmap(lambda _: Block(arch, quantize, mesh))(jnp.arange(len(arch.layers)))
        norm = LayerNorm if arch.norm == "layer" else RMSNorm
        self.norm = norm(arch.hidden_size, arch.norm_epsilon)
        self.head = (
            None if arch.tied_head else Linear(arch.hidden_size, arch.vocab_size, quantize=quantize)
        )

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

    def opening(
        self, embeddings: jax.Array, prefix: Prefix | None = None, spans: jax.Array | None = None
    ) -> Opening:
        """Return an opening of embeddings `[P, D]`. `target_states` reads it with the rows."""
        return Opening(embeddings, prefix, spans)

    def target_states(self, batch: Batch, prefix: Prefix | Opening | None) -> jax.Array:
        """Return the hidden states `[G, M, D]` from which the targets are predicted.

        Each pack reads an opening together with its rows. The last layer computes only what the
        targets need.
        """
        kernel = self._kernel(batch.segments, prefix)
        if kernel is not None:  # it needs keys and values
            prefix = computed(self, prefix)
        opening = prefix if isinstance(prefix, Opening) else None
        first: Prefix | None = prefix.prefix if isinstance(prefix, Opening) else prefix
        groups, before = tokens_before(first, opening)
        size = 0 if opening is None else opening.length
        groups["row"] = tokens_of_batch(batch, before, size)
        targets, select = tokens_of_targets(batch, before, size)
        positions = batch.rows.positions if batch.positions is None else batch.positions
        x = self.embedding.with_offsets(batch.tokens, positions)
        positions, queries = positions + before, ["row"]
        if opening is not None:
            x = _put_in_front(opening.embeddings, x)
            in_opening = jnp.arange(size) + groups["opening"].before
            positions, queries = _put_in_front(in_opening, positions), ["opening", "row"]

        layers = LayerFunctions(self.arch, self.mesh, positions, groups, kernel)
        inputs = self._inputs(first)
        x = self._with_positions(x, positions)
        layer = layers.function_for(*(groups[name] for name in queries))
        x = _all_but_last(layer, x, inputs, self.trained)
        last = _recomputed(layers.function_for(targets, select=select))
        x, _ = last(x, jax.tree.map(lambda a: a[-1], inputs))
        return self.norm(x)

    @property
    def output_head(self) -> OutputHead:
        """The module that maps hidden states to logits."""
        return OutputHead(
            self.embedding,
            self.head,
            self.mesh,
            scale=self.arch.logit_scale,
            softcap=self.arch.logit_softcap,
        )

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Map hidden states `[B, ..., D]` to float32 logits `[B, ..., V]`."""
        return self.output_head(hidden)

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
        hidden, keys, values = self.extend(tokens[:, None], cache.view(), prefix)
        return hidden[:, 0], cache.append(keys, values)

    def extend(
        self,
        tokens: jax.Array,
        cache: CacheView,
        prefix: Prefix | None = None,
        vectors: jax.Array | None = None,
        rows: Rows = AS_ROWS,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Read several more tokens of each row.

        Args:
          tokens: ids `[B, T]`, or packed `[1, N]`.
          cache: the tokens that each row has read. It is not changed.
          prefix: what the rows attend to first.
          vectors: `[B, T, D]`, the embeddings of virtual tokens, whose ids are negative. None if
            there are no virtual tokens.
          rows: where the tokens of each row are, if they are packed.

        Returns:
          Hidden states `[B, T, D]` or `[1, N, D]`, and the keys and values of the tokens as rows,
          `[L, B, T, K, h]`.
        """
        length = rows.row_length if isinstance(rows, Packing) else tokens.shape[1]
        positions = cache.lengths[:, None] + jnp.arange(length)[None]
        embeddings = self.embedding.with_offsets(
            jnp.maximum(tokens, 0) if vectors is not None else tokens, rows.from_rows(positions)
        )
        if vectors is not None:
            virtual = vectors.astype(embeddings.dtype)
            embeddings = jnp.where((tokens < 0)[..., None], virtual, embeddings)
        hidden, keys_values = self._run(embeddings, positions, None, prefix, cache, rows)
        return hidden, *map(jax.vmap(rows.to_rows), keys_values)

    def _run(self, x, positions=None, segments=None, prefix=None, cache=None, rows=AS_ROWS):
        """Run all layers on rows, attending to the prefix, the cache and the row itself.

        Args:
          x: `[B, T, D]`, or packed `[G, N, D]`.
          positions, segments: `[B, T]`; None if each row is one sequence.
          prefix, cache: what rows attend to before their own tokens.
          rows: where the tokens of each row are, if they are packed.

        Returns:
          Normalized hidden states like `x`, and the new keys and values, `[L, B, T, K, h]` or
          `[L, G, N, K, h]`.
        """
        prefix, kernel = computed(self, prefix), None
        if positions is None:
            kernel = self._kernel(segments, prefix)
            positions = jnp.arange(x.shape[1])[None]
        groups, before = tokens_before(prefix, None, cache)
        groups["row"] = own = Tokens(
            positions, before, segments, to_rows=rows.to_rows, from_rows=rows.from_rows
        )
        positions = rows.from_rows(positions + before)
        layers = LayerFunctions(self.arch, self.mesh, positions, groups, kernel)
        layer, inputs = _with_cache(layers.function_for(own), cache), self._inputs(prefix, cache)
        x, keys_values = jax.lax.scan(
            _recomputed(layer), self._with_positions(x, positions), inputs
        )
        return self.norm(x), keys_values

    def _kernel(self, segments, prefix) -> Kernel | None:
        """Return the kernel of flash attention, or None if it cannot be used.

        It is correct only if a row is one sequence and attends to the whole prefix.
        """
        is_whole = prefix is None or prefix.spans is None
        if self.attention == "xla" or segments is not None or not is_whole:
            return None
        return kernel_of(self.attention)

    def _with_positions(self, x, positions):
        """Add learned positions to embeddings."""
        return x + self.positions[...][positions] if self.arch.learned_positions else x

    def _inputs(self, prefix, cache=None):
        """Return what differs between layers, as arrays `[L, ...]`."""
        kinds = kinds_of(self.arch)
        stored: dict[str, Any] = {}
        if prefix is not None:
            stored["prefix"] = prefix.keys[:, None], prefix.values[:, None]
        if cache is not None:
            stored["cache"] = jnp.arange(len(self.arch.layers))  # see `_with_cache`
        return self.layers, jnp.array([kinds.index(kind) for kind in self.arch.layers]), stored


# For the backward pass, keep the outputs of the weight matrices and recompute the rest. On a CPU
# this is faster than keeping everything, because it saves memory traffic.
_recomputed = partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    prevent_cse=False,
)


def _all_but_last(layer, x, inputs, trained: bool):
    """Run all layers but the last.

    Args:
      layer: a function from hidden states and the inputs of a layer to hidden states and more.
      x: hidden states.
      inputs: a pytree of arrays `[L, ...]`.
      trained: whether all inputs are differentiated.
    """
    if trained:  # a scan over an index would add up gradients of the size of all layers
        sliced = jax.tree.map(lambda a: a[:-1], inputs)
        return jax.lax.scan(_recomputed(lambda x, each: (layer(x, each)[0], None)), x, sliced)[0]

    @_recomputed
    def numbered(x, number):
        return layer(x, jax.tree.map(lambda a: a[number], inputs))[0], None

    # Slices of all layers but the last would be a copy of the model.
    count = len(jax.tree.leaves(inputs)[0])
    return jax.lax.scan(numbered, x, jnp.arange(count - 1))[0]


def _with_cache(layer, cache: CacheView | None):
    """Return a layer that reads its keys and values from the cache.

    A scan over the cache would copy all of it.
    """
    if cache is None:
        return layer

    def reading(x, inputs):
        block, kind, stored = inputs
        return layer(x, (block, kind, stored | {"cache": cache.of_layer(stored["cache"])}))

    return reading


def _put_in_front(first: jax.Array, packed: jax.Array) -> jax.Array:
    """Put an array `[P, ...]` in front of each pack of an array `[G, N, ...]`."""
    return jnp.concatenate([jnp.broadcast_to(first, (len(packed), *first.shape)), packed], axis=1)
