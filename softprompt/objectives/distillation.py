"""Distillation: the student learns the distributions of a teacher that reads more or is better.

The student is the base model with the trained part. The teacher is another frozen model, or the
base model with a text before the rows or with its own rows. Both predict the same targets.

Axis letters: G packs, R rows of a pack, B = G·R rows, M targets of a pack, C targets of a chunk,
V vocabulary, k most likely tokens.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from softprompt.backbones.batch import Batch, values_from_logits
from softprompt.objectives.divergence import kl_divergence, with_others
from softprompt.objectives.model import Model, RowObjective
from softprompt.objectives.teacher import Teacher


def distillation_loss(logits: jax.Array, teacher: jax.Array, temperature: float) -> jax.Array:
    """Return KL(teacher ‖ student) over the whole vocabulary.

    This is the loss of Hinton et al. 2015, arXiv:1503.02531, for soft targets alone. It is
    not multiplied by the square of the temperature, as in TRL's `GKDTrainer` with `beta` 0.

    Args:
      logits: `[..., V]`, of the student.
      teacher: `[..., V]`, the teacher's logits.
      temperature: both logits are divided by it.

    Returns:
      `[...]`, in nats.
    """
    return kl_divergence(teacher / temperature, logits / temperature)


def top_distillation_loss(
    logits: jax.Array, ids: jax.Array, expected: jax.Array, temperature: float
) -> jax.Array:
    """Return KL(teacher ‖ student) over the teacher's k most likely tokens and all others together.

    It is at most the divergence over the whole vocabulary, by the log-sum inequality (Cover and
    Thomas, Elements of Information Theory, theorem 2.7.1), and equal to it with k = V.

    Args:
      logits: `[..., V]`, of the student.
      ids: `[..., k]`, the teacher's most likely tokens.
      expected: `[..., k + 1]`, the teacher's log-probabilities of these tokens and of all others
        together, at this temperature.
      temperature: the logits are divided by it.

    Returns:
      `[...]`, in nats.
    """
    found = with_others(logits / temperature, ids)
    return jnp.sum(jnp.exp(expected) * (expected - found), axis=-1)


_Comparison = tuple[Callable[..., tuple[jax.Array, jax.Array]], tuple[jax.Array, ...], Any]
"""The arguments `function`, `arrays` and `shared` of `values_from_logits`."""


@dataclasses.dataclass(frozen=True)
class Distillation(RowObjective):
    """Distillation as an objective. The model must have a teacher, or the batch its top tokens.

    Attributes:
      temperature: see `distillation_loss`.
    """

    temperature: float = 1.0

    def of_rows(
        self, model: Model, batch: Batch, key: jax.Array | None
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        """Compute the loss and the metrics of each row.

        Returns:
          Sums over the targets of a row `[B]` by name, and the number of its targets `[B]`:

          - `loss`: see `distillation_loss`, and `top_distillation_loss` for top tokens.
          - `agreement`: the number of targets where both models have the same most likely token.
        """
        if batch.top_tokens is None:
            assert model.teacher is not None
            compare, arrays, shared = self._with_teacher(model.teacher, batch)
        else:
            compare, arrays, shared = self._with_top_tokens(batch)
        backbone, prefix = model.apply(key)
        results = values_from_logits(compare, backbone, prefix, batch, *arrays, shared=shared)
        rows = batch.target_rows
        is_target = rows.to_rows(batch.target_candidates + 1) > 0  # [B, M]
        losses, agreement = (
            jnp.sum(rows.to_rows(each), axis=1, where=is_target) for each in results
        )
        weights = jnp.sum(is_target, axis=1, dtype=jnp.float32)
        return {"loss": losses, "agreement": agreement}, weights

    def _with_teacher(self, teacher: Teacher, batch: Batch) -> _Comparison:
        """Compare whole distributions with a teacher that reads the batch."""
        rows_read = batch if batch.teacher is None else batch.teacher
        hidden = teacher.backbone.target_states(rows_read, teacher.prefix)
        graphdef, head = nnx.split(teacher.backbone.output_head)

        def compare(logits: jax.Array, head: Any, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
            expected = nnx.merge(graphdef, head)(hidden)  # [G, C, V]
            # One of the two models may have more logits than the vocabulary has tokens.
            size = min(logits.shape[-1], expected.shape[-1])
            logits, expected = logits[..., :size], expected[..., :size]
            agree = jnp.argmax(logits, axis=-1) == jnp.argmax(expected, axis=-1)
            losses = distillation_loss(logits, expected, self.temperature)
            return losses, agree.astype(jnp.float32)

        return compare, (hidden,), head

    def _with_top_tokens(self, batch: Batch) -> _Comparison:
        """Compare with the stored most likely tokens of a teacher."""

        def compare(
            logits: jax.Array, _: None, ids: jax.Array, expected: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            agree = jnp.argmax(logits, axis=-1) == ids[..., 0]
            losses = top_distillation_loss(logits, ids, expected, self.temperature)
            return losses, agree.astype(jnp.float32)

        return compare, (batch.top_tokens, batch.top_log_probabilities), None
