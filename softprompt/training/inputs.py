"""The inputs of the student and the teacher of an experiment, as token ids."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from softprompt.data.datasets import make_examples
from softprompt.data.examples import AnswerOnly, Dataset, Examples, data_digest
from softprompt.data.preferences import preference_examples
from softprompt.data.records import Record
from softprompt.data.task import Task
from softprompt.data.top_tokens import TopTokens
from softprompt.experiment.schema import Experiment
from softprompt.objectives.teacher import Teacher
from softprompt.runtime.progress import Progress, silent
from softprompt.training.reuse import LastResults
from softprompt.training.teachers import PreparedTeacher
from softprompt.training.top_tokens import make_top_tokens
from softprompt.training.written_targets import SPLITS, write_targets


class Inputs(NamedTuple):
    """The inputs of the student and the teacher.

    Attributes:
      task: turns records into examples.
      examples: the examples of each split.
      teacher: the teacher that reads each batch; None without a teacher, or if it has already
        read all examples.
      taught: for each split, the examples as the teacher reads them, or its most likely tokens at
        the targets; empty if it reads the rows of the student.
      teacher_digest: a digest of the teacher and of what it reads; empty if there is none.
    """

    task: Task
    examples: Mapping[str, Dataset]
    teacher: Teacher | None = None
    taught: Mapping[str, Dataset | TopTokens] = {}
    teacher_digest: str = ""


class InputReader:
    """Encodes records, and reuses the last results.

    Args:
      progress: shows how many records are done.
      results: the last results; by default none.
    """

    def __init__(self, progress: Progress = silent, results: LastResults | None = None) -> None:
        self._progress, self._results = progress, results or LastResults()

    def read(
        self,
        experiment: Experiment,
        task: Task,
        splits: Mapping[str, Sequence[Record]],
        teacher: PreparedTeacher | None = None,
        folder: Path | None = None,
        *,
        trains: bool = True,
    ) -> Inputs:
        """Encode records as the student and the teacher of an experiment read them.

        Args:
          experiment: the experiment.
          task: the task of the student.
          splits: the records of each split, with their targets.
          teacher: the teacher, or None.
          folder: the run folder, which keeps the teacher's predictions; None to store nothing.
          trains: whether the inputs are for training. Training needs only the right candidates of
            the training data, and only `evaluation.examples` of the validation data.

        Raises:
          UserError: if a record does not fit the template.
        """
        pairs = experiment.objective.name == "preference"
        encode = preference_examples if pairs else make_examples

        def encoded(task: Task, label: str) -> dict[str, Dataset]:
            return {
                split: self._examples_of(task, part, f"{label}{split}", encode)
                for split, part in splits.items()
            }

        if teacher is None:
            return Inputs(task, encoded(task, ""))
        task = teacher.limited(task)
        examples = encoded(task, "")
        rows = {} if teacher.reads_same_rows else encoded(teacher.task, "teacher's ")
        digest = f"{teacher.digest} {data_digest(rows)}"
        settings = experiment.objective.teacher
        if settings is None or settings.top_tokens is None:
            return Inputs(task, examples, teacher.model, rows, digest)
        taught = {
            split: self._top_tokens(
                teacher, experiment, task, (part, rows.get(split)), split, folder, trains
            )
            for split, part in examples.items()
        }
        return Inputs(task, examples, None, taught, digest)

    def with_targets(
        self,
        experiment: Experiment,
        student: Task,
        splits: Mapping[str, Sequence[Record]],
        teacher: PreparedTeacher,
        folder: Path | None,
    ) -> Mapping[str, Sequence[Record]]:
        """Return records with the targets that the teacher writes, if it writes any.

        Args:
          experiment, splits, folder: see `read`.
          student: the task of the student.
          teacher: the teacher.

        Raises:
          UserError, FolderError: see `write_targets`.
        """
        settings = experiment.objective.teacher
        if settings is None or not settings.writes_targets:
            return splits
        found = dict(splits)
        for split in SPLITS:
            arguments = student, experiment, splits[split], split, folder, self._progress
            written, is_new = self._results.get(
                f"targets of {split}",
                experiment.generation,
                (teacher, splits[split]),
                partial(write_targets, teacher, *arguments),
            )
            if folder is not None and not is_new:
                written.save(folder)
            found[split] = written.records
        return found

    def _top_tokens(
        self,
        teacher: PreparedTeacher,
        experiment: Experiment,
        student: Task,
        examples: tuple[Dataset, Dataset | None],
        split: str,
        folder: Path | None,
        trains: bool,
    ) -> TopTokens:
        """Return the most likely tokens of the teacher at the targets of a split."""
        settings = experiment.objective
        most = experiment.evaluation.examples if trains and split == "validation" else None

        def used(dataset: Dataset) -> Dataset:
            return (
                AnswerOnly(dataset) if trains and split == "train" else Examples.of(dataset[:most])
            )

        def make() -> TopTokens:
            own, rows = (None if each is None else used(each) for each in examples)
            assert own is not None
            arguments = own, rows, split, folder, self._progress
            return make_top_tokens(teacher, experiment, student, *arguments)

        assert settings.teacher is not None
        key = settings.teacher.top_tokens, settings.temperature, most, trains
        return self._results.get(f"top tokens of {split}", key, (teacher, *examples), make)[0]

    def _examples_of(
        self, task: Task, records: Sequence[Record], split: str, encode: Callable[..., Dataset]
    ) -> Dataset:
        """Encode the examples of a split, or reuse the examples of the last experiment."""
        # The opening is not part of an example. It only limits the length of the input.
        most = task.max_tokens if task.template.text else 0  # it divides plain text
        key = dataclasses.replace(task, opening=(), max_tokens=most, virtual_tokens=0), encode
        return self._results.get(
            split,
            key,
            (records,),
            lambda: encode(task, records, split, self._progress),
            lambda examples: None not in task.pieces and _fit(examples, task),
        )[0]


def _fit(examples: Dataset, task: Task) -> bool:
    """Whether the examples would be the same if encoded with the limit of a task."""
    lengths = examples.lengths
    return not examples.truncated and bool(
        (lengths.input + lengths.longest <= task.max_tokens).all()
    )
