"""The architecture and the layers of T5 models.

Axis letters: B batch, T tokens of an input, D hidden, F feed-forward, H heads, h head size,
V vocabulary, M target positions.
"""

import dataclasses
import math

import jax
from flax import nnx

from softprompt.backbones.attention import Source, attend
from softprompt.backbones.layers import (
    ACTIVATIONS,
    Attention,
    FeedForward,
    RMSNorm,
    heads,
    join_heads,
)
from softprompt.backbones.packing import Rows
from softprompt.backbones.quantization import Quantization


@dataclasses.dataclass(frozen=True)
class T5Architecture:
    """The sizes and options of a T5 model."""

    vocab_size: int  # V
    hidden_size: int  # D
    feed_forward_size: int  # F
    num_heads: int  # H
    head_size: int  # h
    num_encoder_layers: int
    num_decoder_layers: int
    context_length: int  # the longest input in tokens, including virtual tokens
    num_buckets: int  # of relative positions
    max_distance: int  # larger distances share one bucket
    norm_epsilon: float
    start_token: int  # the decoder reads it before the first target
    tied_head: bool  # the head is the embedding table
    activation: str
    gated: bool
    scaled_head: bool | None = None  # the head is scaled by D ** -0.5; None: if it is tied

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            wrong = field.type in (int, float, bool, str) and type(value) is not field.type
            least = 0 if field.name == "start_token" else 1e-12
            if wrong or (type(value) in (int, float) and not least <= value < math.inf):
                raise ValueError(f"{field.name} {value!r}")
        if self.activation not in ACTIVATIONS or self.start_token >= self.vocab_size:
            raise ValueError(f"activation {self.activation!r}, start_token {self.start_token}")
        # Half of the buckets are for one distance each. The others share longer distances.
        if self.num_buckets < 4 or self.max_distance <= self.num_buckets // 2:
            raise ValueError(f"{self.num_buckets} buckets for distances to {self.max_distance}")


class EncoderBlock(nnx.Module):
    """An encoder layer: bidirectional attention and a feed-forward layer, with norms before."""

    def __init__(self, arch: T5Architecture, quantize: Quantization | None):
        self.arch = arch
        sizes = arch.hidden_size, arch.num_heads, arch.num_heads, arch.head_size
        self.attention_norm = RMSNorm(arch.hidden_size, arch.norm_epsilon)
        self.attention = Attention(*sizes, quantize=quantize)
        self.feed_forward_norm = RMSNorm(arch.hidden_size, arch.norm_epsilon)
        self.feed_forward = FeedForward(
            arch.hidden_size,
            arch.feed_forward_size,
            activation=arch.activation,
            gated=arch.gated,
            quantize=quantize,
        )

    def __call__(self, x: jax.Array, visible: jax.Array, bias: jax.Array, rows: Rows) -> jax.Array:
        """Run the layer.

        Args:
          x: `[B, T, D]`, or packed.
          visible: booleans `[B, 1, T]`, False for padding.
          bias: `[1, H, T, T]`.
          rows: where the rows of `x` are.

        Returns:
          Hidden states in the form of `x`.
        """

        def sources(keys, values):
            return [Source(keys, values, visible, bias)]

        x, _ = self.attend_self(x, sources, rows)
        return x + self.feed_forward(self.feed_forward_norm(x))

    def attend_self(self, x, sources, rows: Rows):
        """Apply self-attention with its norm and residual connection.

        Args:
          x: `[B, T, D]`, or packed.
          sources: a function from the keys and values of `x` to the sources to attend to.
          rows: where the rows of `x` are.

        Returns:
          Hidden states in the form of `x`, and the keys and values as rows, `[B, T, H, h]` each.
        """
        normed = self.attention_norm(x)
        queries, keys, values = (
            rows.to_rows(heads(matrix(normed), self.arch.head_size))
            for matrix in (self.attention.query, self.attention.key, self.attention.value)
        )
        mixed = rows.from_rows(attend(queries, sources(keys, values), scale=1.0))
        return x + self.attention.output(join_heads(mixed)), (keys, values)


class DecoderBlock(EncoderBlock):
    """A decoder layer: an encoder layer with cross-attention to the encoded input."""

    def __init__(self, arch: T5Architecture, quantize: Quantization | None):
        super().__init__(arch, quantize)
        sizes = arch.hidden_size, arch.num_heads, arch.num_heads, arch.head_size
        self.cross_norm = RMSNorm(arch.hidden_size, arch.norm_epsilon)
        self.cross = Attention(*sizes, quantize=quantize)

    def __call__(self, x, sources, encoded: Source, rows: Rows):  # type: ignore[override]
        """Run the layer.

        Args:
          x: `[B, M, D]`, or packed.
          sources: a function from the keys and values of `x` to the sources to attend to.
          encoded: the keys and values of the encoded input, from `read`.
          rows: where the rows of `x` are.

        Returns:
          Hidden states in the form of `x`, and the keys and values as rows, `[B, M, H, h]` each.
        """
        x, keys_values = self.attend_self(x, sources, rows)
        queries = heads(self.cross.query(self.cross_norm(x)), self.arch.head_size)
        mixed = attend(rows.to_rows(queries), [encoded], scale=1.0)
        x = x + self.cross.output(join_heads(rows.from_rows(mixed)))
        return x + self.feed_forward(self.feed_forward_norm(x)), keys_values

    def read(self, encoded: jax.Array, rows: Rows) -> tuple[jax.Array, jax.Array]:
        """Return keys and values of the encoded input as rows, `[B, T, H, h]` each.

        Args:
          encoded: `[B, T, D]`, or packed.
          rows: where the rows of the encoded input are.
        """
        keys, values = self.cross.key(encoded), self.cross.value(encoded)
        size = self.arch.head_size
        return rows.to_rows(heads(keys, size)), rows.to_rows(heads(values, size))
