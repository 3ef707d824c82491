"""Optax optimizers and schedules by name."""

import jax
import optax
from flax import nnx

from softprompt.config import Optimizer
from softprompt.methods.soft_prompt import OffsetParam


def make_schedule(settings: Optimizer, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up to the peak, then constant or down to 0 at `steps`."""
    peak, rest = settings.learning_rate, max(1, steps - settings.warmup_steps)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
    }[settings.schedule]()
    # A warm-up of n steps uses 1/n, 2/n, … of the peak, so that no step is wasted on 0.
    warmup = optax.linear_schedule(
        peak / max(1, settings.warmup_steps), peak, max(1, settings.warmup_steps - 1)
    )
    return optax.join_schedules([warmup, after], [settings.warmup_steps])


def make_optimizer(
    settings: Optimizer, steps: int, offsets_learning_rate: float | None = None
) -> optax.GradientTransformation:
    """The update rule of an experiment.

    In all of them a step shrinks what is learned by learning rate times weight decay.
    Adafactor is set as in Lester et al. 2021, section 3: no scaling by the size of the
    parameter.

    Args:
      settings: the experiment's.
      steps: where the schedule ends.
      offsets_learning_rate: of DePT's offsets, if they have one of their own.
    """
    rule = _rule(settings, steps)
    if offsets_learning_rate is not None:
        of_offsets = settings.model_copy(update={"learning_rate": offsets_learning_rate})
        rules = {"offsets": _rule(of_offsets, steps), "others": rule}
        rule = optax.multi_transform(rules, _labels)
    if settings.clip_norm is None:
        return rule
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), rule)


def _labels(trainable):
    """Which rule each variable follows."""
    return jax.tree.map(
        lambda variable: "offsets" if isinstance(variable, OffsetParam) else "others",
        trainable,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )


def _rule(settings: Optimizer, steps: int) -> optax.GradientTransformation:
    rate, decay = make_schedule(settings, steps), settings.weight_decay
    rules = {
        "adamw": lambda: optax.adamw(rate, weight_decay=decay),
        "adafactor": lambda: optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(decay),
            optax.scale_by_learning_rate(rate),
        ),
        "sgd": lambda: optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum=0.9)),
        "lion": lambda: optax.lion(rate, weight_decay=decay),
    }
    return rules[settings.name]()
