"""Cross-entropy of the target tokens.

Axis letters: G packs, M targets of a pack.
"""

from typing import Any

import jax
import jax.numpy as jnp

from softprompt.backbones.batch import Batch, target_log_probabilities
from softprompt.objectives.model import Model


def cross_entropy(
    model: Model, batch: Batch, key: jax.Array
) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    """Compute the negative log-likelihood of a batch's target tokens.

    Args:
      model: the method on its backbone.
      batch: rows with targets `[G, M]`.
      key: the random key of this pass, for dropout.

    Returns:
      The sum over all target tokens in nats, the number of target tokens, and no metrics. Both
      numbers are scalars `[]`.

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
    log_probabilities = target_log_probabilities(backbone, prefix, batch)  # [G, M]
    is_target = batch.target_candidates >= 0
    total = -jnp.sum(log_probabilities, where=is_target)
    return total, jnp.sum(is_target, dtype=jnp.float32), {}
