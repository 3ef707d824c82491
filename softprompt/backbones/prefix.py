"""Prefixes, which rows attend to before their own tokens.

Axis letters: B batch, P tokens of a prefix, D hidden, K key-value heads, H heads, h head size,
L layers.
"""

import dataclasses
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.backbones.attention import MASKED_POSITION

MAX_PACKED_TOKENS = 512  # of all prefixes together, if the rows of a batch use several
# Keys and values are padded to one of these. Padding of a wide prefix would cost much time.
_WIDTHS = [128, 512, *(2048 * 2**i for i in range(19))]
_MULTIPLE = 32  # embeddings are padded to a multiple of this


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """Keys (after rotary embedding) and values that the rows of a batch attend to.

    Its P tokens are virtual tokens and the other tokens of the opening. There is no batch axis, so
    nothing is copied per row.

    Attributes:
      keys, values: `[L, P, K, h]`.
      spans: `[B, 2]`, start and end of the tokens that each row attends to; `[1, 2]` if all
        rows share one span. None: all rows attend to all P.
    """

    keys: jax.Array
    values: jax.Array
    spans: jax.Array | None = None

    def __repr__(self) -> str:
        return f"Prefix({self.keys.shape[0]} layers, {self.length} virtual tokens)"

    @property
    def length(self) -> int:
        """Number of tokens, P."""
        return self.keys.shape[1]

    @cached_property
    def padded(self) -> "Prefix":
        """The prefix padded to one of a few widths, with a span `[1, 2]`.

        It is computed once and stays on the device. Programs that read it are compiled per
        width and not per length: a prefix of up to 128 tokens has width 128.
        """
        width = _width(self.length)
        return Prefix(
            _padded(self.keys, width),
            _padded(self.values, width),
            jax.device_put(np.array([[0, self.length]], np.int32)),  # `jnp.asarray` would compile
        )

    @classmethod
    def packed(cls, prefixes: Sequence["Prefix"], rows: Sequence[int | None]) -> "Prefix":
        """Combine prefixes so that each row attends to its own.

        A single prefix that all rows share is only padded. Otherwise the prefixes are
        concatenated on the device, and the result is at least `MAX_PACKED_TOKENS` wide.
        Shapes depend on padded widths alone, so other prompts seldom need new programs.

        Args:
          prefixes: at least one.
          rows: for each row the index of its prefix, or None if it has none.
        """
        if len(prefixes) == 1 and None not in rows:
            return prefixes[0].padded
        lengths = [prefix.length for prefix in prefixes]
        padded = [(prefix.padded.keys, prefix.padded.values) for prefix in prefixes]
        keys, values = _concatenated(padded, lengths)
        return cls(keys, values, jnp.asarray(_spans(lengths, rows)))

    def repeated(self, count: int) -> "Prefix":
        """Return the prefix of a batch in which each row is repeated `count` times."""
        return dataclasses.replace(self, spans=_repeated(self.spans, count))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class T5Prefix:
    """Tokens before the encoder's input, and keys and values before the targets.

    The encoder is bidirectional, so what it computes for these tokens depends on the input.

    Attributes:
      embeddings: `[P, D]`, prepended to the encoder's input, or None. `[B, P, D]` if the rows
        have different ones.
      keys, values: `[L, P, H, h]`, what every token of the decoder attends to before the
        target, or None. The positions of the target continue after them.
      lengths: `[B]`, how many of the P embeddings each row uses; `[1]` if it is the same for
        all rows. None: all.
      spans: the rows' spans of the keys and values, see `Prefix`.
    """

    embeddings: jax.Array | None = None
    keys: jax.Array | None = None
    values: jax.Array | None = None
    lengths: jax.Array | None = None
    spans: jax.Array | None = None

    def __repr__(self) -> str:
        decoder = 0 if self.keys is None else self.keys.shape[1]
        return f"T5Prefix({self.length} virtual tokens in the encoder, {decoder} in the decoder)"

    @property
    def length(self) -> int:
        """Number of tokens before the encoder's input."""
        return 0 if self.embeddings is None else self.embeddings.shape[-2]

    @cached_property
    def padded(self) -> "T5Prefix":
        """The prefix padded as `Prefix.padded` is; embeddings to a multiple of 32."""
        embeddings = keys = values = lengths = spans = None
        if self.embeddings is not None:
            width = -(-self.length // _MULTIPLE) * _MULTIPLE
            embeddings = _padded(self.embeddings[None], width)[0]
            lengths = jnp.asarray(np.array([self.length], np.int32))
        if self.keys is not None and self.values is not None:
            decoder = Prefix(self.keys, self.values).padded
            keys, values, spans = decoder.keys, decoder.values, decoder.spans
        return T5Prefix(embeddings, keys, values, lengths, spans)

    @classmethod
    def packed(cls, prefixes: Sequence["T5Prefix"], rows: Sequence[int | None]) -> "T5Prefix":
        """Combine prefixes as `Prefix.packed` does.

        Each row gets its own copy of its embeddings, because the encoder reads them together
        with the row's input.
        """
        if len(prefixes) == 1 and None not in rows:
            return prefixes[0].padded
        embeddings = keys = values = row_lengths = spans = None
        if any(prefix.embeddings is not None for prefix in prefixes):
            row_spans = _spans([prefix.length for prefix in prefixes], rows)
            some: list[Any] = [p.padded for p in prefixes if p.embeddings is not None]
            lengths = [p.length for p in prefixes if p.embeddings is not None]
            (pool,) = _concatenated([(each.embeddings[None],) for each in some], lengths)
            width = max(each.length for each in some)
            embeddings = _take_slices(pool[0], row_spans[:, 0], width=width)
            row_lengths = jnp.asarray(row_spans[:, 1] - row_spans[:, 0])
        if any(prefix.keys is not None for prefix in prefixes):
            all_lengths = [0 if p.keys is None else p.keys.shape[1] for p in prefixes]
            some = [p.padded for p in prefixes if p.keys is not None]
            lengths = [p.keys.shape[1] for p in prefixes if p.keys is not None]
            keys, values = _concatenated([(each.keys, each.values) for each in some], lengths)
            spans = jnp.asarray(_spans(all_lengths, rows))
        return cls(embeddings, keys, values, row_lengths, spans)

    def repeated(self, count: int) -> "T5Prefix":
        """Return the decoder's part for a batch in which each row is repeated `count` times."""
        spans = _repeated(self.spans, count)
        return dataclasses.replace(self, embeddings=None, lengths=None, spans=spans)


def _width(length: int) -> int:
    return next(width for width in _WIDTHS if width >= length)


def _padded(array: jax.Array, width: int) -> jax.Array:
    """Pad `[L, P, ...]` to `[L, width, ...]`.

    It is padded on the host: on the device, every length would compile a program.
    """
    padding = [(0, 0)] * array.ndim
    padding[1] = (0, width - array.shape[1])
    return jax.device_put(np.pad(np.asarray(array), padding))


def _spans(lengths: Sequence[int], rows: Sequence[int | None]) -> np.ndarray:
    """Where each row's prefix begins and ends, `[B, 2]`, when all are concatenated."""
    ends = np.cumsum(lengths)
    spans = [(ends[i] - lengths[i], ends[i]) if i is not None else (0, 0) for i in rows]
    return np.array(spans, np.int32)


def _repeated(spans: jax.Array | None, count: int) -> jax.Array | None:
    """Spans `[B * count, 2]`; those that all rows share stay `[1, 2]`."""
    if spans is None or len(spans) == 1 or count == 1:
        return spans
    return spans.repeat(count, axis=0)


def _concatenated(
    parts: Sequence[tuple[jax.Array, ...]], lengths: Sequence[int]
) -> tuple[jax.Array, ...]:
    """Concatenate padded arrays on the device, without their padding.

    Args:
      parts: tuples of arrays `[L, P, ...]`, each array of a tuple with the same P.
      lengths: for each tuple the number of entries along P that are not padding.

    Returns:
      A tuple of concatenations `[L, width, ...]`, zero after the last entry. The programs
      are compiled per padded width.
    """
    buffers = _zeros(parts[0], width=_width(max(sum(lengths), MAX_PACKED_TOKENS)))
    begin = 0
    for part, length in zip(parts, lengths, strict=True):
        buffers = _insert(buffers, part, np.int32(begin), np.int32(length))
        begin += length
    return buffers


@partial(jax.jit, static_argnames="width")
def _zeros(like, *, width: int):
    return jax.tree.map(lambda a: jnp.zeros((a.shape[0], width, *a.shape[2:]), a.dtype), like)


@partial(jax.jit, donate_argnums=0)
def _insert(buffers, part, begin, length):
    """Write the first `length` entries of each array of `part` into its buffer."""

    def write(buffer: jax.Array, array: jax.Array) -> jax.Array:
        size = array.shape[1]
        start = jnp.minimum(begin, buffer.shape[1] - size)  # padding may not fit after `begin`
        shift = begin - start
        entries = jnp.arange(size).reshape(-1, *[1] * (array.ndim - 2))
        inside = (entries >= shift) & (entries < shift + length)
        old = jax.lax.dynamic_slice_in_dim(buffer, start, size, axis=1)
        new = jnp.where(inside, jnp.roll(array, shift, axis=1), old)
        return jax.lax.dynamic_update_slice_in_dim(buffer, new, start, axis=1)

    return jax.tree.map(write, buffers, part)


@partial(jax.jit, static_argnames="width")
def _take_slices(pool: jax.Array, begins: jax.Array, *, width: int) -> jax.Array:
    """Slices `[B, width, D]` of a pool `[P, D]`, which begin at the entries `begins`, `[B]`."""
    return jnp.take(pool, begins[:, None] + jnp.arange(width)[None], axis=0, mode="clip")


def positions_within(spans: jax.Array | None, width: int) -> tuple[jax.Array, int | jax.Array]:
    """Compute the positions of the tokens of a prefix in each row.

    Args:
      spans: `[B, 2]`, see `Prefix`; None if all rows attend to all tokens.
      width: P.

    Returns:
      Positions `[B, P]`, which are `MASKED_POSITION` outside a row's span, and the number of
      tokens in each row's span, `[B, 1]`. Without spans, positions `[1, P]` and P.
    """
    places = jnp.arange(width)[None]
    if spans is None:
        return places, width
    begin, end = spans[:, :1], spans[:, 1:]
    inside = (places >= begin) & (places < end)
    return jnp.where(inside, places - begin, MASKED_POSITION), end - begin
