"""The model that an objective receives: a method on its frozen backbone, and a teacher."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from softprompt.backbones.batch import Batch
from softprompt.backbones.loading import Backbone, Prefix
from softprompt.backbones.opening import Opening
from softprompt.methods.method import Method
from softprompt.objectives.teacher import Teacher


class Model(NamedTuple):
    """A method and the frozen backbone that it adapts.

    Attributes:
      method: the method, which holds the trainable part.
      backbone: the backbone without the method. An objective may use it as a reference.
      teacher: the teacher of distillation; None if there is none.

    Examples:
      >>> base = load_base("smollm2-135m-instruct")
      >>> prompt = SoftPrompt.from_vocabulary(base, 20, jax.random.key(0))
      >>> model = Model(prompt, base.backbone)
      >>> backbone, prefix = model.apply(jax.random.key(1))
      >>> prefix
      Opening(20 tokens)
    """

    method: Method
    backbone: Backbone
    teacher: Teacher | None = None

    def apply(self, key: jax.Array | None) -> tuple[Backbone, Prefix | Opening | None]:
        """Return the backbone and the prefix to run; see `Method.apply`."""
        return self.method.apply(self.backbone, key)


Objective = Callable[[Model, Batch, jax.Array], tuple[jax.Array, jax.Array, dict[str, Any]]]
"""A pure function `(model, batch, key) -> (sum, weight, metrics)`.

The loss of a training step is `sum / weight`, where both are added up over the batch (and
over the passes of an accumulated step). `weight` must not depend on trainable parameters.
`metrics` maps names to scalars that are added up and divided in the same way, and logged.
"""


class RowObjective(abc.ABC):
    """An objective that can tell rows apart, so that it can be evaluated on validation data."""

    def __call__(
        self, model: Model, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        """Return the sums of the values of all rows, and of their weights; see `Objective`."""
        values, weights = self.of_rows(model, batch, key)
        sums = {name: jnp.sum(value, where=weights > 0) for name, value in values.items()}
        return sums.pop("loss"), jnp.sum(weights), sums

    @abc.abstractmethod
    def of_rows(
        self, model: Model, batch: Batch, key: jax.Array | None
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        """Return values of each row by name, `loss` and metrics, and the weight of each row.

        Values and weights are `[B]`. The value of a batch is the sum of the values divided by the
        sum of the weights. Rows of padding have weight 0.

        Args:
          model: the method on its backbone. The backbone without the method may be the reference.
          batch: rows with targets `[G, M]`.
          key: the random key of this pass, for dropout; None for no dropout.
        """
