"""The backbone of T5 models (Raffel et al. 2020, arXiv:1910.10683), versions 1.0 and 1.1.

Axis letters: B batch, T tokens of an input, P virtual tokens, D hidden, F feed-forward,
H heads, h head size, L layers, V vocabulary, M target positions, S keys.
"""

import dataclasses
import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from softprompt.backbones.attention import Source, causal_mask, same_sequence
from softprompt.backbones.batch import Batch
from softprompt.backbones.cache import T5Cache
from softprompt.backbones.head import OutputHead
from softprompt.backbones.layers import Embedding, Linear, RMSNorm
from softprompt.backbones.packing import AS_ROWS, Packing, Rows
from softprompt.backbones.prefix import T5Prefix, positions_within
from softprompt.backbones.quantization import Quantization
from softprompt.backbones.t5_block import DecoderBlock, EncoderBlock, T5Architecture
from softprompt.parallel.mesh import ROWS, divide
from softprompt.parallel.sharding import gather_layer


class T5(nnx.Module):
    """An encoder-decoder language model.

    The parameters of all layers are stacked as `[L, ...]`, and scans run the layers. A soft prompt
    is prepended to the input embeddings of the encoder (Lester et al. 2021, arXiv:2104.08691).

    Args:
      arch: the architecture.
      quantize: how the kernels are quantized, see `quantization`; None for floating point.
      mesh: the devices that the parameters are divided over; None for one device.
    """

    separate_targets = True
    caches_prompt = False
    auto_class = "AutoModelForSeq2SeqLM"
    attention: Literal["xla"] = "xla"

    def __init__(
        self,
        arch: T5Architecture,
        *,
        quantize: Quantization | None = None,
        mesh: Mesh | None = None,
    ):
        self.arch, self.mesh = arch, mesh
        self.trained = False
        self.embedding = Embedding(arch.vocab_size, arch.hidden_size)
        buckets = (arch.num_buckets, arch.num_heads)
        norm = partial(RMSNorm, arch.hidden_size, arch.norm_epsilon)
        self.encoder_bias = nnx.Param(jnp.zeros(buckets))

        def stacked(kind: type[EncoderBlock], count: int) -> EncoderBlock:
            return nnx.vmap(lambda _: kind(arch, quantize))(jnp.arange(count))

        self.encoder = stacked(EncoderBlock, arch.num_encoder_layers)
        self.encoder_norm = norm()
        self.decoder_bias = nnx.Param(jnp.zeros(buckets))
        self.decoder = stacked(DecoderBlock, arch.num_decoder_layers)
        self.decoder_norm = norm()
        self.head = (
            None if arch.tied_head else Linear(arch.hidden_size, arch.vocab_size, quantize=quantize)
        )

    def __repr__(self) -> str:
        arch = self.arch
        layers = f"{arch.num_encoder_layers} + {arch.num_decoder_layers} layers"
        return f"T5({layers}, hidden size {arch.hidden_size})"

    @property
    def head_scale(self) -> float:
        """The factor of the output head's rows."""
        scaled = self.arch.tied_head if self.arch.scaled_head is None else self.arch.scaled_head
        return self.arch.hidden_size**-0.5 if scaled else 1.0

    @property
    def decoder_start_token(self) -> int | None:
        """The id that every target starts with."""
        return self.arch.start_token

    def prefix_shape(self, length: int) -> tuple[int, int, int, int]:
        """Return the shape `[L, P, H, h]` of a prefix's keys (and values), with P = `length`."""
        arch = self.arch
        return arch.num_decoder_layers, length, arch.num_heads, arch.head_size

    def prefix_from(self, keys: jax.Array, values: jax.Array) -> T5Prefix:
        """Make a prefix from keys and values `[L, P, H, h]` for the decoder."""
        return T5Prefix(keys=keys, values=values)

    def initial_prefix(self, vectors: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Start prefix tuning from standard normal numbers.

        The prefix is for the decoder, and `vectors` are embeddings for the encoder, so only
        their number is used.
        """
        keys, values = jax.random.normal(key, (2, *self.prefix_shape(len(vectors))))
        return keys, values

    def prefill(self, embeddings: jax.Array, prefix: T5Prefix | None = None) -> T5Prefix:
        """Make a prefix of embeddings for the encoder's input.

        Args:
          embeddings: `[P, D]`.
          prefix: a prefix that comes before the embeddings. The result includes it.
        """
        if prefix is None:
            return T5Prefix(embeddings)
        if prefix.embeddings is not None:
            embeddings = jnp.concatenate([prefix.embeddings, embeddings])
        return dataclasses.replace(prefix, embeddings=embeddings)

    def opening(
        self, embeddings: jax.Array, prefix: T5Prefix | None = None, spans: jax.Array | None = None
    ) -> T5Prefix:
        """Return the same as `prefill`, which runs nothing. Prompts are not padded here."""
        assert spans is None
        return self.prefill(embeddings, prefix)

    def encode(
        self,
        embeddings: jax.Array,
        lengths: jax.Array,
        prefix: T5Prefix | None,
        batch: Batch | None = None,
    ) -> tuple[jax.Array, jax.Array, Rows]:
        """Encode inputs with the prefix prepended.

        Args:
          embeddings: `[B, T, D]`, the input of the first layer, from `embedding`.
          lengths: `[B]`, the number of tokens in each row that are not padding.
          prefix: P virtual tokens, or None (P = 0).
          batch: the batch that the rows belong to; the hidden states are then packed.

        Returns:
          Hidden states `[B, P + T, D]` or packed, booleans `[B, P + T]`, False for padding, and
          where the rows of the hidden states are.
        """
        if prefix is not None and prefix.embeddings is not None:
            shape = len(embeddings), *prefix.embeddings.shape[-2:]
            virtual = jnp.broadcast_to(prefix.embeddings, shape)
            embeddings = jnp.concatenate([virtual, embeddings], axis=1)
            if prefix.lengths is not None:  # move the input next to the row's virtual tokens
                indices, own = jnp.arange(embeddings.shape[1])[None], prefix.lengths[:, None]
                indices = jnp.where(indices < own, indices, indices - own + prefix.length)
                indices = indices[..., None]
                embeddings = jnp.take_along_axis(embeddings, indices, axis=1, mode="clip")
            lengths = lengths + (prefix.length if prefix.lengths is None else prefix.lengths)
        positions = jnp.arange(embeddings.shape[1])[None]
        mask = positions < lengths[:, None]
        bias = self._bias(self.encoder_bias, positions, positions, bidirectional=True)
        rows: Rows = AS_ROWS
        if batch is not None:
            virtual_tokens = embeddings.shape[1] - batch.row_length
            size = batch.tokens.shape[1] + batch.lengths.shape[1] * virtual_tokens
            lengths = lengths.reshape(batch.lengths.shape)
            rows = Packing.of(lengths, size, embeddings.shape[1])

        @partial(jax.checkpoint, prevent_cse=False)
        def layer(x, block):
            block, x = gather_layer(block, self.mesh), divide(x, self.mesh, ROWS)
            return block(x, mask[:, None], bias, rows), None

        hidden, _ = jax.lax.scan(layer, rows.from_rows(embeddings), self.encoder)
        return self.encoder_norm(hidden), mask, rows

    def target_states(self, batch: Batch, prefix: T5Prefix | None) -> jax.Array:
        """Return the hidden states `[G, M, D]` from which the targets are predicted.

        The decoder reads a start token before each candidate. Candidates of the same row do not
        attend to each other.
        """
        tokens = batch.rows.to_rows(batch.tokens)
        embeddings = self.embedding.with_offsets(tokens)
        encoded, mask, rows = self.encode(embeddings, batch.lengths.reshape(-1), prefix, batch)
        target_rows = batch.target_rows
        targets = target_rows.to_rows(batch.targets)
        candidates = target_rows.to_rows(batch.target_candidates + 1) - 1
        indices = jnp.arange(batch.row_targets)[None]
        previous = jnp.pad(candidates, [(0, 0), (1, 0)], constant_values=-2)[:, :-1]
        is_first = candidates != previous
        first = jax.lax.cummax(jnp.where(is_first, indices, 0), axis=1)
        shifted = jnp.pad(targets, [(0, 0), (1, 0)])[:, :-1]
        tokens = jnp.where(is_first, self.arch.start_token, shifted)
        positions = indices - first
        segments = jnp.where(candidates < 0, -1, candidates + 1)
        visible = causal_mask(positions, positions, None) & same_sequence(segments, segments)
        # All rows share one bias, because distances within a candidate do not depend on where
        # its positions start.
        bias = self._bias(self.decoder_bias, indices, indices, bidirectional=False)
        from_prefix, *mask_and_bias = self._prefix_source(prefix, positions)

        @partial(jax.checkpoint, prevent_cse=False)
        def layer(x, inputs):
            block, from_prefix = inputs
            block, x = gather_layer(block, self.mesh), divide(x, self.mesh, ROWS)

            def sources(keys, values):
                own = Source(keys, values, visible, bias)
                return [own, Source(*from_prefix, *mask_and_bias)] if from_prefix else [own]

            keys, values = block.read(encoded, rows)
            x, _ = block(x, sources, Source(keys, values, mask[:, None]), target_rows)
            return x, None

        embeddings = self.embedding(target_rows.from_rows(tokens))
        hidden, _ = jax.lax.scan(layer, embeddings, (self.decoder, from_prefix))
        return self.decoder_norm(hidden)

    @property
    def output_head(self) -> OutputHead:
        """The module that maps hidden states to logits."""
        return OutputHead(self.embedding, self.head, self.mesh, scale=self.head_scale)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Map hidden states `[B, ..., D]` to float32 logits `[B, ..., V]`."""
        return self.output_head(hidden)

    def start(
        self, tokens: jax.Array, lengths: jax.Array, prefix: T5Prefix | None, capacity: int
    ) -> tuple[jax.Array, T5Cache]:
        """Encode inputs in preparation for `decode`.

        Args:
          tokens: `[B, T]` ids, padded on the right.
          lengths: `[B]`, the number of tokens in each row that are not padding.
          prefix: what comes before the inputs and the targets.
          capacity: the number of tokens that can be decoded with the returned cache.

        Returns:
          The hidden states `[B, D]` from which the first tokens are predicted, and the cache.
        """
        arch, rows = self.arch, len(tokens)
        encoded, mask, _ = self.encode(self.embedding.with_offsets(tokens), lengths, prefix)

        def read(_, block):
            return None, gather_layer(block, self.mesh).read(encoded, AS_ROWS)

        _, (keys, values) = jax.lax.scan(read, None, self.decoder)
        shape = (arch.num_decoder_layers, rows, capacity + 1, arch.num_heads, arch.head_size)
        empty = jnp.zeros(shape, encoded.dtype)
        cache = T5Cache(empty, empty, jnp.zeros(rows, jnp.int32), keys, values, mask)
        return self.decode(jnp.full(rows, arch.start_token), cache, prefix)

    def decode(
        self, tokens: jax.Array, cache: T5Cache, prefix: T5Prefix | None
    ) -> tuple[jax.Array, T5Cache]:
        """Read the next token of each row's target, ids `[B]`; returns the same as `start`."""
        slots = jnp.arange(cache.keys.shape[2])[None]
        positions = cache.lengths[:, None]
        bias = self._bias(self.decoder_bias, positions, slots, bidirectional=False)
        own_bias = self._bias(self.decoder_bias, positions, positions, bidirectional=False)
        filled = (slots < positions)[:, None]
        from_prefix, *mask_and_bias = self._prefix_source(prefix, positions)

        def layer(x, block_and_sources):
            block, from_prefix, read, inputs = block_and_sources
            block, x = gather_layer(block, self.mesh), divide(x, self.mesh, ROWS)

            def sources(keys, values):
                own = [Source(keys, values, bias=own_bias), Source(read[0], read[1], filled, bias)]
                return [*own, Source(*from_prefix, *mask_and_bias)] if from_prefix else own

            encoded = Source(inputs[0], inputs[1], cache.input_mask[:, None])
            return block(x, sources, encoded, AS_ROWS)

        read, inputs = (cache.keys, cache.values), (cache.input_keys, cache.input_values)
        x, (keys, values) = jax.lax.scan(
            layer, self.embedding(tokens[:, None]), (self.decoder, from_prefix, read, inputs)
        )
        return self.decoder_norm(x)[:, 0], cache.append(keys, values)

    def _prefix_source(self, prefix: T5Prefix | None, positions: jax.Array):
        """Return keys and values of a prefix, their mask and their bias; None without a prefix.

        Args:
          prefix: its keys and values are for the decoder.
          positions: `[B, T]`, of the queries, without the prefix.
        """
        if prefix is None or prefix.keys is None or prefix.values is None:
            return None, None, None
        virtual, length = positions_within(prefix.spans, prefix.keys.shape[1])
        positions = positions + length
        bias = self._bias(self.decoder_bias, positions, virtual, bidirectional=False)
        keys, values = prefix.keys[:, None], prefix.values[:, None]
        return (keys, values), causal_mask(positions, virtual, None), bias

    def _bias(self, table: nnx.Param, queries, keys, *, bidirectional: bool) -> jax.Array:
        """Return the relative position bias of attention scores, float32 `[B, H, T, S]`.

        Each short distance has its own bucket. Longer distances share buckets whose width grows
        exponentially up to `max_distance` (section 2.1 of the paper).

        Args:
          table: `[num_buckets, H]`.
          queries, keys: positions, `[B, T]` and `[B, S]`.
          bidirectional: whether half of the buckets are for keys after the query.
        """
        ahead = keys[:, None] - queries[:, :, None]
        buckets = self.arch.num_buckets // (2 if bidirectional else 1)
        distance = jnp.abs(ahead) if bidirectional else jnp.maximum(-ahead, 0)
        exact = buckets // 2
        ratio = jnp.maximum(distance, exact).astype(jnp.float32) / exact
        steps = jnp.log(ratio) / math.log(self.arch.max_distance / exact) * (buckets - exact)
        far = jnp.minimum(exact + steps.astype(jnp.int32), buckets - 1)
        bucket = jnp.where(distance < exact, distance, far)
        if bidirectional:
            bucket += jnp.where(ahead > 0, buckets, 0)
        return table[...][bucket].transpose(0, 3, 1, 2).astype(jnp.float32)
