"""What a run needs before its first step: base model, examples and method."""

import dataclasses
import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from softprompt.backbones.loading import Base, load_base
from softprompt.data.datasets import make_examples
from softprompt.data.examples import Dataset, data_digest
from softprompt.data.preferences import preference_examples
from softprompt.data.records import Record, Rows
from softprompt.data.splits import SplitReader
from softprompt.data.task import Task, make_task
from softprompt.data.template import draw_demonstrations
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
from softprompt.training.requirements import require_memory
from softprompt.training.teachers import PreparedTeacher, prepare_teacher
from softprompt.training.written_targets import SPLITS, WrittenTargets, write_targets

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared experiment.

    Attributes:
      base: the base model.
      task: turns records into examples.
      examples: the examples of each split.
      method: the method before training.
      teacher: the teacher of distillation; None if there is none.
      teacher_examples: the examples of each split as the teacher reads them; empty if it reads the
        rows of the student.
      custom: replaces the objective, the optimizer, or both.
      seconds: duration of the preparation.
    """

    base: Base
    task: Task
    examples: Mapping[str, Dataset]
    method: Method
    teacher: PreparedTeacher | None
    teacher_examples: Mapping[str, Dataset]
    custom: Custom
    seconds: float

    @property
    def teacher_model(self) -> Teacher | None:
        """The frozen model of the teacher, with what it reads first; None without one."""
        return None if self.teacher is None else self.teacher.model

    def objective_digest(self, weights: np.ndarray | None) -> str:
        """Return a digest of the other inputs of the objective besides the examples; empty if none.

        Args:
          weights: `[N]`, the weights of the training examples, or None.
        """
        if self.teacher is None and weights is None:
            return ""
        digest = hashlib.sha256()
        if self.teacher is not None:
            digest.update(f"{self.teacher.digest} {data_digest(self.teacher_examples)}".encode())
        if weights is not None:
            digest.update(weights.tobytes())
        return digest.hexdigest()


class Preparation:
    """Prepares experiments one after another, and reuses what they have in common.

    It keeps the last base model, the last examples of each split, and the last teacher.

    Args:
      progress: shows how many records have been read and tokenized.
      trial_devices: see `mesh_of`.
    """

    def __init__(self, progress: Progress = silent, trial_devices: int = 1) -> None:
        self._progress, self._trial_devices = progress, trial_devices
        self._bases: dict[str, Base] = {}
        self._splits = SplitReader(progress)
        self._examples: dict[str, tuple[Any, Sequence[Record], Dataset]] = {}
        self._teacher: tuple[Any, Sequence[Record], PreparedTeacher] | None = None
        self._written: dict[str, tuple[Any, Sequence[Record], WrittenTargets]] = {}

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
          folder: the run folder, which keeps the targets that a teacher writes.
          custom: replaces the objective, the optimizer, or both.

        Raises:
          UserError: if the experiment, its data or its base model is invalid.
        """
        began = time.monotonic()
        task, splits = self.task(experiment, records)
        base, kind = task.base, method_class(experiment.method)
        if experiment.evaluation.forgetting:
            require_causal(base)
        _, before = kind.virtual_tokens(experiment)
        pairs = experiment.objective.name == "preference"
        if pairs and None in task.pieces:
            raise UserError(
                "objective: preference compares with the base model without virtual tokens, so "
                "all of them must come before the first field of template.input"
            )
        teacher = self._teacher_of(experiment, base, splits["train"], task)
        if teacher is not None:
            task = teacher.limited(task)
            splits = {
                split: self._with_targets(teacher, experiment, task, part, split, folder)
                for split, part in splits.items()
            }
        encode = preference_examples if pairs else make_examples
        examples = {
            split: self._examples_of(task, part, split, encode) for split, part in splits.items()
        }
        teacher_examples = {}
        if teacher is not None and not teacher.reads_same_rows:
            teacher_examples = {
                split: self._examples_of(teacher.task, part, f"teacher's {split}", encode)
                for split, part in splits.items()
            }
        if not task.labels and not task.template.text and experiment.evaluation.samples:
            task.for_generation(experiment.generation.max_new_tokens, before + len(task.opening))
        given = [_vectors_of(path, base) for path in kind.initial_prompts(experiment)]
        if teacher is not None and teacher.first and not given:
            given = [base.backbone.embedding(jnp.asarray(teacher.first))]
        require_memory(experiment, base, task.opening, given, custom.optimizer)
        method = kind.build(experiment, base, task.opening, given)
        seconds = time.monotonic() - began
        return Prepared(base, task, examples, method, teacher, teacher_examples, custom, seconds)

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
        wanted = experiment.model_dump_json(include={"base", "compute"})
        if wanted not in self._bases:
            self._bases.clear()  # free the memory before loading another one
            self._free_teacher()
            began = time.monotonic()
            settings = experiment.compute.model_dump(exclude={"mesh"})
            base = load_base(experiment.base, **settings, mesh=mesh)
            kind = base.compute.quantize
            _log.info(
                f"base {base.name}: loaded in {time.monotonic() - began:.1f} s, "
                f"{base.compute.dtype}{f', {kind} matrices' if kind else ''}, "
                f"{base.compute.attention} attention"
            )
            self._bases[wanted] = base
        return self._bases[wanted]

    def _teacher_of(
        self, experiment: Experiment, base: Base, records: Sequence[Record], task: Task
    ) -> PreparedTeacher | None:
        """Return the teacher of an experiment, if it has one. Reuse the last one if possible."""
        settings = experiment.objective.teacher
        if settings is None:
            return None
        names: Any = {"objective": {"teacher"}, "template": True, "verbalizer": True}
        seed = experiment.seed if settings.shots else None
        key = experiment.model_dump_json(include=names), seed, str(task.pieces)
        if self._teacher is not None:
            last_key, source, teacher = self._teacher
            if last_key == key and (source is records or not settings.shots):
                return teacher
        self._free_teacher()
        teacher = prepare_teacher(experiment, base, records, task)
        self._teacher = key, records, teacher
        return teacher

    def _free_teacher(self) -> None:
        """Free the memory of the last teacher, of its targets and of its examples."""
        self._teacher = None
        self._written.clear()
        self._examples.clear()  # the teacher's rows hold its base model

    def _with_targets(
        self,
        teacher: PreparedTeacher,
        experiment: Experiment,
        student: Task,
        records: Sequence[Record],
        split: str,
        folder: Path | None,
    ) -> Sequence[Record]:
        """Return records with the targets that the teacher writes, if it writes any."""
        settings = experiment.objective.teacher
        if settings is None or not settings.writes_targets or split not in SPLITS:
            return records
        if folder is not None and is_main():
            write_config(folder, experiment)  # a run that stops here is then known as one
        key = experiment.generation
        if split in self._written:
            last_key, source, written = self._written[split]
            if last_key == key and source is records:
                if folder is not None:
                    written.save(folder)
                return written.records
        written = write_targets(
            teacher, student, experiment, records, split, folder, self._progress
        )
        self._written[split] = key, records, written
        return written.records

    def _examples_of(
        self, task: Task, records: Sequence[Record], split: str, encode: Callable[..., Dataset]
    ) -> Dataset:
        """Encode the examples of a split, or reuse the examples of the last experiment."""
        # The opening is not part of an example. It only limits the length of the input.
        most = task.max_tokens if task.template.text else 0  # it divides plain text
        key = dataclasses.replace(task, opening=(), max_tokens=most, virtual_tokens=0), encode
        prompt_in_rows = any(piece is None for piece in task.pieces)
        if split in self._examples and not prompt_in_rows:
            last_key, source, examples = self._examples[split]
            if last_key == key and source is records and _fit(examples, task):
                return examples
        examples = encode(task, records, split, self._progress)
        self._examples[split] = key, records, examples
        return examples


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


def _fit(examples: Dataset, task: Task) -> bool:
    """Whether encoding the examples with the limit of a task would not change them."""
    lengths = examples.lengths
    return not examples.truncated and bool(
        (lengths.input + lengths.longest <= task.max_tokens).all()
    )


def _vectors_of(path: str, base: Base) -> jax.Array:
    """Return the vectors `[P, D]` of a trained soft prompt."""
    vectors = load_prompt(path, base).method.plain_vectors()
    if vectors is None:
        raise UserError(f"init_prompts: {path} is not a soft prompt")
    return vectors
