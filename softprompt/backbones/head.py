"""The output head, and log-probabilities of targets without the logits of all of them at once.

Axis letters: G packs, M targets of a pack, C targets of a chunk, D hidden, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_derivatives import SymbolicZero
from jax.sharding import Mesh

from softprompt.backbones.layers import Embedding, Linear
from softprompt.parallel.mesh import ROWS_OF_LOGITS, VOCABULARY, divide

_MAX_LOGITS = 2**24  # logits of a chunk, 64 MiB


class OutputHead(nnx.Module):
    """Maps hidden states to logits.

    Args:
      embedding: the input embeddings. Their table is the kernel if `linear` is None.
      linear: the head of a model that does not tie it to the embeddings, or None.
      mesh: the mesh, or None. It divides the vocabulary.
      scale: the factor of the logits.
      softcap: caps the logits at ±c by c·tanh(logit / c) (Gemma 2, arXiv:2408.00118); None for no
        cap.
    """

    def __init__(
        self,
        embedding: Embedding,
        linear: Linear | None,
        mesh: Mesh | None,
        *,
        scale: float,
        softcap: float | None = None,
    ):
        self.linear, self.mesh = linear, mesh
        if linear is None:
            self.table = embedding.table
        self.scale, self.softcap = scale, softcap

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Map hidden states `[B, ..., D]` to float32 logits `[B, ..., V]`."""
        hidden = divide(hidden, self.mesh, ROWS_OF_LOGITS)
        if self.linear is not None:
            logits = self.linear(hidden).astype(jnp.float32)
        else:
            table = self.table[...]
            logits = jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
        logits = divide(logits, self.mesh, ROWS_OF_LOGITS, *[None] * (logits.ndim - 2), VOCABULARY)
        logits = logits * self.scale
        return self.softcap * jnp.tanh(logits / self.softcap) if self.softcap else logits


def log_probabilities(
    head: OutputHead, hidden: jax.Array, targets: jax.Array, count: jax.Array
) -> jax.Array:
    """Return the log-probabilities of targets.

    Logits are computed for a chunk of targets at a time. The gradient with respect to the hidden
    states needs the same logits, so it is computed in the forward pass, as in Liger Kernel
    (arXiv:2410.10989). Only a trained head computes its logits again in the backward pass.

    Args:
      head: the output head.
      hidden: the hidden states from which the targets are predicted, `[G, M, D]`.
      targets: ids `[G, M]`.
      count: a scalar: in each pack, only the first `count` targets have a meaning. The
        others cost nothing, apart from those in the same chunk.

    Returns:
      `[G, M]` float32, with arbitrary values for targets from `count` on.
    """
    graphdef, weights = nnx.split(head)

    def of_chunk(weights: Any, hidden: jax.Array, targets: jax.Array) -> jax.Array:  # [G, C]
        logits = nnx.merge(graphdef, weights)(hidden)  # [G, C, V]
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    def with_gradient(weights: Any, hidden: jax.Array, targets: jax.Array):
        # Each log-probability depends only on its own hidden state. The gradient of their sum
        # therefore holds the gradients of all of them.
        results, pull = jax.vjp(lambda hidden: of_chunk(weights, hidden, targets), hidden)
        return results, pull(jnp.ones_like(results))[0]

    packs, length = targets.shape
    vocabulary = jax.eval_shape(head, hidden[:, :1]).shape[-1]
    size = min(length, max(8, _MAX_LOGITS // (packs * vocabulary)))
    padding = [(0, 0), (0, -length % size)]

    @jax.custom_vjp
    def run(weights: Any, hidden: jax.Array, targets: jax.Array, count: jax.Array) -> jax.Array:
        return _in_chunks(of_chunk, size, count, weights, hidden, targets)

    def forward(weights: Any, hidden: Any, targets: Any, count: Any):
        is_trained = any(leaf.perturbed for leaf in jax.tree.leaves(weights))
        arguments = jax.tree.map(lambda leaf: leaf.value, (weights, hidden, targets, count))
        if is_trained:
            return run(*arguments), (arguments, None)
        *arrays, count = arguments[1:]
        results, gradient = _in_chunks(with_gradient, size, count, arguments[0], *arrays)
        return results, (None, gradient)

    def backward(kept: Any, cotangent: Any):
        arguments, gradient = kept
        if isinstance(cotangent, SymbolicZero):
            cotangent = jnp.zeros(cotangent.shape, cotangent.dtype)
        if arguments is None:
            return None, (gradient * cotangent[..., None]).astype(gradient.dtype), None, None
        weights, hidden, targets, _ = arguments
        of_weights, of_hidden = _pull_in_chunks(of_chunk, size, weights, hidden, targets, cotangent)
        return of_weights, of_hidden, None, None

    run.defvjp(forward, backward, symbolic_zeros=True)
    hidden, targets = jnp.pad(hidden, [*padding, (0, 0)]), jnp.pad(targets, padding)
    return run(weights, hidden, targets, count)[:, :length]


def _in_chunks(
    function: Callable[..., Any], size: int, count: jax.Array, weights: Any, *arrays: jax.Array
) -> Any:
    """Call a function with the first `count` entries of arrays `[G, M, ...]`, `size` at a time.

    Returns:
      Arrays `[G, M, ...]`. They are zero where the function was not called.
    """
    if arrays[0].shape[1] == size:
        return function(weights, *arrays)

    def of_chunk(_, inputs: Any) -> tuple[None, Any]:
        number, *chunk = inputs
        shapes = jax.eval_shape(function, weights, *chunk)
        return None, jax.lax.cond(
            number * size < count,
            lambda: function(weights, *chunk),
            lambda: jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes),
        )

    chunks = [_divide(array, size) for array in arrays]
    _, results = jax.lax.scan(of_chunk, None, (jnp.arange(len(chunks[0])), *chunks))
    return jax.tree.map(_join, results)


def _pull_in_chunks(
    function: Callable[..., jax.Array],
    size: int,
    weights: Any,
    hidden: jax.Array,
    targets: jax.Array,
    cotangent: jax.Array,
) -> tuple[Any, jax.Array]:
    """Return the gradients of `function`, called in chunks, for its weights and hidden states."""

    def add_chunk(total: Any, inputs: Any) -> tuple[Any, jax.Array]:
        hidden, targets, cotangent = inputs
        _, pull = jax.vjp(
            lambda weights, hidden: function(weights, hidden, targets), weights, hidden
        )
        of_weights, of_hidden = pull(cotangent)
        return jax.tree.map(jnp.add, total, of_weights), of_hidden

    chunks = [_divide(array, size) for array in (hidden, targets, cotangent)]
    zeros = jax.tree.map(jnp.zeros_like, weights)
    of_weights, of_hidden = jax.lax.scan(add_chunk, zeros, chunks)
    return of_weights, _join(of_hidden)


def _divide(array: jax.Array, size: int) -> jax.Array:
    """Divide `[G, M, ...]` into chunks `[M / C, G, C, ...]` with C = `size`."""
    packs, length, *rest = array.shape
    return jnp.swapaxes(array.reshape(packs, length // size, size, *rest), 0, 1)


def _join(chunks: jax.Array) -> jax.Array:
    """Join chunks `[M / C, G, C, ...]` to `[G, M, ...]`."""
    count, packs, size, *rest = chunks.shape
    return jnp.swapaxes(chunks, 0, 1).reshape(packs, count * size, *rest)
