"""The memory that a method needs in training, checked before anything is allocated."""

from collections.abc import Sequence
from typing import Any

import jax
import optax
from flax import nnx

from softprompt.backbones.loading import Base
from softprompt.errors import UserError
from softprompt.experiment.methods import method_class
from softprompt.experiment.schema import Experiment
from softprompt.parallel.hosts import bytes_here
from softprompt.parallel.sharding import with_shardings
from softprompt.runtime.memory import available_memory, gibibytes
from softprompt.training.optimizers import Optimizer
from softprompt.training.step import split


def require_memory(
    experiment: Experiment,
    base: Base,
    opening: Sequence[int],
    given: Sequence[jax.Array],
    custom: optax.GradientTransformation | None = None,
) -> None:
    """Check, without allocating it, that what the method trains fits into memory.

    Counted are the arrays of the method, their gradient and the state of the optimizer. Of what a
    mesh divides, only the part that this process holds is counted.

    Args:
      experiment, base, opening, given: the arguments of `Method.build`.
      custom: an Optax optimizer that replaces the section `optimizer`.

    Raises:
      UserError: if they need more memory than is available.
    """
    kind = method_class(experiment.method)

    def arrays() -> tuple[Any, Any, Any]:
        method = kind.build(experiment, base, opening, given)
        _, trainable, _ = split(method, base.backbone)
        return nnx.state(method), trainable, Optimizer(experiment, custom).init(trainable)

    shapes = with_shardings(jax.eval_shape(arrays), base.backbone.mesh)
    needed, available = bytes_here(shapes), available_memory()
    if needed > available:
        names = [*kind.size_settings, "method"]
        raise UserError(
            f"method {experiment.method}: its parameters, gradient and optimizer state need "
            f"{gibibytes(needed)}, but {gibibytes(available)} are available; "
            f"change {' or '.join(names)}"
        )
