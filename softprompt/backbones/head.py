"""The output head, and functions of the logits of targets, without all logits at once.

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

    Args:
      head: the output head.
      hidden: the hidden states from which the targets are predicted, `[G, M, D]`.
      targets: ids `[G, M]`.
      count: a scalar: in each pack, only the first `count` targets have a meaning. The
        others cost nothing, apart from those in the same chunk.

    Returns:
      `[G, M]` float32, with arbitrary values for targets from `count` on.
    """

    def of_logits(logits: jax.Array, _: None, targets: jax.Array) -> tuple[jax.Array, None]:
        return log_probability(logits, targets), None

    return from_logits(of_logits, head, hidden, count, targets)[0]


def log_probability(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the log-probabilities of targets `[...]` from logits `[..., V]`."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def from_logits(
    function: Callable[..., tuple[jax.Array, Any]],
    head: OutputHead,
    hidden: jax.Array,
    count: jax.Array,
    *arrays: jax.Array,
    shared: Any = None,
) -> tuple[jax.Array, Any]:
    """Call a function with the logits of targets, for a chunk of targets at a time.

    The gradient with respect to the hidden states needs the same logits, so it is computed in the
    forward pass, as in Liger Kernel (arXiv:2410.10989). Only a trained head computes its logits
    again in the backward pass.

    Args:
      function: takes float32 logits `[G, C, V]`, `shared`, and `[G, C, ...]` of each array. It
        returns values `[G, C]` and a pytree of arrays `[G, C, ...]`. A value may depend only on
        the logits of its own target.
      head: the output head.
      hidden: the hidden states from which the targets are predicted, `[G, M, D]`.
      count: a scalar: in each pack, only the first `count` targets have a meaning.
      arrays: `[G, M, ...]`. They have no gradient.
      shared: a pytree of arrays that all chunks use, such as another head. It has no gradient.

    Returns:
      The values `[G, M]`, and the pytree of arrays `[G, M, ...]`, which have no gradient. Both are
      arbitrary for targets from `count` on.
    """
    graphdef, weights = nnx.split(head)

    def of_chunk(weights: Any, shared: Any, hidden: jax.Array, *arrays: jax.Array):
        return function(nnx.merge(graphdef, weights)(hidden), shared, *arrays)

    def with_gradient(weights: Any, shared: Any, hidden: jax.Array, *arrays: jax.Array):
        # Each value depends only on its own hidden state. The gradient of their sum therefore
        # holds the gradients of all of them.
        values, pull, others = jax.vjp(
            lambda hidden: of_chunk(weights, shared, hidden, *arrays), hidden, has_aux=True
        )
        return (values, others), pull(jnp.ones_like(values))[0]

    packs, length, _ = hidden.shape
    vocabulary = jax.eval_shape(head, hidden[:, :1]).shape[-1]
    size = min(length, max(8, _MAX_LOGITS // (packs * vocabulary)))

    @jax.custom_vjp
    def run(weights: Any, shared: Any, count: jax.Array, *arrays: jax.Array):
        return _in_chunks(of_chunk, size, count, weights, shared, *arrays)

    def forward(*inputs: Any):
        is_trained = any(leaf.perturbed for leaf in jax.tree.leaves(inputs[0]))
        inputs = jax.tree.map(lambda leaf: leaf.value, inputs)
        if is_trained:
            return run(*inputs), (inputs, None)
        weights, shared, count, *arrays = inputs
        results, gradient = _in_chunks(with_gradient, size, count, weights, shared, *arrays)
        return results, (None, gradient)

    def backward(kept: Any, cotangents: Any):
        inputs, gradient = kept
        cotangent, no_gradient = cotangents[0], [None] * len(arrays)
        if isinstance(cotangent, SymbolicZero):
            cotangent = jnp.zeros(cotangent.shape, cotangent.dtype)
        if inputs is None:
            of_hidden = (gradient * cotangent[..., None]).astype(gradient.dtype)
            return None, None, None, of_hidden, *no_gradient
        weights, shared, _, *others = inputs
        gradients = _pull_in_chunks(of_chunk, size, weights, shared, cotangent, *others)
        return gradients[0], None, None, gradients[1], *no_gradient

    run.defvjp(forward, backward, symbolic_zeros=True)
    padded = [
        jnp.pad(array, [(0, 0), (0, -length % size), *[(0, 0)] * (array.ndim - 2)])
        for array in (hidden, *arrays)
    ]
    return jax.tree.map(lambda x: x[:, :length], run(weights, shared, count, *padded))


def _in_chunks(
    function: Callable[..., Any],
    size: int,
    count: jax.Array,
    weights: Any,
    shared: Any,
    *arrays: jax.Array,
) -> Any:
    """Call a function with the first `count` entries of arrays `[G, M, ...]`, `size` at a time.

    Returns:
      Arrays `[G, M, ...]`. They are zero where the function was not called.
    """
    if arrays[0].shape[1] == size:
        return function(weights, shared, *arrays)

    def of_chunk(_, inputs: Any) -> tuple[None, Any]:
        number, *chunk = inputs
        shapes = jax.eval_shape(function, weights, shared, *chunk)
        return None, jax.lax.cond(
            number * size < count,
            lambda: function(weights, shared, *chunk),
            lambda: jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes),
        )

    chunks = [_divide(array, size) for array in arrays]
    _, results = jax.lax.scan(of_chunk, None, (jnp.arange(len(chunks[0])), *chunks))
    return jax.tree.map(_join, results)


def _pull_in_chunks(
    function: Callable[..., tuple[jax.Array, Any]],
    size: int,
    weights: Any,
    shared: Any,
    cotangent: jax.Array,
    *arrays: jax.Array,
) -> tuple[Any, jax.Array]:
    """Return the gradients of `function`, called in chunks, for its weights and hidden states.

    Args:
      function, size, weights, shared: see `_in_chunks`.
      cotangent: `[G, M]`, of the values.
      arrays: the hidden states, followed by the other arrays `[G, M, ...]`.
    """

    def add_chunk(total: Any, inputs: Any) -> tuple[Any, jax.Array]:
        cotangent, hidden, *others = inputs
        _, pull, _ = jax.vjp(
            lambda weights, hidden: function(weights, shared, hidden, *others),
            weights,
            hidden,
            has_aux=True,
        )
        of_weights, of_hidden = pull(cotangent)
        return jax.tree.map(jnp.add, total, of_weights), of_hidden

    chunks = [_divide(array, size) for array in (cotangent, *arrays)]
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
