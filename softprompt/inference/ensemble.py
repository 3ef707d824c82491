"""Ensembles: several trained prompts of one task, evaluated together.

Axis letters: E prompts, N examples, C candidates, L layers, P virtual tokens, K key-value
heads, h head size.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.backbones.batch import Batch
from softprompt.backbones.prefix import Prefix
from softprompt.data.batches import evaluation_batches
from softprompt.data.examples import Example
from softprompt.data.task import Task
from softprompt.errors import UserError
from softprompt.evaluation.evaluate import likelihood
from softprompt.evaluation.scoring import candidate_scores, checked_scores
from softprompt.experiment.schema import ScoringSettings
from softprompt.inference.prompt import TrainedPrompt
from softprompt.runtime.progress import Progress, silent


def evaluate_ensemble(
    prompts: Sequence[TrainedPrompt],
    examples: Sequence[Example],
    batch_size: int,
    label: str,
    progress: Progress = silent,
) -> dict[str, dict[str, float]]:
    """Measure the accuracy of several prompts, each alone and all together.

    The base model processes a batch once for all prompts, whose prefixes are stacked
    (Lester et al. 2021, section 6).

    Args:
      prompts: at least two, loaded on one `Base`.
      examples: labeled, encoded by the `shared_task` of the prompts.
      batch_size: rows at a time.
      label: the label of the progress bar.
      progress: shows how many examples are done.

    Returns:
      For each prompt (`"1"`, `"2"`, …) its loss and accuracy. For `"vote"` the accuracy of the
      label that most prompts choose; a tie goes to the label with the higher mean
      probability. For `"mean"` the accuracy of the label with the highest mean probability.

    Raises:
      UserError: see `shared_task`.
    """
    shared_task(prompts)
    prefix, backbone = stack(prompts), prompts[0].base.backbone
    scores = np.empty((len(prompts), len(examples), len(examples[0].candidates)), np.float32)
    batches = evaluation_batches(
        examples,
        batch_size,
        lambda batch: np.asarray(_scores(backbone, prefix, batch, scores.shape[-1])),
        mesh=backbone.mesh,
    )
    with progress(label, len(examples), "examples") as bar:
        for indices, of_batch in batches:
            scores[:, indices] = checked_scores(of_batch[:, : len(indices)])
            bar.advance(len(indices))
    answers = np.array([example.answer for example in examples])
    chosen = {str(i): one.argmax(axis=1) for i, one in enumerate(scores, 1)}
    chosen |= zip(("vote", "mean"), _choices(scores), strict=True)
    results = {name: {"accuracy": float((c == answers).mean())} for name, c in chosen.items()}
    for i, one in enumerate(scores, 1):
        results[str(i)] |= likelihood("loss", examples, one).values()
    return results


def shared_task(prompts: Sequence[TrainedPrompt]) -> Task:
    """Return the task that the prompts have in common, with the smallest of their limits.

    Raises:
      UserError: if the prompts have no labels or different tasks, or if one of them is not a
        pure prefix of a causal model.
    """
    first = prompts[0].task

    def rows(task: Task) -> tuple[Any, ...]:
        return task.pieces, task.template.target, task.verbalizer

    for number, prompt in enumerate(prompts, 1):
        task = prompt.task
        if not task.labels:
            raise UserError(f"prompt {number}: it has no labels")
        if not prompt.is_prefix:
            method = prompt.description["method"]
            raise UserError(
                f"prompt {number}: method {method} is not supported; ensembles need pure prefixes"
            )
        if not prompt.base.backbone.caches_prompt:
            raise UserError(f"prompt {number}: ensembles support only causal base models")
        if prompt.scoring != ScoringSettings():
            raise UserError(f"prompt {number}: ensembles do not support `scoring` settings")
        if rows(task) != rows(first):
            raise UserError(f"prompt {number}: its task differs from the first prompt's")
    return dataclasses.replace(first, max_tokens=min(prompt.task.max_tokens for prompt in prompts))


def stack(prompts: Sequence[TrainedPrompt]) -> Prefix:
    """Stack the prefixes of prompts to keys and values `[E, L, P, K, h]`; short ones are padded."""
    prefixes = [prompt.prefix for prompt in prompts if isinstance(prompt.prefix, Prefix)]
    longest = max(prefix.length for prefix in prefixes)

    def padded(array: jax.Array) -> jax.Array:
        return jnp.pad(array, [(0, 0), (0, longest - array.shape[1]), (0, 0), (0, 0)])

    return Prefix(
        jnp.stack([padded(prefix.keys) for prefix in prefixes]),
        jnp.stack([padded(prefix.values) for prefix in prefixes]),
        jnp.array([[(0, prefix.length)] for prefix in prefixes]),
    )


@partial(jax.jit, static_argnames="candidates")
def _scores(backbone, prefix: Prefix, batch: Batch, candidates: int) -> jax.Array:
    """Compute the log-probabilities `[E, B, C]` of a batch's candidates with each prompt."""
    return jax.vmap(lambda one: candidate_scores(backbone, one, batch, candidates))(prefix)


def _choices(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Choose candidates by vote and by mean probability.

    Args:
      scores: log-probabilities, `[E, N, C]`.

    Returns:
      The indices chosen by vote, and those chosen by mean probability, `[N]` each.
    """
    probabilities = np.exp(scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True))
    mean = probabilities.mean(axis=0)  # [N, C]
    votes = (scores.argmax(axis=-1)[..., None] == np.arange(scores.shape[-1])).sum(axis=0)
    return (votes + mean / 2).argmax(axis=-1), mean.argmax(axis=-1)
