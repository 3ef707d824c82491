"""Scores of candidates, and what follows from them.

Axis letters: N examples, C candidates, B batch, M target positions.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.backbones.batch import Batch, target_log_probabilities
from softprompt.console import Bar
from softprompt.data.batches import evaluation_batches
from softprompt.data.examples import Example


@jax.jit
def make_prefix(method, backbone):
    """The prefix that a method gives on the backbone it adapted, once for many batches."""
    return method.make_prefix(backbone)


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
    batches = evaluation_batches(examples, batch_size, encoder_decoder=backbone.is_encoder_decoder)
    for batch, numbers in batches:
        scores = candidate_scores(backbone, prefix, batch, candidates)
        yield numbers, np.asarray(scores)[: len(numbers)]


def evaluate(
    backbone, prefix, examples: Sequence[Example], batch_size: int, label: str
) -> dict[str, float]:
    """Score examples under a progress bar and sum up.

    Args:
      backbone, prefix, examples, batch_size: as for `score`; examples with their answers.
      label: what stands in front of the bar.

    Returns:
      See `target_metrics`.
    """
    scores = np.empty((len(examples), len(examples[0].candidates)), np.float32)
    with Bar(label, len(examples), "examples") as bar:
        for numbers, part in score(backbone, prefix, examples, batch_size):
            scores[numbers] = part
            bar.advance(len(numbers))
    return target_metrics(examples, scores)


def target_metrics(examples: Sequence[Example], scores: np.ndarray) -> dict[str, float]:
    """Metrics of scored examples.

    Args:
      examples: N, with their answers.
      scores: `[N, C]` log-probabilities.

    Returns:
      `loss`, the mean negative log-likelihood per token of the right candidates in nats,
      and where there are several candidates `accuracy`, the share of examples whose
      right candidate has the highest score.
    """
    answers = np.array([e.answer for e in examples])
    tokens = sum(len(e.candidates[e.answer or 0]) for e in examples)
    right = scores[np.arange(len(examples)), answers]
    metrics = {"loss": float(-right.sum(dtype=np.float64) / tokens)}
    if scores.shape[1] > 1:
        metrics["accuracy"] = float((scores.argmax(axis=1) == answers).mean())
    return metrics
