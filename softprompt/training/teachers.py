"""The teacher of an experiment: the base model that reads more, a trained run, or another model."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from softprompt.backbones.loading import Base, load_base
from softprompt.data.records import Record
from softprompt.data.task import Task
from softprompt.data.teacher import same_rows, teacher_text
from softprompt.errors import UserError
from softprompt.experiment.objective_settings import TeacherSettings
from softprompt.experiment.schema import Experiment
from softprompt.inference.prompt import load_prompt
from softprompt.methods.saved import SavedPrompt
from softprompt.objectives.teacher import Teacher, read


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedTeacher:
    """A teacher, ready to be read from.

    Attributes:
      model: the frozen model, with the prefix that it reads before every row.
      first: the ids of the text that it reads before every row; empty for a trained run.
      task: turns records into its rows.
      reads_same_rows: whether it reads the rows of the student.
      available: the maximum number of tokens in a row.
      digest: SHA-256 of the weights and of what the teacher reads first.
    """

    model: Teacher
    first: Sequence[int]
    task: Task
    reads_same_rows: bool
    available: int
    digest: str

    def limited(self, student: Task) -> Task:
        """Return the student's task, limited to the teacher's window if both read the same rows."""
        if not self.reads_same_rows:
            return student
        return dataclasses.replace(student, max_tokens=min(student.max_tokens, self.available))


def prepare_teacher(
    experiment: Experiment, base: Base, records: Sequence[Record], student: Task
) -> PreparedTeacher:
    """Prepare the teacher of an experiment whose objective is `distill`.

    Args:
      experiment: the experiment.
      base: the base model of the student.
      records: the training records, from which solved examples are drawn.
      student: the task of the student.

    Raises:
      UserError: if the teacher cannot be loaded, or does not fit the student.
    """
    settings = experiment.objective.teacher
    assert settings is not None
    if settings.run is not None:
        teacher = _trained(settings.run, base, student)
    else:
        teacher = _reading(settings, experiment, base, records, student)
    if not teacher.reads_same_rows and (student.template.messages or student.template.text):
        raise UserError(
            "objective.teacher: with conversations or plain text, the teacher must read the same "
            "rows as the student; put {prompt} first, and use a base with the same chat template"
        )
    return teacher


def _trained(run: str, base: Base, student: Task) -> PreparedTeacher:
    """Return the model of a trained run, with the prefix of its own prompt."""
    trained = load_prompt(Path(run), base)
    window = base.backbone.arch.context_length
    taken = 0 if trained.prefix is None else trained.prefix.length
    return PreparedTeacher(
        Teacher(trained.backbone, trained.prefix),
        (),
        trained.task,
        list(trained.task.pieces) == list(student.pieces) and None not in student.pieces,
        window - taken,
        SavedPrompt.read(Path(run)).digest,
    )


def _reading(
    settings: TeacherSettings,
    experiment: Experiment,
    base: Base,
    records: Sequence[Record],
    student: Task,
) -> PreparedTeacher:
    """Return a base model with a text to read first, or with its own rows."""
    own = base if settings.base is None else _other_base(settings.base, experiment, base)
    texts = experiment.template, experiment.verbalizer
    text = teacher_text(settings, own, *texts, records, experiment.seed, student)
    prefix = read(own.backbone, text.first) if text.first else None
    return PreparedTeacher(
        Teacher(own.backbone, prefix),
        text.first,
        text.task,
        same_rows(text.task.pieces, student),
        own.backbone.arch.context_length - len(text.first),
        hashlib.sha256(json.dumps([own.fingerprint, text.first]).encode()).hexdigest(),
    )


def _other_base(name: str, experiment: Experiment, base: Base) -> Base:
    """Load another base model, and check that it has the vocabulary of the student's."""
    settings = experiment.compute.model_dump(exclude={"mesh"})
    other = load_base(name, **settings, mesh=base.backbone.mesh)
    vocabulary = base.tokenizer.get_vocab()
    if other.tokenizer.get_vocab() != vocabulary:
        raise UserError(
            f"objective.teacher.base: {other.name!r} does not have the vocabulary of {base.name!r}"
            "; choose a model of the same family"
        )
    sizes = [model.backbone.arch.vocab_size for model in (base, other)]
    if min(sizes) <= max(vocabulary.values(), default=0) and sizes[0] != sizes[1]:
        raise UserError(
            f"objective.teacher.base: {other.name!r} predicts {sizes[1]} tokens and {base.name!r} "
            f"{sizes[0]}, but the vocabulary has {max(vocabulary.values()) + 1}"
        )
    if other.backbone.separate_targets != base.backbone.separate_targets:
        raise UserError(
            f"objective.teacher.base: one of {other.name!r} and {base.name!r} is an "
            "encoder-decoder; both or neither must be"
        )
    return other
