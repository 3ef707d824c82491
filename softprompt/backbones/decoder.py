"""The backbone of causal language models: one decoder, configured by an `Architecture`.

Axis letters: B batch, T tokens, P virtual tokens, D hidden, H query heads, K key-value heads,
h head size, L layers, V vocabulary, G packs, N tokens of a pack, M targets of a pack.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from softprompt.backbones.architecture import Architecture, LayerKind
from softprompt.backbones.attention import Source, attend, causal_mask, same_sequence
from softprompt.backbones.batch import Batch
from softprompt.backbones.block import Block
from softprompt.backbones.flash import AttentionName, Kernel, flash_attend, kernel_of
from softprompt.backbones.head import OutputHead
from softprompt.backbones.layers import Embedding, LayerNorm, Linear, RMSNorm
from softprompt.backbones.packing import AS_ROWS, Rows
from softprompt.backbones.prefix import Cache, Prefix, positions_within
from softprompt.backbones.quantization import Quantization
from softprompt.backbones.rope import angles
from softprompt.parallel.mesh import ROWS, divide
from softprompt.parallel.sharding import gather_layer


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

    def target_states(self, batch: Batch, prefix: Prefix | None) -> jax.Array:
        """Return the hidden states `[G, M, D]` from which the targets are predicted."""
        positions = batch.rows.positions if batch.positions is None else batch.positions
        embeddings = self.embedding.with_offsets(batch.tokens, positions)
        return self._run(embeddings, batch.positions, batch.segments, prefix, batch=batch)[0]

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
        positions = cache.lengths[:, None]
        embeddings = self.embedding.with_offsets(tokens[:, None], positions)
        hidden, (keys, values) = self._run(embeddings, positions, None, prefix, cache)
        return hidden[:, 0], cache.append(keys, values)

    def _run(self, x, positions=None, segments=None, prefix=None, cache=None, batch=None):
        """Run all layers on `x`, attending to the prefix, the cache and the row itself.

        Args:
          x: rows `[B, T, D]`, or the packed tokens `[G, N, D]` of `batch`.
          positions, segments: `[B, T]`, or `[G, N]` with a batch; None if each row is one sequence.
          prefix, cache: what rows attend to before their own tokens.
          batch: if given, the last layer computes only the states of its targets.

        Returns:
          Normalized hidden states `[B, T, D]`, and the new keys and values `[L, B, T, K, h]`. With
          a batch, the hidden states `[G, M, D]` of its targets, and None.
        """
        arch = self.arch
        scale = arch.attention_scale or arch.head_size**-0.5
        spans = None if prefix is None else prefix.spans
        # Flash attention is correct only if a row is one sequence and attends to the whole prefix.
        kernel: Kernel | None = None
        if self.attention != "xla" and positions is None and segments is None and spans is None:
            kernel = kernel_of(self.attention)
        if batch is None:
            tokens = targets = _Tokens.of_rows(x, positions, segments)
        else:
            tokens = _Tokens.of_batch(batch)
            targets = _Tokens.of_targets(batch, tokens)
        prefix_length: int | jax.Array = prefix.length if prefix else 0
        prefix_positions = jnp.arange(prefix_length)[None]
        if spans is not None:
            prefix_positions, prefix_length = positions_within(spans, prefix_positions.size)
        if arch.learned_positions:
            x = x + self.positions[...][tokens.positions + prefix_length]

        kinds = list(dict.fromkeys(arch.layers))
        has_windows = any(kind.window for kind in kinds)
        masks_prefix = prefix is not None and (spans is not None or has_windows)

        def masks(kind: LayerKind, queries: _Tokens):
            """Return which keys the queries see: of the row itself, the prefix and the cache."""
            own_mask = causal_mask(queries.in_rows, tokens.in_rows, kind.window)
            if tokens.segments is not None and queries.segments is not None:
                own_mask &= same_sequence(queries.segments, tokens.segments)
            prefix_mask = cache_mask = None
            if masks_prefix:
                positions = queries.in_rows + prefix_length
                prefix_mask = causal_mask(positions, prefix_positions, kind.window)
            if cache:
                cache_mask = causal_mask(queries.in_rows, cache.positions, kind.window)
            return own_mask, prefix_mask, cache_mask

        def by_kind(function):
            """Stack what a function returns for each kind: all layers run in one scan."""
            return jax.tree.map(lambda *each: jnp.stack(each), *map(function, kinds))

        rotary = by_kind(lambda k: k.rope and angles(k.rope, tokens.positions + prefix_length))
        kind_of_layer = jnp.array([kinds.index(kind) for kind in arch.layers])

        def layer_for(queries: _Tokens):
            """Return the function that computes a layer's outputs for some tokens."""
            masks_by_kind = by_kind(partial(masks, queries=queries))

            def layer(x, inputs):
                block, kind, from_prefix, from_cache = inputs
                block, x = gather_layer(block, self.mesh), divide(x, self.mesh, ROWS)
                angles, masks = jax.tree.map(lambda a: a[kind], (rotary, masks_by_kind))
                own_mask, prefix_mask, cache_mask = masks

                def attention(q, keys, values):
                    q = queries.rows.to_rows(q)
                    keys, values = tokens.rows.to_rows(keys), tokens.rows.to_rows(values)
                    softcap = arch.attention_softcap
                    if kernel is not None and queries is tokens:
                        flash = partial(flash_attend, kernel=kernel, scale=scale, softcap=softcap)
                        forms = [partial(flash, window=k.window, mesh=self.mesh) for k in kinds]
                        mixed = jax.lax.switch(kind, forms, q, keys, values, from_prefix)
                        return queries.rows.from_rows(mixed)
                    sources = [Source(keys, values, own_mask)]
                    if from_prefix is not None:
                        sources.append(Source(from_prefix[0], from_prefix[1], prefix_mask))
                    if from_cache is not None:
                        sources.append(Source(from_cache[0], from_cache[1], cache_mask))
                    mixed = attend(q, sources, scale=scale, softcap=softcap)
                    return queries.rows.from_rows(mixed)

                return block(x, angles, attention, queries.select)

            return layer

        from_prefix = (prefix.keys, prefix.values) if prefix else None
        from_cache = (cache.keys, cache.values) if cache else None
        inputs = self.layers, kind_of_layer, from_prefix, from_cache
        if batch is None:
            x, keys_values = jax.lax.scan(_recomputed(layer_for(tokens)), x, inputs)
            return self.norm(x), keys_values
        x = _all_but_last(layer_for(tokens), x, inputs, self.trained)
        x, _ = _recomputed(layer_for(targets))(x, jax.tree.map(lambda a: a[-1], inputs))
        return self.norm(x), None


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


def _same(tokens: jax.Array) -> jax.Array:
    return tokens


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """The tokens that a layer reads, or those whose outputs it computes.

    Attributes:
      positions: of the tokens in their rows, `[B or 1, T]`; `[G, N]` if they are packed.
      in_rows: the same positions as rows, `[B or 1, T]`.
      segments: as rows, `[B, T]`, see `same_sequence`; None if each row is one sequence.
      rows: where the rows are.
      select: takes these tokens from all.
    """

    positions: jax.Array
    in_rows: jax.Array
    segments: jax.Array | None
    rows: Rows = AS_ROWS
    select: Callable[[jax.Array], jax.Array] = _same

    @classmethod
    def of_rows(cls, x, positions, segments) -> "_Tokens":
        """Return the tokens of rows, with the arguments of `Decoder._run`."""
        positions = jnp.arange(x.shape[1])[None] if positions is None else positions
        return cls(positions, positions, segments)

    @classmethod
    def of_batch(cls, batch: Batch) -> "_Tokens":
        """Return all tokens of a batch."""
        rows = batch.rows
        if batch.positions is None:
            in_rows = jnp.arange(rows.row_length)[None]
            return cls(rows.positions, in_rows, None, rows)
        in_rows, segments = rows.to_rows(batch.positions), rows.to_rows(batch.segments + 1) - 1
        return cls(batch.positions, in_rows, segments, rows)

    @classmethod
    def of_targets(cls, batch: Batch, tokens: "_Tokens") -> "_Tokens":
        """Return the tokens of a batch from which its targets are predicted."""

        def select(tokens: jax.Array) -> jax.Array:
            indices = batch.target_indices.reshape(*batch.targets.shape, *[1] * (tokens.ndim - 2))
            return jnp.take_along_axis(tokens, indices, axis=1)

        rows = batch.target_rows
        positions, segments = select(tokens.positions), None
        if batch.segments is not None:
            segments = rows.to_rows(select(batch.segments) + 1) - 1
        in_rows = rows.to_rows(positions)
        return cls(positions, in_rows, segments, rows, select)
