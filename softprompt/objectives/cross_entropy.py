"""Cross-entropy of the target tokens, with label smoothing and weights of rows.

Axis letters: G packs, M targets of a pack, C targets of a chunk, V vocabulary.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from softprompt.backbones.batch import (
    Batch,
    for_each_target,
    target_log_probabilities,
    values_from_logits,
)
from softprompt.backbones.head import log_probability
from softprompt.objectives.model import Model

_SMALLEST = jnp.finfo(jnp.float32).tiny


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy as an objective; see `cross_entropy`.

    Attributes:
      label_smoothing: the share of the target probability that is divided over the vocabulary.
    """

    label_smoothing: float = 0.0

    def __call__(
        self, model: Model, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        """Return what `cross_entropy` returns."""
        return cross_entropy(model, batch, key, self.label_smoothing)


def cross_entropy(
    model: Model, batch: Batch, key: jax.Array, label_smoothing: float = 0.0
) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    """Compute the negative log-likelihood of a batch's target tokens.

    Args:
      model: the method on its backbone.
      batch: rows with targets `[G, M]`. If it has weights, each target counts with that of its row.
      key: the random key of this pass, for dropout.
      label_smoothing: the share of the target probability that is divided over the whole
        vocabulary, the target included (Szegedy et al. 2016, arXiv:1512.00567, section 7).

    Returns:
      The sum over all target tokens in nats, and the number of target tokens, or the sum of their
      weights. Both numbers are scalars `[]`. With label smoothing, the metric `cross_entropy` is
      the same sum without it.

    Examples:
      >>> base = load_base("smollm2-135m-instruct")
      >>> task = make_task(base, TemplateSettings(input="{text}"), None, virtual_tokens=5)
      >>> records = [{"text": "One, two,", "label": " three"}] * 4
      >>> batches = TrainingBatches(make_examples(task, records), batch_size=2, seed=0)
      >>> prompt = SoftPrompt.from_vocabulary(base, 5, jax.random.key(0))
      >>> model = Model(prompt, base.backbone)
      >>> total, weight, metrics = cross_entropy(model, batches[0], jax.random.key(1))
      >>> loss = total / weight
    """
    backbone, prefix = model.apply(key)
    weights = _weights(batch)  # [G, M]
    is_target = weights > 0
    # A batch in which all weights are 0 has no loss, rather than 0 / 0.
    weight = jnp.maximum(jnp.sum(weights), _SMALLEST)
    if not label_smoothing:
        losses = -target_log_probabilities(backbone, prefix, batch)
        return jnp.sum(weights * losses, where=is_target), weight, {}

    def smoothed(logits: jax.Array, _: None, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        return smoothed_losses(logits, targets, label_smoothing), -log_probability(logits, targets)

    losses, plain = values_from_logits(smoothed, backbone, prefix, batch, batch.targets)
    metrics = {"cross_entropy": jnp.sum(weights * plain, where=is_target)}
    return jnp.sum(weights * losses, where=is_target), weight, metrics


def smoothed_losses(logits: jax.Array, targets: jax.Array, share: float) -> jax.Array:
    """Return the cross-entropy with smoothed target probabilities.

    Args:
      logits: `[G, C, V]`.
      targets: ids `[G, C]`.
      share: the share of the probability that is divided over the vocabulary.

    Returns:
      `[G, C]`, in nats.
    """
    mean = jnp.mean(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1)
    return -(1 - share) * log_probability(logits, targets) - share * mean


def _weights(batch: Batch) -> jax.Array:
    """Return the weight of each target, `[G, M]`; 0 for padding."""
    is_target = (batch.target_candidates >= 0).astype(jnp.float32)
    if batch.weights is None:
        return is_target
    return is_target * for_each_target(batch, batch.weights)
