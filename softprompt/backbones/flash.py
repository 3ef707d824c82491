"""Flash attention of rows to themselves and to a shared prefix, without a copy of the prefix.

A flash kernel computes attention to one set of keys and never stores all scores. It is called
twice: for the keys of each row, and for the prefix, which all rows share. The log-sum-exps of the
scores say how much of the softmax belongs to each of the two outputs, so that they can be joined.

The gradient needs no new kernel either. A flash kernel's backward pass recomputes the weights of
the softmax from the scores and their log-sum-exp. Given the joint output and the joint
log-sum-exp, it returns the part of the gradient that comes from its own keys.

Axis letters: B batch, T tokens, P virtual tokens, S keys, H query heads, K key-value heads,
h head size.
"""

import dataclasses
from functools import partial
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from softprompt.parallel.mesh import on_own_heads

FlashName = Literal["cudnn", "pallas"]
AttentionName = Literal["xla", "cudnn", "pallas"]


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How queries and keys are scored: query t and key s, if 0 <= offset + t - s < window.

    Attributes:
      scale: the factor of the scores.
      softcap: caps the scores at ±c, see `attention.attend`; None for no cap.
      window: the number of positions a query attends to, including its own; None for all.
      offset: the position of the first query, counted from the first key.
    """

    scale: float
    softcap: float | None
    window: int | None
    offset: int

    def sees_all(self, queries: int, keys: int) -> bool:
        """Return whether each of the queries attends to each of the keys."""
        within = self.window is None or self.offset + queries <= self.window
        return within and keys <= self.offset + 1

    def visible(self, distance: jax.Array) -> jax.Array:
        """Return which queries attend to which keys, given their distances `offset + t - s`."""
        visible = distance >= 0
        return visible if self.window is None else visible & (distance < self.window)

    def scores(self, products: jax.Array) -> jax.Array:
        """Return the scores of queries and keys, given their inner products."""
        scores = self.scale * products
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)

    def slope(self, scores: jax.Array) -> jax.Array | float:
        """Return the derivative of `scores`, given its result. It is 0 for a masked score."""
        if self.softcap is None:
            return self.scale
        return self.scale * (1 - jnp.maximum(scores / self.softcap, -1) ** 2)


class Kernel(Protocol):
    """A module with the two passes of flash attention to one set of keys.

    Keys and values are `[B, S, K, h]`, or `[S, K, h]` if all rows share them.
    """

    def forward(
        self, queries: jax.Array, keys: jax.Array, values: jax.Array, scoring: Scoring
    ) -> tuple[jax.Array, jax.Array]:
        """Return the output `[B, T, H, h]` and the log-sum-exps of the scores `[B, H, T]`.

        A query that attends to no key has a log-sum-exp that is negative and very large, and any
        output that is finite.
        """
        ...

    def backward(
        self,
        queries: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        output: jax.Array,
        sums: jax.Array,
        gradient: jax.Array,
        scoring: Scoring,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the gradients of queries, keys and values.

        Args:
          queries, keys, values, scoring: as in `forward`.
          output: the output of attention to all sets of keys, `[B, T, H, h]`.
          sums: the log-sum-exps over all sets of keys, `[B, H, T]`.
          gradient: of the output.
        """
        ...


def flash_attend(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    prefix: tuple[jax.Array, jax.Array] | None,
    *,
    kernel: Kernel,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Compute causal attention of each row to itself and to a prefix.

    Args:
      queries: `[B, T, H, h]`.
      keys, values: `[B, T, K, h]`.
      prefix: keys and values `[P, K, h]` shared by all rows, or None.
      kernel: computes attention to one set of keys; see `kernel_of`.
      scale: the factor of the scores.
      window: the number of positions a query attends to, including its own; None for all.
      softcap: caps the scores at ±c, see `attention.attend`; None for no cap.
      mesh: the mesh that divides rows and heads, or None.

    Returns:
      `[B, T, H, h]`.
    """
    own = Scoring(scale, softcap, window, offset=0)
    scorings = [own]
    if prefix is not None:
        scorings.append(dataclasses.replace(own, offset=len(prefix[0])))

    def attend(queries, *keys_and_values):
        sources = list(zip(keys_and_values[::2], keys_and_values[1::2], strict=True))
        return _attend(kernel, tuple(scorings), queries, sources)

    return on_own_heads(attend, mesh, (queries, keys, values), prefix or ())


def kernel_of(name: FlashName) -> Kernel:
    """Return a kernel by its name."""
    if name == "cudnn":
        from softprompt.backbones import cudnn_kernel

        return cudnn_kernel
    from softprompt.backbones import pallas_kernel

    return pallas_kernel


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(kernel, scorings, queries, sources):
    return _forward(kernel, scorings, queries, sources)[0]


def _forward(kernel, scorings, queries, sources):
    parts = [
        kernel.forward(queries, *source, scoring)
        for source, scoring in zip(sources, scorings, strict=True)
    ]
    output, sums = parts[0]
    for other, other_sums in parts[1:]:
        joint = jnp.logaddexp(sums, other_sums)
        output = _weighted(output, sums - joint) + _weighted(other, other_sums - joint)
        sums = joint
    output = output.astype(queries.dtype)
    return output, (queries, sources, output, sums)


def _weighted(output: jax.Array, logarithms: jax.Array) -> jax.Array:
    """Multiply outputs `[B, T, H, h]` by weights whose logarithms are `[B, H, T]`."""
    return output.astype(jnp.float32) * jnp.exp(logarithms).transpose(0, 2, 1)[..., None]


def _backward(kernel, scorings, residuals, gradient):
    queries, sources, output, sums = residuals
    parts = [
        kernel.backward(queries, *source, output, sums, gradient, scoring)
        for source, scoring in zip(sources, scorings, strict=True)
    ]
    of_queries = sum(part.astype(jnp.float32) for part, *_ in parts).astype(queries.dtype)
    return of_queries, [tuple(of_source) for _, *of_source in parts]


_attend.defvjp(_forward, _backward)
