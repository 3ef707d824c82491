"""What an objective is given: a method on its frozen backbone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from softprompt.backbones.batch import Batch
from softprompt.backbones.loading import Backbone, Prefix
from softprompt.backbones.opening import Opening
from softprompt.methods.method import Method


class Model(NamedTuple):
    """A method and the frozen backbone that it adapts.

    Attributes:
      method: the method, which holds the trainable part.
      backbone: the backbone without the method. An objective may use it as a reference
        or as a teacher.

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

    def apply(self, key: jax.Array) -> tuple[Backbone, Prefix | Opening | None]:
        """Return the backbone and the prefix to run; see `Method.apply`."""
        return self.method.apply(self.backbone, key)


Objective = Callable[[Model, Batch, jax.Array], tuple[jax.Array, jax.Array, dict[str, Any]]]
"""A pure function `(model, batch, key) -> (sum, weight, metrics)`.

The loss of a training step is `sum / weight`, where both are added up over the batch (and
over the passes of an accumulated step). `weight` must not depend on trainable parameters.
`metrics` maps names to scalars that are added up and divided in the same way, and logged.
"""
