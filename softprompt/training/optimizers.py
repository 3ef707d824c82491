"""Optax optimizers whose hyperparameters are part of their state.

Learning rate, warm-up, number of steps and weight decay are arrays in the optimizer state,
so that experiments that differ in them share a compiled program.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from softprompt.errors import UserError
from softprompt.experiment.methods import method_class
from softprompt.experiment.optimizer_settings import OptimizerSettings
from softprompt.experiment.schema import Experiment
from softprompt.methods.method import OffsetParam


class Hyperparameters(NamedTuple):
    """The hyperparameters of an optimizer, as float32 scalars.

    Attributes:
      learning_rate: peak learning rate.
      offsets_learning_rate: peak learning rate of DePT's offsets, or None.
      warmup_steps: number of steps until the peak.
      steps: the step at which the schedule ends.
      weight_decay: each step shrinks the parameters by this times the learning rate.
    """

    learning_rate: Any
    offsets_learning_rate: Any
    warmup_steps: Any
    steps: Any
    weight_decay: Any


@dataclasses.dataclass(frozen=True)
class UpdateRule:
    """The part of an optimizer that is compiled into a program; see `OptimizerSettings`.

    Adafactor does not scale updates by the root mean square of the parameter, as in Lester
    et al. 2021, section 3.

    Attributes:
      name: `adamw`, `adafactor`, `sgd` or `lion`.
      schedule: `constant`, `linear` or `cosine`.
      clip_norm: bound on the global gradient norm, or None.
    """

    name: str
    schedule: str
    clip_norm: float | None

    @classmethod
    def of(cls, settings: OptimizerSettings) -> "UpdateRule":
        """Return the rule of an experiment.

        Raises:
          UserError: if the optimizer is custom, because only Python code can pass it.
        """
        if settings.name == "custom":
            raise UserError(
                "optimizer.name: custom means an Optax optimizer; pass it in Python: "
                "train(..., optimizer=...)"
            )
        return cls(settings.name, settings.schedule, settings.clip_norm)

    def init(self, trainable: Any, numbers: Hyperparameters) -> tuple[Hyperparameters, Any]:
        """Return the first state of the optimizer."""
        numbers = jax.tree.map(jnp.asarray, numbers)
        return numbers, self._rule(numbers).init(trainable)

    def update(
        self, gradients: Any, state: tuple[Hyperparameters, Any], trainable: Any
    ) -> tuple[Any, tuple[Hyperparameters, Any]]:
        """Turn gradients into updates to add, as an Optax transformation does.

        Returns:
          The updates and the next state.
        """
        numbers, inner = state
        updates, inner = self._rule(numbers).update(gradients, inner, trainable)
        return updates, (numbers, inner)

    def _rule(self, numbers: Hyperparameters) -> optax.GradientTransformation:
        rule = self._unclipped(numbers)
        if numbers.offsets_learning_rate is not None:
            offsets = numbers._replace(learning_rate=numbers.offsets_learning_rate)
            rules = {"offsets": self._unclipped(offsets), "others": rule}
            rule = optax.multi_transform(rules, _labels)
        if self.clip_norm is None:
            return rule
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), rule)

    def _unclipped(self, numbers: Hyperparameters) -> optax.GradientTransformation:
        def rate(step: jax.Array) -> jax.Array:
            return learning_rate(self.schedule, numbers, step)

        decay = numbers.weight_decay
        rules = {
            "adamw": lambda: optax.adamw(rate, weight_decay=decay),
            "adafactor": lambda: optax.chain(
                optax.scale_by_factored_rms(),
                optax.clip_by_block_rms(1.0),
                optax.add_decayed_weights(decay),
                optax.scale_by_learning_rate(rate),
            ),
            "sgd": lambda: optax.chain(
                optax.add_decayed_weights(decay), optax.sgd(rate, momentum=0.9)
            ),
            "lion": lambda: optax.lion(rate, weight_decay=decay),
        }
        return rules[self.name]()


class Optimizer:
    """The optimizer of a run, by default the one of its section `optimizer`.

    Args:
      experiment: the experiment.
      custom: an Optax optimizer that replaces the section.

    Attributes:
      rule: the static argument `optimizer` of `train_step`.
      numbers: the arguments of `rule.init` after the trainable state.
    """

    def __init__(self, experiment: Experiment, custom: optax.GradientTransformation | None = None):
        self.rule: Any = UpdateRule.of(experiment.optimizer) if custom is None else custom
        self.numbers: tuple[Hyperparameters, ...] = ()
        if custom is None:
            settings, steps = experiment.optimizer, experiment.training.steps
            offsets = method_class(experiment.method).offsets_learning_rate(experiment)
            self.numbers = (hyperparameters(settings, steps, offsets),)

    def init(self, trainable: Any) -> Any:
        """Return the first state of the optimizer."""
        return self.rule.init(trainable, *self.numbers)

    def learning_rate(self, step: int) -> float | None:
        """Return the learning rate of a step, counted from 0; None for a custom optimizer."""
        if not self.numbers:
            return None
        return float(learning_rate(self.rule.schedule, self.numbers[0], step))


def hyperparameters(
    settings: OptimizerSettings, steps: int, offsets_learning_rate: float | None = None
) -> Hyperparameters:
    """Return the hyperparameters of an experiment.

    Args:
      settings: its section `optimizer`.
      steps: the step at which the schedule ends.
      offsets_learning_rate: learning rate of DePT's offsets, if the method has any.
    """
    offsets = offsets_learning_rate
    return Hyperparameters(
        learning_rate=np.float32(settings.learning_rate),
        offsets_learning_rate=None if offsets is None else np.float32(offsets),
        warmup_steps=np.float32(settings.warmup_steps),
        steps=np.float32(steps),
        weight_decay=np.float32(settings.weight_decay),
    )


def learning_rate(schedule: str, numbers: Hyperparameters, step: jax.Array | int) -> jax.Array:
    """Return the learning rate of a step, counted from 0.

    It rises linearly to the peak, then stays constant or falls to 0 at `steps`. A warm-up
    of n steps uses 1/n, 2/n, … of the peak, so that the first step is not wasted on 0.
    """
    numpy: Any = np if isinstance(step, int) else jnp  # an int needs no device
    warmup = numbers.warmup_steps
    done = numpy.clip((step - warmup) / numpy.maximum(1, numbers.steps - warmup), 0, 1)
    after = {
        "constant": numpy.ones_like(done),
        "linear": 1 - done,
        "cosine": (1 + numpy.cos(numpy.pi * done)) / 2,
    }[schedule]
    warm = (step + 1) / numpy.maximum(1, warmup)
    return numbers.learning_rate * numpy.where(step < warmup, warm, after)


def _labels(trainable):
    """Name the rule that updates each variable."""
    return jax.tree.map(
        lambda variable: "offsets" if isinstance(variable, OffsetParam) else "others",
        trainable,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )
