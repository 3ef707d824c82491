"""What stands in front of a batch's rows, and what has been read of them.

Axis letters: B batch, P virtual tokens, S cached tokens, T tokens of an input, D hidden,
K key-value heads, H heads, h head size, L layers.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.backbones.attention import NOWHERE

MOST_MIXED = 512  # virtual tokens that the rows of one batch may have in all, if they differ
_WIDTHS = [128 * 4**i for i in range(12)]  # that prefixes are padded to; 128: a single prompt's
_MULTIPLE = 32  # that embeddings in front of an encoder's input are padded to


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """Keys (after rotary embedding) and values that every row of a batch attends to.

    There is no batch axis, so nothing is copied per row.

    Attributes:
      keys, values: `[L, P, K, h]`.
      spans: `[B, 2]`, from which of the P up to which each row attends to, B being 1 if it is
        the same for all rows; None: all of them.
    """

    keys: jax.Array
    values: jax.Array
    spans: jax.Array | None = None

    @property
    def length(self) -> int:
        """Number of virtual tokens, P."""
        return self.keys.shape[1]

    @classmethod
    def packed(cls, prefixes: Sequence["Prefix"], rows: Sequence[int | None]) -> "Prefix":
        """Prefixes one behind the other, each row attending to its own.

        Their width is one of few, which depends on how many there are and not on their
        lengths as long as these are at most 128, or `MOST_MIXED` together: the programs that
        read them are compiled once.

        Args:
          prefixes: at least one.
          rows: the number of each row's prefix, or None where it has none.
        """
        alone = len(prefixes) == 1 and None not in rows
        total = sum(prefix.length for prefix in prefixes)
        width = next(w for w in _WIDTHS if w >= (total if alone else max(total, MOST_MIXED)))

        def joined(arrays: Sequence[jax.Array]) -> np.ndarray:
            host = np.concatenate([np.asarray(array) for array in arrays], axis=1)
            return np.pad(host, [(0, 0), (0, width - total), (0, 0), (0, 0)])

        ends = np.cumsum([prefix.length for prefix in prefixes])
        spans = [(ends[i] - prefixes[i].length, ends[i]) if i is not None else (0, 0) for i in rows]
        return cls(
            jnp.asarray(joined([prefix.keys for prefix in prefixes])),
            jnp.asarray(joined([prefix.values for prefix in prefixes])),
            jnp.asarray(np.array(spans, np.int32)),
        )

    def repeated(self, count: int) -> "Prefix":
        """For a batch in which each row stands so many times."""
        if self.spans is None:
            return self
        return dataclasses.replace(self, spans=self.spans.repeat(count, axis=0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class T5Prefix:
    """What stands in front of every input of the encoder, or of every target.

    The encoder reads both ways, so what it makes of virtual tokens depends on the input.

    Attributes:
      embeddings: `[P, D]`, in front of the encoder's input, or None; `[B, P, D]` with
        `lengths`.
      keys, values: `[L, P, H, h]`, what every target token of the decoder attends to
        before its own kind, or None. The decoder's positions go on behind them.
      lengths: `[B]`, how many of the embeddings each row has; None: all.
      spans: as of `Prefix`, for keys and values.
    """

    embeddings: jax.Array | None = None
    keys: jax.Array | None = None
    values: jax.Array | None = None
    lengths: jax.Array | None = None
    spans: jax.Array | None = None

    @property
    def length(self) -> int:
        """Number of virtual tokens in front of the encoder's input."""
        return 0 if self.embeddings is None else self.embeddings.shape[-2]

    @classmethod
    def packed(cls, prefixes: Sequence["T5Prefix"], rows: Sequence[int | None]) -> "T5Prefix":
        """As `Prefix.packed`; embeddings are laid out per row, for the encoder copies them."""
        packed = cls()
        if any(prefix.embeddings is not None for prefix in prefixes):
            of_rows = [None if i is None else prefixes[i].embeddings for i in rows]
            lengths = np.array([0 if one is None else len(one) for one in of_rows], np.int32)
            width = -(-max(prefix.length for prefix in prefixes) // _MULTIPLE) * _MULTIPLE
            like = np.asarray(next(p.embeddings for p in prefixes if p.embeddings is not None))
            embeddings = np.zeros((len(rows), width, like.shape[1]), like.dtype)
            for row, length, one in zip(embeddings, lengths, of_rows, strict=True):
                if one is not None:
                    row[:length] = np.asarray(one)
            packed = dataclasses.replace(
                packed, embeddings=jnp.asarray(embeddings), lengths=jnp.asarray(lengths)
            )
        with_keys = [i for i, prefix in enumerate(prefixes) if prefix.keys is not None]
        if with_keys:
            some: list[Any] = [prefixes[i] for i in with_keys]
            parts = [Prefix(prefix.keys, prefix.values) for prefix in some]
            places = [with_keys.index(i) if i in with_keys else None for i in rows]
            joined = Prefix.packed(parts, places)
            packed = dataclasses.replace(
                packed, keys=joined.keys, values=joined.values, spans=joined.spans
            )
        return packed

    def repeated(self, count: int) -> "T5Prefix":
        """For a batch in which each row stands so many times, once the inputs are encoded."""
        spans = None if self.spans is None else self.spans.repeat(count, axis=0)
        return dataclasses.replace(self, embeddings=None, lengths=None, spans=spans)


def positions_within(spans: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """Positions `[B, P]` of a prefix's virtual tokens in each row, and their number `[B, 1]`.

    Args:
      spans: `[B, 2]`, see `Prefix`; what is outside of them is `NOWHERE`.
      width: P.
    """
    begin, end = spans[:, :1], spans[:, 1:]
    places = jnp.arange(width)[None]
    inside = (places >= begin) & (places < end)
    return jnp.where(inside, places - begin, NOWHERE), end - begin


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What a batch has read so far, beside the prefix.

    Attributes:
      keys, values: `[L, B, S, K, h]`.
      positions: `[B, S]`, counted as in `Decoder.__call__`; `NOWHERE` in an empty place.
      filled: places filled, the same for all rows.
      lengths: `[B]`, tokens each row has read: the position of its next one.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    filled: jax.Array
    lengths: jax.Array

    def take(self, rows: jax.Array) -> "Cache":
        """That of a batch of the rows with these numbers."""
        return dataclasses.replace(
            self,
            keys=self.keys[:, rows],
            values=self.values[:, rows],
            positions=self.positions[rows],
            lengths=self.lengths[rows],
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class T5Cache:
    """What the decoder looks at.

    Attributes:
      keys, values: of its own tokens, `[L, B, S, H, h]`; `filled` places hold one.
      input_keys, input_values: of the encoded inputs, `[L, B, P + T, H, h]`.
      real: `[B, P + T]`, which of these are no padding.
    """

    keys: jax.Array
    values: jax.Array
    filled: jax.Array
    input_keys: jax.Array
    input_values: jax.Array
    real: jax.Array

    def take(self, rows: jax.Array) -> "T5Cache":
        """That of a batch of the rows with these numbers."""
        return dataclasses.replace(
            self,
            keys=self.keys[:, rows],
            values=self.values[:, rows],
            input_keys=self.input_keys[:, rows],
            input_values=self.input_values[:, rows],
            real=self.real[rows],
        )
