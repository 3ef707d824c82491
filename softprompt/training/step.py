"""The whole idea on one page: a step that updates what a method learns, and nothing else.

A method says what backbone and what prefix to run; the loss is that of predicting the
target's tokens; only what the method declares trainable is differentiated, updated and
kept in the optimizer's state. The frozen rest is an argument, so that it is no constant
of the compiled program, and it is not donated, so that it stays as it is.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from softprompt.backbones.batch import Batch, target_log_probabilities
from softprompt.methods.method import Constant, Method
from softprompt.training.optimizers import UpdateRule

Frozen = tuple[nnx.State, nnx.State]  # the method's constants, and the rest: the backbone


def split(method: Method, backbone: Any) -> tuple[Any, nnx.State, Frozen]:
    """The structure of `(method, backbone)`, the part that is trained, and the frozen one."""
    graphdef, trainable, *rest = nnx.split((method, backbone), method.trainable, Constant, ...)
    return graphdef, trainable, (rest[0], rest[1])


def loss_sum(
    trainable: nnx.State, frozen: Frozen, graphdef: Any, batch: Batch, key: jax.Array
) -> jax.Array:
    """Negative log-likelihood of the batch's targets, in nats, summed."""
    method, backbone = nnx.merge(graphdef, trainable, *frozen)
    backbone, prefix = method.apply(backbone, key)
    log_probabilities = target_log_probabilities(backbone, prefix, batch)
    return -jnp.sum(log_probabilities, where=batch.target_candidates >= 0)


def update(
    trainable: nnx.State,
    opt_state: Any,
    frozen: Frozen,
    batch: Batch,
    key: jax.Array,
    *,
    graphdef: Any,
    optimizer: UpdateRule,
    accumulate: int = 1,
) -> tuple[nnx.State, Any, dict[str, jax.Array]]:
    """One update from the mean loss per target token of a batch.

    Args:
      trainable, frozen, graphdef: the parts and the structure of `(method, backbone)`, as
        `split` gives them.
      opt_state: the optimizer's state.
      batch: its rows are run in `accumulate` passes of equal size.
      key: for what is random in the method.
      optimizer: what makes updates of gradients.

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


PROGRAM = ("graphdef", "optimizer", "accumulate")  # what a program is compiled for

train_step = jax.jit(update, static_argnames=PROGRAM, donate_argnames=("trainable", "opt_state"))
"""`update`, compiled; `trainable` and `opt_state` are donated."""
