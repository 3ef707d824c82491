"""Attention to one set of keys by XLA, which stores all scores: for few keys, and for tests.

See `flash.Kernel`. Axis letters: B batch, T tokens, S keys, H query heads, K key-value heads,
G = H / K query heads per key-value head, h head size.
"""

import jax
import jax.numpy as jnp

from softprompt.backbones.flash import Scoring


def forward(
    queries: jax.Array, keys: jax.Array, values: jax.Array, scoring: Scoring
) -> tuple[jax.Array, jax.Array]:
    """Return the output and the log-sum-exps; see `flash.Kernel`."""
    scores = _scores(_grouped(queries, keys), keys, scoring)
    sums = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - sums[..., None]).astype(values.dtype)
    output = _einsum(f"bkgts,{_axes(values)}->btkgh", weights, values)
    rows, length = sums.shape[0], sums.shape[-1]
    return output.reshape(queries.shape), sums.reshape(rows, -1, length)


def backward(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    output: jax.Array,
    sums: jax.Array,
    gradient: jax.Array,
    scoring: Scoring,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of queries, keys and values; see `flash.Kernel`."""
    grouped, output, gradient = (_grouped(array, keys) for array in (queries, output, gradient))
    scores = _scores(grouped, keys, scoring)
    weights = jnp.exp(scores - sums.reshape(*scores.shape[:-1], 1))
    along_output = _einsum("btkgh,btkgh->bkgt", output, gradient)[..., None]
    of_weights = _einsum(f"btkgh,{_axes(values)}->bkgts", gradient, values)
    of_products = weights * (of_weights - along_output) * scoring.slope(scores)
    of_products, weights = of_products.astype(keys.dtype), weights.astype(values.dtype)
    of_queries = _einsum(f"bkgts,{_axes(keys)}->btkgh", of_products, keys)
    of_keys = _einsum(f"bkgts,btkgh->{_axes(keys)}", of_products, grouped)
    of_values = _einsum(f"bkgts,btkgh->{_axes(values)}", weights, gradient)
    return (
        of_queries.reshape(queries.shape).astype(queries.dtype),
        of_keys.astype(keys.dtype),
        of_values.astype(values.dtype),
    )


def _scores(queries: jax.Array, keys: jax.Array, scoring: Scoring) -> jax.Array:
    """Return the scores `[B, K, G, T, S]` of queries `[B, T, K, G, h]`."""
    scores = scoring.scores(_einsum(f"btkgh,{_axes(keys)}->bkgts", queries, keys))
    length, size = scores.shape[-2:]
    distance = scoring.offset + jnp.arange(length)[:, None] - jnp.arange(size)
    return jnp.where(scoring.visible(distance), scores, jnp.finfo(jnp.float32).min)


def _einsum(equation: str, *arrays: jax.Array) -> jax.Array:
    return jnp.einsum(equation, *arrays, preferred_element_type=jnp.float32)


def _axes(keys: jax.Array) -> str:
    return "skh" if keys.ndim == 3 else "bskh"


def _grouped(array: jax.Array, keys: jax.Array) -> jax.Array:
    """Reshape `[B, T, H, h]` to `[B, T, K, G, h]`."""
    rows, length, _, size = array.shape
    return array.reshape(rows, length, keys.shape[-2], -1, size)
