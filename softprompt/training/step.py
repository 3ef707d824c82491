"""The training step: it updates what a method learns, and nothing else.

An objective gives the sum of a loss over a batch and the weight to divide it by. The step
differentiates `sum / weight` with respect to the trainable state only. The frozen state is
an argument of the compiled program rather than a constant in it, and it is not donated, so
that it stays valid.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from softprompt.backbones.batch import Batch
from softprompt.methods.method import Constant, Method
from softprompt.objectives.model import Model, Objective
from softprompt.objectives.teacher import Teacher
from softprompt.parallel.mesh import sum_over_data
from softprompt.parallel.sharding import keep_divided
from softprompt.training.optimizers import UpdateRule

Frozen = tuple[nnx.State, nnx.State]  # the method's constants; the backbone and the teacher

_METHOD, _TEACHER = 0, 2  # the places in what `split` divides


def split(
    method: Method, backbone: Any, teacher: Teacher | None = None
) -> tuple[Any, nnx.State, Frozen]:
    """Split a model into its structure, its trainable state and its frozen state.

    Args:
      method: the method, with arrays such as `[P, D]` vectors.
      backbone: the frozen backbone of the base model.
      teacher: the teacher of distillation, if any. Nothing in it is trainable. Arrays that it
        shares with the backbone are in the frozen state once.

    Returns:
      The structure (an NNX graphdef), the trainable state, and the frozen state. The arrays
      keep their shapes. `nnx.merge(graphdef, trainable, *frozen)` returns the method, the
      backbone, and the teacher if there is one.

    Examples:
      >>> base = load_base("smollm2-135m-instruct")
      >>> prompt = SoftPrompt.from_vocabulary(base, 20, jax.random.key(0))
      >>> graphdef, trainable, frozen = split(prompt, base.backbone)
      >>> [array.shape for array in jax.tree.leaves(trainable)]
      [(20, 576)]
    """
    is_trained = nnx.All(method.trainable, lambda path, _: path[0] != _TEACHER)
    is_constant = nnx.All(Constant, lambda path, _: path[0] == _METHOD)
    model = (method, backbone) if teacher is None else (method, backbone, teacher)
    graphdef, trainable, *frozen = nnx.split(model, is_trained, is_constant, ...)
    return graphdef, trainable, (frozen[0], frozen[1])


def update(
    trainable: nnx.State,
    opt_state: Any,
    frozen: Frozen,
    batch: Batch,
    key: jax.Array,
    *,
    graphdef: Any,
    optimizer: UpdateRule | optax.GradientTransformation,
    objective: Objective,
    accumulate: int = 1,
) -> tuple[nnx.State, Any, dict[str, jax.Array]]:
    """Make one update.

    Args:
      trainable, frozen, graphdef: what `split` returned. The trainable arrays have the shapes
        of the method, such as `[P, D]` for the vectors of a soft prompt.
      opt_state: state of the optimizer.
      batch: rows in packs, `[G, N]` tokens with `[G, M]` targets. The packs are run in
        `accumulate` passes of equal size.
      key: random key for the objective, such as for dropout.
      optimizer: turns gradients into updates: any Optax optimizer, or an `UpdateRule`, whose
        hyperparameters are not compiled in.
      objective: the loss; see `Objective`.
      accumulate: number of passes.

    Returns:
      The new trainable state, the new optimizer state, and measurements: `loss`,
      `gradient_norm` (before any clipping) and the metrics of the objective, all scalars.

    Examples:
      >>> base = load_base("smollm2-135m-instruct")
      >>> task = make_task(base, TemplateSettings(input="{text}"), None, virtual_tokens=5)
      >>> records = [{"text": "One, two,", "label": " three"}] * 4
      >>> batches = TrainingBatches(make_examples(task, records), batch_size=2, seed=0)
      >>> start = SoftPrompt.from_vocabulary(base, 5, jax.random.key(0))
      >>> prompt = SoftPrompt(start.vectors[...], task.opening)
      >>> optimizer = optax.adamw(2e-2)
      >>> graphdef, trainable, frozen = split(prompt, base.backbone)
      >>> opt_state = optimizer.init(trainable)
      >>> program = dict(graphdef=graphdef, optimizer=optimizer, objective=cross_entropy)
      >>> for step in range(2):
      ...     trainable, opt_state, measured = train_step(
      ...         trainable, opt_state, frozen, batches[step], jax.random.key(step), **program
      ...     )
      >>> sorted(measured)
      ['gradient_norm', 'loss']
      >>> prompt, backbone = nnx.merge(graphdef, trainable, *frozen)
    """
    _, backbone, *_ = nnx.merge(graphdef, trainable, *frozen)
    mesh = backbone.mesh

    def loss_sum(trainable: nnx.State, frozen: Frozen, batch: Batch, key: jax.Array):
        model = Model(*nnx.merge(graphdef, trainable, *frozen))
        total, weight, metrics = objective(model, batch, key)
        return total, (weight, metrics)

    def sums(arrays: tuple[nnx.State, Frozen], batch: Batch, key: jax.Array):
        return jax.value_and_grad(loss_sum, has_aux=True)(*arrays, batch, key)

    def add_pass(total, batch_and_key):
        one_pass = sum_over_data(sums, mesh)((trainable, frozen), *batch_and_key)
        return jax.tree.map(jnp.add, total, one_pass), None

    # A pass takes every `accumulate`-th pack, so that each device can keep its packs.
    passes = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
    inputs = passes, jax.random.split(key, accumulate)
    shapes = jax.eval_shape(sums, (trainable, frozen), *jax.tree.map(lambda x: x[0], inputs))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    ((total, (weight, metrics)), gradients), _ = jax.lax.scan(add_pass, zeros, inputs)
    loss, gradients, metrics = jax.tree.map(lambda x: x / weight, (total, gradients, metrics))
    updates, opt_state = optimizer.update(gradients, opt_state, trainable)
    trainable = optax.apply_updates(trainable, updates)
    measured = {"loss": loss, "gradient_norm": optax.tree.norm(gradients), **metrics}
    return *keep_divided((trainable, opt_state), mesh), measured


PROGRAM = ("graphdef", "optimizer", "objective", "accumulate")  # static arguments of `update`

train_step = jax.jit(update, static_argnames=PROGRAM, donate_argnames=("trainable", "opt_state"))
"""`update`, compiled. `trainable` and `opt_state` are donated."""
