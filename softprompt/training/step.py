"""The whole idea on one page: a step that updates what a method learns, and nothing else.

A method says what backbone and what prefix to run; the loss is that of predicting the
target's tokens; only what the method declares trainable is differentiated, updated and
kept in the optimizer's state. The frozen rest is an argument, so that it is no constant
of the compiled program, and it is not donated, so that it stays as it is.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from softprompt.backbones.batch import Batch, target_log_probabilities


def loss_sum(
    trainable: nnx.State, frozen: nnx.State, graphdef: Any, batch: Batch, key: jax.Array
) -> jax.Array:
    """Negative log-likelihood of the batch's targets, in nats, summed."""
    method, backbone = nnx.merge(graphdef, trainable, frozen)
    backbone, prefix = method.apply(backbone, key)
    log_probabilities = target_log_probabilities(backbone, prefix, batch)
    return -jnp.sum(log_probabilities, where=batch.target_candidates >= 0)


@partial(
    jax.jit,
    static_argnames=("graphdef", "optimizer", "accumulate"),
    donate_argnames=("trainable", "opt_state"),
)
def train_step(
    trainable: nnx.State,
    opt_state: optax.OptState,
    frozen: nnx.State,
    batch: Batch,
    key: jax.Array,
    *,
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    accumulate: int = 1,
) -> tuple[nnx.State, optax.OptState, dict[str, jax.Array]]:
    """One update from the mean loss per target token of a batch.

    Args:
      trainable, frozen, graphdef: the two parts and the structure of `(method, backbone)`.
      opt_state: the optimizer's state; it and `trainable` are donated.
      batch: its rows are run in `accumulate` passes of equal size.
      key: for what is random in the method.
      optimizer: any Optax transformation.

    Returns:
      The new trainable part and optimizer state, and `loss` and `gradient_norm`.
    """

    def add_pass(total, rows_and_key):
        of_pass = value_and_gradient(trainable, frozen, graphdef, *rows_and_key)
        return jax.tree.map(jnp.add, total, of_pass), None

    value_and_gradient = jax.value_and_grad(loss_sum)
    passes = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)
    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trainable))
    total, _ = jax.lax.scan(add_pass, zero, (passes, jax.random.split(key, accumulate)))
    count = jnp.sum(batch.target_candidates >= 0, dtype=jnp.float32)
    loss, gradients = jax.tree.map(lambda x: x / count, total)
    updates, opt_state = optimizer.update(gradients, opt_state, trainable)
    measured = {"loss": loss, "gradient_norm": optax.tree.norm(gradients)}
    return optax.apply_updates(trainable, updates), opt_state, measured
