"""Learning from preferences: the model should prefer one answer to another.

The reference is the frozen base model without the trained part. It reads the same rows, without
virtual tokens.

Axis letters: G packs, R rows of a pack, B = G·R rows, M targets of a pack, C targets of a chunk,
V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from softprompt.backbones.batch import Batch, values_from_logits
from softprompt.backbones.head import log_probability
from softprompt.backbones.loading import Backbone
from softprompt.experiment.objective_settings import PreferenceLoss
from softprompt.objectives.divergence import kl_divergence
from softprompt.objectives.model import Model, RowObjective


def dpo_loss(chosen: jax.Array, rejected: jax.Array, beta: float) -> jax.Array:
    """Return -log σ(β·(chosen - rejected)), as in DPO (Rafailov et al. 2023, arXiv:2305.18290).

    Args:
      chosen, rejected: `[B]`, log π(y|x) - log π_ref(y|x) of the two answers, in nats. The
        sums over their tokens give equation 7 of the paper. The means over their tokens give the
        length-normalized form (LN-DPO, equation 6 of Tülu 3, arXiv:2411.15124).
      beta: β.

    Returns:
      `[B]`.
    """
    return -jax.nn.log_sigmoid(beta * (chosen - rejected))


def ipo_loss(chosen: jax.Array, rejected: jax.Array, beta: float) -> jax.Array:
    """Return (chosen - rejected - 1 / 2β)², as in IPO (Azar et al. 2023, arXiv:2310.12036).

    Args:
      chosen, rejected: `[B]`, log π(y|x) - log π_ref(y|x) of the two answers, in nats. As in TRL,
        they are means over the tokens of an answer. TRL's authors write that the authors of IPO
        confirmed this.
      beta: the paper's τ; see its equation 17.

    Returns:
      `[B]`.
    """
    return (chosen - rejected - 1 / (2 * beta)) ** 2


_LOSSES: dict[PreferenceLoss, tuple[Callable[..., jax.Array], bool]] = {
    # Each with whether log-probabilities are divided by the number of tokens.
    "dpo": (dpo_loss, False),
    "ipo": (ipo_loss, True),
    "normalized": (dpo_loss, True),
}


@dataclasses.dataclass(frozen=True)
class Preference(RowObjective):
    """Preference learning as an objective.

    Every row of a batch has two candidates, the chosen answer and the rejected one.

    Attributes:
      loss: the loss of a pair.
      beta: see the losses.
      opening: the ids of the text that every row begins with, which the reference reads.
    """

    loss: PreferenceLoss
    beta: float
    opening: tuple[int, ...] = ()

    def of_rows(
        self, model: Model, batch: Batch, key: jax.Array | None
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        """Compute the loss and the metrics of each pair.

        Returns:
          Values `[B]` by name, and the weight of each row `[B]`, 1 for a pair and 0 for padding:

          - `loss`.
          - `reward_margin`: β times the difference that the loss looks at.
          - `preference_accuracy`: 1 if the margin is positive.
          - `kl`: KL(π ‖ π_ref) of the next token, exact over the vocabulary, as a mean over the
            target tokens of both answers. The tokens come from the data and not from π.
        """
        ratios, divergences = log_ratios(model, batch, key, self.opening)  # [G, M]
        rows, candidates = batch.target_rows, batch.target_rows.to_rows(batch.target_candidates + 1)
        member = candidates[..., None] == jnp.array([1, 2])  # [B, M, 2]
        lengths = jnp.maximum(jnp.sum(member, axis=1), 1)  # [B, 2]
        scores = jnp.sum(rows.to_rows(ratios)[..., None], axis=1, where=member)  # [B, 2]
        divergence = jnp.sum(rows.to_rows(divergences), axis=1, where=candidates > 0)

        function, by_length = _LOSSES[self.loss]
        if by_length:
            scores = scores / lengths
        margins = self.beta * (scores[:, 0] - scores[:, 1])
        values = {
            "loss": function(scores[:, 0], scores[:, 1], self.beta),
            "reward_margin": margins,
            "preference_accuracy": (margins > 0).astype(jnp.float32),
            "kl": divergence / lengths.sum(axis=1),
        }
        return values, (candidates[:, 0] > 0).astype(jnp.float32)


def log_ratios(
    model: Model, batch: Batch, key: jax.Array | None, opening: Sequence[int]
) -> tuple[jax.Array, jax.Array]:
    """Compare a model with the reference at the targets of a batch.

    Args:
      model, batch, key: see `Preference.of_rows`.
      opening: the ids of the text that every row begins with.

    Returns:
      `log π(y_t) - log π_ref(y_t)` of each target, and KL(π ‖ π_ref), which has no gradient. Both
      are `[G, M]`, with arbitrary values at padding.
    """
    reference = model.backbone
    hidden = reference.target_states(batch, text_prefix(reference, opening))
    graphdef, head = nnx.split(reference.output_head)

    def compare(
        logits: jax.Array, head: Any, targets: jax.Array, hidden: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        expected = nnx.merge(graphdef, head)(hidden)  # [G, C, V]
        ratios = log_probability(logits, targets) - log_probability(expected, targets)
        return ratios, kl_divergence(logits, expected)

    backbone, prefix = model.apply(key)
    return values_from_logits(
        compare, backbone, prefix, batch, batch.targets, hidden, shared=jax.lax.stop_gradient(head)
    )


def text_prefix(backbone: Backbone, opening: Sequence[int]) -> Any:
    """Return what rows begin with that read a text first, or None if it is empty.

    Args:
      backbone: the backbone that reads the rows.
      opening: the ids of the text.
    """
    if not opening:
        return None
    return backbone.opening(backbone.embedding(jnp.asarray(np.array(opening, np.int32))))
