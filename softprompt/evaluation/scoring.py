"""Score the candidates of examples by their log-probabilities.

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
from softprompt.parallel.mesh import whole
from softprompt.runtime.finite import model_not_finite


@jax.jit
def make_prefix(method, backbone):
    """Return the prefix of a method on the backbone that it has adapted.

    It is computed once and used for many batches.
    """
    return whole(method.make_prefix(backbone), backbone.mesh)


def prepare_model(method, backbone) -> tuple[Any, Any]:
    """Return the backbone and the prefix to run, as `Method.apply` does without dropout.

    They are computed once and used for many batches.
    """
    adapted = method.adapt(backbone)
    return adapted, make_prefix(method, adapted)


@partial(jax.jit, static_argnames="candidates")
def candidate_scores(backbone, prefix, batch: Batch, candidates: int) -> jax.Array:
    """Return the log-probability of each row's candidates, summed over tokens, `[B, C]`."""
    log_probabilities = target_log_probabilities(backbone, prefix, batch)
    log_probabilities = batch.target_rows.to_rows(log_probabilities)  # [B, M]
    candidate = batch.target_rows.to_rows(batch.target_candidates + 1) - 1
    member = candidate[..., None] == jnp.arange(candidates)[None, None]  # [B, M, C]
    scores = jnp.sum(log_probabilities[..., None], axis=1, where=member)
    return whole(scores, backbone.mesh)


def score(
    backbone, prefix, examples: Sequence[Example], batch_size: int
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Score every candidate of every example, batch by batch.

    Args:
      backbone: the model to run.
      prefix: the result of `make_prefix`, or None.
      examples: at least one, all with the same number C of candidates.
      batch_size: maximum number of examples in a batch.

    Yields:
      The indices of the n examples of a batch, and the log-probabilities of their
      candidates in nats, `[n, C]`.

    Raises:
      NotFiniteError: if a log-probability is infinite or NaN.
    """
    candidates = len(examples[0].candidates)
    for numbers, scores in evaluation_batches(
        examples,
        batch_size,
        lambda batch: np.asarray(candidate_scores(backbone, prefix, batch, candidates)),
        separate_targets=backbone.separate_targets,
        mesh=backbone.mesh,
    ):
        yield numbers, checked_scores(scores[: len(numbers)])


def checked_scores(scores: np.ndarray) -> np.ndarray:
    """Return log-probabilities, after checking that they are finite.

    Raises:
      NotFiniteError: if one is infinite or NaN.
    """
    if not np.isfinite(scores).all():
        raise model_not_finite("scores")
    return scores


def calibrated_scores(
    scores: np.ndarray,
    examples: Sequence[Example],
    backbone,
    prefix,
    task: Task,
    scoring: ScoringSettings,
) -> np.ndarray:
    """Calibrate and normalize log-probabilities as the settings say.

    Args:
      scores: log-probabilities of the examples' candidates, `[N, C]`.
      examples: N examples, all with the same candidates.
      backbone, prefix: the model that scored them.
      task: a task with labels.
      scoring: whether to calibrate (Zhao et al. 2021, arXiv:2102.09690) and to normalize.

    Returns:
      The scores by which labels are chosen, `[N, C]`.

    Raises:
      UserError: if the content-free text does not fit the template.
    """
    if scoring.calibrate is not None:
        content_free = task.content_free(scoring.calibrate)
        ((_, bias),) = score(backbone, prefix, [content_free], 1)
        scores = scores - bias
    if scoring.normalize:
        scores = normalized_scores(scores, examples[0].candidates)
    return scores


def normalized_scores(scores: np.ndarray, candidates: Sequence[Sequence[int]]) -> np.ndarray:
    """Divide log-probabilities `[N, C]` by the number of tokens of each candidate."""
    return scores / np.array([len(candidate) for candidate in candidates])
