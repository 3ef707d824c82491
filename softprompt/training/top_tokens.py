"""Store the most likely tokens of a teacher, which reads all examples once before training.

A folder `top-tokens-<split>` in the run folder contains them, with a digest of the teacher and its
inputs.
"""

import hashlib
import json
import logging
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.backbones.batch import Batch, values_from_logits
from softprompt.data.batches import evaluation_batches
from softprompt.data.examples import Dataset
from softprompt.data.task import Task
from softprompt.data.top_tokens import TopTokens
from softprompt.errors import UserError
from softprompt.experiment.schema import Experiment
from softprompt.files.writing import write_errors
from softprompt.objectives.divergence import with_others
from softprompt.objectives.teacher import Teacher
from softprompt.parallel.hosts import result_of_main
from softprompt.parallel.mesh import whole
from softprompt.runtime.progress import Bar, Progress
from softprompt.storage.arrays import DamagedError, load_arrays, load_description, save_arrays
from softprompt.training.teachers import PreparedTeacher
from softprompt.training.written_targets import require_unused

_log = logging.getLogger(__name__)

_FILE = "top-tokens.json"


def make_top_tokens(
    teacher: PreparedTeacher,
    experiment: Experiment,
    student: Task,
    examples: Dataset,
    taught: Dataset | None,
    split: str,
    folder: Path | None,
    progress: Progress,
) -> TopTokens:
    """Return the most likely tokens of a teacher at all targets. Stored tokens are reused.

    Args:
      teacher: the teacher.
      experiment: `objective.teacher.top_tokens` is the number of tokens, and the logits are divided
        by `objective.temperature`.
      student: the task of the student. Tokens that the student does not predict are left out.
      examples: the examples of the student.
      taught: the same examples as the teacher reads them; None if it reads the same rows.
      split: the name of the split.
      folder: the run folder; None to store nothing. Tokens from another teacher or other data
        are replaced.
      progress: shows how many examples the teacher has read.

    Raises:
      UserError: if the teacher predicts fewer tokens than the student, or than `top_tokens`.
      FolderError: if a run in the folder began with another teacher or other data.
    """
    objective = experiment.objective
    assert objective.teacher is not None
    assert objective.teacher.top_tokens is not None
    count = objective.teacher.top_tokens
    sizes = (task.base.backbone.arch.vocab_size for task in (student, teacher.task))
    _require_tokens(count, *sizes)
    digests = [teacher.digest, examples.digest, "" if taught is None else taught.digest]
    text = json.dumps([digests, count, objective.temperature, split])
    description = {"digest": hashlib.sha256(text.encode()).hexdigest()}
    targets = examples.lengths.targets
    path = None if folder is None else folder / f"top-tokens-{split}"
    if path is not None and result_of_main(lambda: _is_stored(path, description)):
        return TopTokens(targets, **_load(path, int(targets.sum()), count))
    tokens = TopTokens.empty(targets, count)
    with progress(f"teacher reads {split}", len(examples), "examples") as bar:
        _read(tokens, teacher, experiment, student, examples, taught, bar)
    if path is not None:
        arrays = {"ids": tokens.ids, "log_probabilities": tokens.log_probabilities}
        with write_errors(path):
            save_arrays(path, arrays, description, _FILE)
    return tokens


def _require_tokens(count: int, student: int, teacher: int) -> None:
    """Check the number of tokens that two models predict.

    Raises:
      UserError: if there are too few.
    """
    name = "objective.teacher.top_tokens"
    if student < count:
        raise UserError(f"{name}: {count} is more than the {student} tokens of the vocabulary")
    if teacher < student:
        raise UserError(
            f"{name}: the teacher predicts {teacher} tokens and the student {student}; remove "
            f"{name}, so that the teacher reads each batch"
        )


def _read(
    tokens: TopTokens,
    teacher: PreparedTeacher,
    experiment: Experiment,
    student: Task,
    examples: Dataset,
    taught: Dataset | None,
    bar: Bar,
) -> None:
    """Let the teacher read all examples, and fill in its most likely tokens."""
    backbone, count = teacher.model.backbone, tokens.ids.shape[1]
    vocabulary = student.base.backbone.arch.vocab_size

    def read_batch(batch: Batch) -> list[np.ndarray]:
        temperature = experiment.objective.temperature
        results = _of_batch(teacher.model, batch, count, vocabulary, temperature)
        return [np.asarray(each)[batch.target_candidates >= 0] for each in results]

    batches = evaluation_batches(
        examples,
        experiment.evaluation.batch_size,
        read_batch,
        separate_targets=backbone.separate_targets,
        mesh=backbone.mesh,
        teacher=taught,
    )
    for numbers, results in batches:
        places = tokens.places(numbers)
        tokens.ids[places], tokens.log_probabilities[places] = results
        bar.advance(len(numbers))


def _load(path: Path, total: int, count: int) -> dict[str, np.ndarray]:
    shapes = {
        "ids": jax.ShapeDtypeStruct((total, count), jnp.int32),
        "log_probabilities": jax.ShapeDtypeStruct((total, count + 1), jnp.float32),
    }
    return jax.tree.map(np.asarray, load_arrays(path, shapes))


def _is_stored(path: Path, description: dict[str, str]) -> bool:
    """Return whether a folder matches a description. If not, check that it may be replaced."""
    if not path.exists():
        return False
    try:
        if load_description(path, _FILE) == description:
            return True
    except DamagedError as error:
        _log.warning(f"{error}; the teacher reads the examples again")
        return False
    require_unused(path.parent)
    return False


@partial(jax.jit, static_argnames=("count", "vocabulary", "temperature"))
def _of_batch(
    teacher: Teacher, batch: Batch, count: int, vocabulary: int, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Return the most likely tokens `[G, M, k]` and log-probabilities `[G, M, k + 1]`."""

    def most_likely(logits: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        logits = logits[..., :vocabulary] / temperature
        ids = jax.lax.top_k(logits, count)[1]
        return jnp.zeros(ids.shape[:-1]), (ids, with_others(logits, ids))

    rows = batch if batch.teacher is None else batch.teacher
    results = values_from_logits(most_likely, teacher.backbone, teacher.prefix, rows)[1]
    return whole(results, teacher.backbone.mesh)
