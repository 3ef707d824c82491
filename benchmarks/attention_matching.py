"""Attention Matching: the prefix of a document, compressed without training.

The method is from Zweiger et al. 2026 (arXiv:2602.16284). In every layer and key-value head, it
keeps the keys that reference queries attend to most, and fits values for them by least squares. The
original also fits a bias for each kept key, so that rows attend to the prefix as much as before. A
`Prefix` has no biases, so rows attend less to a prefix with fewer keys. Therefore the values are
fitted to the whole output of attention: the prefix and the tokens of the row share one softmax.

Axis letters: B rows, T tokens of a row, n reference queries, P tokens of a prefix, p tokens of the
compressed one, H query heads, K key-value heads, G = H / K, h head size, L layers.
"""

import dataclasses
import operator
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.backbones.attention import Source, attend, causal_mask
from softprompt.backbones.decoder import Decoder
from softprompt.backbones.prefix import Prefix
from softprompt.backbones.rope import Rope, angles, rotate
from softprompt.errors import UserError

RIDGE = 1e-4  # of the mean square of the attention to a kept key


@dataclasses.dataclass(frozen=True)
class Queries:
    """Reference queries of one key-value head, and their attention to their own rows.

    Attributes:
      queries: `[n, h]`, scaled, after rotary embedding.
      mass: `[n]`, the logarithm of the sum of the exponentials of the scores in the own row.
      mean: `[n, h]`, the output of attention to the own row alone.
    """

    queries: np.ndarray
    mass: np.ndarray
    mean: np.ndarray

    def attention(self, keys: np.ndarray) -> np.ndarray:
        """Return the weights `[n, P]` of keys `[P, h]` in the softmax over prefix and row."""
        scores = self.queries @ keys.T
        largest = np.maximum(scores.max(axis=1), self.mass)
        weights = np.exp(scores - largest[:, None])
        total = weights.sum(axis=1) + np.exp(self.mass - largest)
        return weights / total[:, None]

    def output(self, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Return the output of attention `[n, h]` to a prefix and to the own row."""
        weights = self.attention(keys)
        return weights @ values + (1 - weights.sum(axis=1, keepdims=True)) * self.mean


def attention_matching(
    backbone: Decoder, prefix: Prefix, rows: Sequence[Sequence[int]], length: int
) -> Prefix:
    """Compress the prefix of a document in closed form.

    The keys are rotated to lower positions. Rows after the compressed prefix then have the same
    distance to each key as before.

    Args:
      backbone: a causal model with rotary positions, without attention windows or a softcap.
      prefix: P tokens.
      rows: ids of the rows whose queries are matched. They are read after the whole prefix.
      length: p.
    """
    keys, values = [], []
    for number, queries in enumerate(reference_queries(backbone, prefix, rows)):
        of_heads = zip(
            queries,
            np.asarray(prefix.keys[number], np.float32).swapaxes(0, 1),
            np.asarray(prefix.values[number], np.float32).swapaxes(0, 1),
            strict=True,
        )
        pairs = [compressed(*each, length) for each in of_heads]
        kept, fitted = (np.stack(arrays, axis=1) for arrays in zip(*pairs, strict=True))
        rope = backbone.arch.layers[number].rope
        keys.append(moved(kept, rope, length - prefix.length))
        values.append(fitted)
    dtype = prefix.keys.dtype
    return Prefix(jnp.asarray(np.stack(keys), dtype), jnp.asarray(np.stack(values), dtype))


def compressed(
    queries: Queries, keys: np.ndarray, values: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Compress the keys and values of one key-value head from `[P, h]` to `[p, h]`."""
    weights = queries.attention(keys)
    kept = np.sort(np.argsort(-np.square(weights).sum(axis=0), kind="stable")[:length])
    new = queries.attention(keys[kept])
    rest = (1 - new.sum(axis=1, keepdims=True)) * queries.mean
    wanted = queries.output(keys, values) - rest
    inputs = new.astype(np.float64)
    squares = inputs.T @ inputs
    squares += RIDGE * np.trace(squares) / length * np.eye(length)
    return keys[kept], np.linalg.solve(squares, inputs.T @ wanted)


def moved(keys: np.ndarray, rope: Rope, positions: int) -> np.ndarray:
    """Return keys `[p, K, h]` rotated by a number of positions."""
    turn = angles(dataclasses.replace(rope, factor=1.0), jnp.full((1, len(keys)), positions))
    return np.asarray(rotate(jnp.asarray(keys)[None], turn)[0])


def reference_queries(
    backbone: Decoder, prefix: Prefix, rows: Sequence[Sequence[int]]
) -> Iterator[list[Queries]]:
    """Yield the queries of each layer when the model reads rows after a prefix.

    Yields:
      The queries of each key-value head.
    """
    arch = backbone.arch
    if arch.attention_softcap or any(kind.window or not kind.rope for kind in arch.layers):
        raise UserError("attention matching needs rotary positions, without windows or a softcap")
    width = max(map(len, rows))
    tokens = jnp.array([[*row, *[0] * (width - len(row))] for row in rows])
    is_token = np.arange(width) < np.array([[len(row)] for row in rows])
    positions = prefix.length + jnp.arange(width)[None]
    x = backbone.embedding(tokens)
    for number, kind in enumerate(arch.layers):
        arrays = backbone.layers, prefix.keys, prefix.values
        block, keys, values = jax.tree.map(operator.itemgetter(number), arrays)
        x, found = _read_layer(block, keys, values, x, angles(kind.rope, positions))
        of_tokens = [np.asarray(each, np.float32)[is_token] for each in found]
        divided = [np.split(each, arch.num_kv_heads, axis=1) for each in of_tokens]  # [n, G, ...]
        yield [
            Queries(*(each.reshape(-1, *each.shape[2:]) for each in of_head))
            for of_head in zip(*divided, strict=True)
        ]


@jax.jit
def _read_layer(block, keys, values, x, rotary):
    """Run a layer on rows after a prefix. Also return its queries, see `Queries`."""
    arch, found = block.arch, []
    scale = arch.attention_scale or arch.head_size**-0.5

    def attention(queries, own_keys, own_values):
        places = jnp.arange(queries.shape[1])[None]
        row = Source(own_keys, own_values, causal_mask(places, places, None))
        repeated = jnp.repeat(own_keys, arch.num_heads // arch.num_kv_heads, axis=2)
        scores = jnp.einsum("bthx,bshx->bths", queries * scale, repeated)
        scores = jnp.where(row.visible[:, :, None], scores, -jnp.inf)
        mass = jax.nn.logsumexp(scores, axis=-1)
        found.extend([queries * scale, mass, attend(queries, [row], scale=scale)])
        return attend(queries, [Source(keys[None], values[None]), row], scale=scale)

    x, _ = block(x, rotary, attention)
    return x, found
