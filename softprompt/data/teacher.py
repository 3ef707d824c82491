"""What a teacher reads: first a text, and then rows, which may differ from the student's."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from softprompt.backbones.loading import Base
from softprompt.data.records import Record
from softprompt.data.task import Task, make_task
from softprompt.data.template import Piece, draw_demonstrations
from softprompt.errors import UserError
from softprompt.experiment.objective_settings import TeacherSettings
from softprompt.experiment.schema import TemplateSettings
from softprompt.files.reading import MEBIBYTE, read_bytes

_LARGEST_CONTEXT = 64 * MEBIBYTE


@dataclasses.dataclass(frozen=True)
class TeacherText:
    """What a teacher reads.

    Attributes:
      first: the ids of the tokens that the teacher reads before every row.
      task: turns records into the rows of the teacher.
    """

    first: list[int]
    task: Task


def teacher_text(
    settings: TeacherSettings,
    base: Base,
    template: TemplateSettings,
    verbalizer: Mapping[str, str] | None,
    records: Sequence[Record],
    seed: int,
    student: Task,
) -> TeacherText:
    """Return what a teacher reads.

    It reads the text of `settings.context` instead of the virtual tokens, and `settings.shots`
    solved examples. Its rows follow `settings.input`, or by default the template.

    Args:
      settings: the section `objective.teacher`.
      base: the base model of the teacher.
      template, verbalizer: of the experiment.
      records: the training records, from which solved examples are drawn.
      seed: determines the draw.
      student: the task of the student.

    Raises:
      UserError: if the context cannot be read, or the context window is too short.
    """
    if template.messages or template.text:
        for name in ("input", "shots"):
            if getattr(settings, name):
                raise UserError(
                    f"objective.teacher.{name}: needs template.input; conversations and plain text "
                    f"have no {'other form' if name == 'input' else 'solved examples'}"
                )
    if settings.input is not None:
        template = template.model_copy(update={"input": settings.input})
    shown = draw_demonstrations(template, verbalizer, records, settings.shots, seed)
    has_context = settings.context is not None
    # One virtual token marks the place of the context.
    marked = make_task(base, template, verbalizer, shown, virtual_tokens=int(has_context))
    if None in marked.pieces:
        raise UserError(
            "objective.teacher.context: the text is read once for all rows; put {prompt} before "
            "the first field of the teacher's input"
        )
    first = opening_with(_context_ids(settings, base), marked)
    pieces = list(marked.pieces)
    if _begins_before_text(marked) and pieces != list(student.pieces):
        pieces = pieces[1:]
    window, needed = base.backbone.arch.context_length, template.max_tokens or 2
    if window - len(first) < needed:
        raise UserError(
            f"objective.teacher: base {base.name!r} has a context window of {window} tokens, too "
            f"short for the {len(first)} tokens that the teacher reads first and {needed} for a row"
        )
    available = min(marked.max_tokens, window - len(first))
    task = dataclasses.replace(marked, pieces=pieces, opening=(), max_tokens=available)
    return TeacherText(first, task)


def same_rows(pieces: Sequence[Piece], student: Task) -> bool:
    """Return whether a teacher whose rows have these pieces can read the rows of the student.

    It can if only the student's rows begin with special tokens.
    """
    own, others = list(student.pieces), list(pieces)
    begins = bool(own) and isinstance(own[0], list)
    return None not in own and (own == others or (begins and own[1:] == others))


def opening_with(context: Sequence[int], marked: Task) -> list[int]:
    """Return the ids of the opening of a task, with a text instead of its virtual token.

    Args:
      context: the ids of the text.
      marked: a task with one virtual token, which marks the place of the text.
    """
    ids: list[int] = []
    if _begins_before_text(marked):
        ids += cast(list[int], marked.pieces[0])
    for token in marked.opening:
        ids += context if token == ~0 else [token]
    return ids


def _begins_before_text(marked: Task) -> bool:
    """Return whether rows begin with special tokens, which come before the text of the opening."""
    return marked.opening[:1] == [~0] and bool(marked.pieces) and isinstance(marked.pieces[0], list)


def read_context(path: Path) -> str:
    """Return the text of a file for a teacher to read.

    Raises:
      UserError: if the file cannot be read, is not UTF-8, or is blank.
    """
    try:
        text = read_bytes(path, _LARGEST_CONTEXT).decode()
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    if not text.strip():
        raise UserError(f"{path}: has no text for the teacher to read")
    return text


def _context_ids(settings: TeacherSettings, base: Base) -> list[int]:
    if settings.context is None:
        return []
    text = read_context(Path(settings.context))
    ids = base.tokenizer(text, add_special_tokens=False).input_ids
    base.require_embeddings(ids, settings.context)
    return ids
