"""What a run needs before its first step: base model, examples and method."""

import dataclasses
import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from softprompt.backbones.loading import Base, load_base
from softprompt.data.batches import TrainingBatches
from softprompt.data.examples import Dataset
from softprompt.data.records import Record, Rows
from softprompt.data.sources import source_name
from softprompt.data.splits import SplitReader
from softprompt.data.task import Task, make_task
from softprompt.data.template import draw_demonstrations
from softprompt.data.top_tokens import TopTokens
from softprompt.errors import UserError
from softprompt.evaluation.forgetting import require_causal
from softprompt.experiment.methods import method_class
from softprompt.experiment.schema import Experiment
from softprompt.inference.prompt import load_prompt
from softprompt.methods.method import Method
from softprompt.objectives.teacher import Teacher
from softprompt.parallel.hosts import is_main
from softprompt.parallel.mesh import make_mesh
from softprompt.parallel.sharding import require_rows
from softprompt.runtime.progress import Progress, silent
from softprompt.storage.run_folder import write_config
from softprompt.training.custom import AS_WRITTEN, Custom
from softprompt.training.inputs import InputReader
from softprompt.training.requirements import require_memory
from softprompt.training.reuse import LastResults
from softprompt.training.teachers import PreparedTeacher, prepare_teacher

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared experiment.

    Attributes:
      base: the base model.
      task, examples, teacher, taught, teacher_digest: see `Inputs`.
      method: the method before training.
      custom: replaces the objective, the optimizer, or both.
      seconds: duration of the preparation.
    """

    base: Base
    task: Task
    examples: Mapping[str, Dataset]
    teacher: Teacher | None
    taught: Mapping[str, Dataset | TopTokens]
    teacher_digest: str
    method: Method
    custom: Custom
    seconds: float

    def objective_digest(self, weights: np.ndarray | None) -> str:
        """Return a digest of the other inputs of the objective besides the examples; empty if none.

        Args:
          weights: `[N]`, the weights of the training examples, or None.
        """
        if not self.teacher_digest and weights is None:
            return ""
        digest = hashlib.sha256(self.teacher_digest.encode())
        if weights is not None:
            digest.update(weights.tobytes())
        return digest.hexdigest()


class Preparation:
    """Prepares experiments one after another, and reuses what they have in common.

    It keeps the last base model, the last teacher, and the last examples of each split.

    Args:
      progress: shows how many records have been read and tokenized.
      trial_devices: see `mesh_of`.
    """

    def __init__(self, progress: Progress = silent, trial_devices: int = 1) -> None:
        self._progress, self._trial_devices = progress, trial_devices
        self._splits = SplitReader(progress)
        self._bases, self._results = LastResults(), LastResults()
        self._reader = InputReader(progress, self._results)

    def prepare(
        self,
        experiment: Experiment,
        records: Mapping[str, Rows] | None = None,
        folder: Path | None = None,
        custom: Custom = AS_WRITTEN,
    ) -> Prepared:
        """Read the data of an experiment, load its base model, and build its method.

        Args:
          experiment: the experiment.
          records: by split, rows that replace the source that the experiment names.
          folder: the run folder, which keeps the teacher's targets or predictions.
          custom: replaces the objective, the optimizer, or both.

        Raises:
          UserError: if the experiment, its data or its base model is invalid.
        """
        began = time.monotonic()
        task, splits = self.task(experiment, records)
        base, kind = task.base, method_class(experiment.method)
        _require_supported(experiment, task)
        teacher = self._teacher_of(experiment, base, splits["train"], task)
        if teacher is not None:
            if folder is not None and is_main() and _stores(experiment):
                write_config(folder, experiment)  # marks the folder as a run, even if it stops here
            splits = self._reader.with_targets(experiment, task, splits, teacher, folder)
        inputs = self._reader.read(experiment, task, splits, teacher, folder)
        task = inputs.task
        if not task.labels and not task.template.text and experiment.evaluation.samples:
            _, before = kind.virtual_tokens(experiment)
            task.for_generation(experiment.generation.max_new_tokens, before + len(task.opening))
        given = [_vectors_of(path, base) for path in kind.initial_prompts(experiment)]
        if teacher is not None and teacher.first and not given:
            given = [base.backbone.embedding(jnp.asarray(teacher.first))]
        require_memory(experiment, base, task.opening, given, custom.optimizer)
        method = kind.build(experiment, base, task.opening, given)
        seconds = time.monotonic() - began
        return Prepared(base, **inputs._asdict(), method=method, custom=custom, seconds=seconds)

    def task(
        self, experiment: Experiment, records: Mapping[str, Rows] | None = None
    ) -> tuple[Task, Mapping[str, Sequence[Record]]]:
        """Read the data of an experiment, load its base model, and compile its template.

        Args:
          experiment, records: see `prepare`.

        Returns:
          The task, and the records of each split.

        Raises:
          UserError: see `prepare`.
        """
        mesh = mesh_of(experiment, self._trial_devices)
        splits = self._splits.read(experiment, records or {})
        base = self._base(experiment, mesh)
        texts = experiment.template, experiment.verbalizer
        solved = draw_demonstrations(*texts, splits["train"], experiment.shots, experiment.seed)
        kind = method_class(experiment.method)
        virtual, before = kind.virtual_tokens(experiment)
        task = make_task(
            base,
            *texts,
            solved,
            virtual_tokens=virtual,
            prefix_length=before,
            tasks=kind.tasks(experiment),
            task_field=experiment.prompt.task_field,
        )
        return task, splits

    def _base(self, experiment: Experiment, mesh: Mesh | None) -> Base:
        def load() -> Base:
            self._results.clear()  # free the memory before loading another one
            began = time.monotonic()
            settings = experiment.compute.model_dump(exclude={"mesh"})
            base = load_base(experiment.base, **settings, mesh=mesh)
            kind = base.compute.quantize
            _log.info(
                f"base {base.name}: loaded in {time.monotonic() - began:.1f} s, "
                f"{base.compute.dtype}{f', {kind} matrices' if kind else ''}, "
                f"{base.compute.attention} attention"
            )
            return base

        key = experiment.model_dump_json(include={"base", "compute"})
        return self._bases.get("base", key, (), load)[0]

    def _teacher_of(
        self, experiment: Experiment, base: Base, records: Sequence[Record], task: Task
    ) -> PreparedTeacher | None:
        """Return the teacher of an experiment, if it has one. Reuse the last one if possible."""
        settings = experiment.objective.teacher
        if settings is None:
            return None

        def load() -> PreparedTeacher:
            self._results.clear()  # the teacher's rows hold its base model
            return prepare_teacher(experiment, base, records, task)

        about = settings.model_dump_json(exclude={"writes_targets", "top_tokens"})
        texts = experiment.model_dump_json(include={"template", "verbalizer"})
        seed = experiment.seed if settings.shots else None
        key = about, texts, seed, str(task.pieces)
        return self._results.get("teacher", key, (records,) if settings.shots else (), load)[0]


def _stores(experiment: Experiment) -> bool:
    """Whether the run folder keeps targets or predictions of a teacher before training."""
    settings = experiment.objective.teacher
    return settings is not None and (settings.writes_targets or settings.top_tokens is not None)


def _require_supported(experiment: Experiment, task: Task) -> None:
    """Check settings that depend on the base model and the compiled template."""
    if experiment.evaluation.forgetting:
        require_causal(task.base)
    if experiment.objective.name == "preference" and None in task.pieces:
        raise UserError(
            "objective: preference compares with the base model without virtual tokens, so "
            "all of them must come before the first field of template.input"
        )


def training_batches(
    experiment: Experiment, prepared: Prepared, weights: np.ndarray | None
) -> TrainingBatches:
    """Return the training batches of a run.

    Args:
      experiment: the experiment.
      prepared: the prepared experiment.
      weights: `[N]`, the weights of the training examples, or None.

    Raises:
      UserError: if the examples do not fill a batch.
    """
    settings, examples = experiment.training, prepared.examples["train"]
    rows = settings.batch_size * settings.accumulate
    if len(examples) < rows:
        raise UserError(
            f"{source_name(experiment.data.train)}: {len(examples)} examples do not fill a batch "
            f"of {rows}; set a smaller training.batch_size"
            f"{' or training.accumulate' if settings.accumulate > 1 else ''}"
        )
    backbone = prepared.base.backbone
    return TrainingBatches(
        examples,
        rows,
        experiment.seed,
        weights=weights,
        all_candidates=experiment.objective.name == "preference",
        separate_targets=backbone.separate_targets,
        passes=settings.accumulate,
        mesh=backbone.mesh,
        teacher=prepared.taught.get("train"),
    )


def mesh_of(experiment: Experiment, trial_devices: int = 1) -> Mesh | None:
    """Return the mesh of an experiment; None for one device.

    Args:
      experiment: the experiment.
      trial_devices: the number of devices that divide the trials of a sweep; -1 for all. If the
        experiment has a mesh, the number of groups of devices, each with that mesh.

    Raises:
      UserError: if there are too few devices, or they do not divide the rows of a batch.
    """
    sizes = experiment.compute.mesh
    if sizes is None and (count := jax.process_count()) > 1:
        raise UserError(
            f"{count} processes need a mesh of all their devices; set "
            "compute.mesh.data=-1, or see compute.mesh in docs/configuration.md"
        )
    if sizes is None and trial_devices == 1:
        return None
    try:
        mesh = make_mesh({"trials": trial_devices, **dict(sizes or {})})
    except UserError as error:
        if trial_devices == 1:
            raise
        raise UserError(f"sweep.devices: {error}") from None
    require_rows(experiment.training.batch_size, mesh)
    return mesh


def _vectors_of(path: str, base: Base) -> jax.Array:
    """Return the vectors `[P, D]` of a trained soft prompt."""
    vectors = load_prompt(path, base).method.plain_vectors()
    if vectors is None:
        raise UserError(f"init_prompts: {path} is not a soft prompt")
    return vectors
