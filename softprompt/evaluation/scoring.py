"""Scores of candidates, and the choice among them.

Axis letters: N examples, C candidates, B batch, M target positions.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.backbones.batch import Batch, target_log_probabilities
from softprompt.data.batches import evaluation_batches
from softprompt.data.examples import Example
from softprompt.data.task import Task
from softprompt.experiment.schema import ScoringSettings


@jax.jit
def make_prefix(method, backbone):
    """The prefix that a method gives on the backbone it adapted, once for many batches."""
    return method.make_prefix(backbone)


def prepare_model(method, backbone) -> tuple[Any, Any]:
    """What a method says to run, as `Method.apply` gives it, once for many batches."""
    adapted = method.adapt(backbone)
    return adapted, make_prefix(method, adapted)


@partial(jax.jit, static_argnames="candidates")
def candidate_scores(backbone, prefix, batch: Batch, candidates: int) -> jax.Array:
    """Log-probability of each row's candidates, `[B, C]`, summed over their tokens."""
    log_probabilities = target_log_probabilities(backbone, prefix, batch)  # [B, M]
    member = batch.target_candidates[..., None] == jnp.arange(candidates)[None, None]  # [B, M, C]
    return jnp.sum(log_probabilities[..., None], axis=1, where=member)


def score(
    backbone, prefix, examples: Sequence[Example], batch_size: int
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Score every candidate of every example, batch by batch.

    Args:
      backbone, prefix: the model, and what `make_prefix` gives, or None for no prefix.
      examples: at least one, all with the same number C of candidates.
      batch_size: rows at a time.

    Yields:
      Numbers of the examples done, and their candidates' log-probabilities `[n, C]`.
    """
    candidates = len(examples[0].candidates)
    for numbers, scores in evaluation_batches(
        examples,
        batch_size,
        lambda batch: np.asarray(candidate_scores(backbone, prefix, batch, candidates)),
        separate_targets=backbone.separate_targets,
    ):
        yield numbers, scores[: len(numbers)]


def calibrated_scores(
    scores: np.ndarray,
    examples: Sequence[Example],
    backbone,
    prefix,
    task: Task,
    scoring: ScoringSettings,
) -> np.ndarray:
    """Log-probabilities `[N, C]` as labels are chosen by them.

    Args:
      scores: `[N, C]`, of the examples' candidates, which are the same for all.
      examples: N.
      backbone, prefix: what they were scored with.
      task: of labels.
      scoring: whether to normalize and to calibrate.

    Raises:
      UserError: if the text without content does not fit the template.
    """
    if scoring.calibrate is not None:
        empty = task.content_free(scoring.calibrate)
        ((_, of_empty),) = score(backbone, prefix, [empty], 1)
        scores = scores - of_empty
    if scoring.normalize:
        scores = scores / np.array([len(candidate) for candidate in examples[0].candidates])
    return scores
