"""What a teacher reads: a text first, and then its rows, which may differ from the student's."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

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
      first: the ids of the tokens that it reads before every row.
      task: turns records into its rows.
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

    It reads the text of `settings.context` in the place of the virtual tokens, and as many solved
    examples as `settings.shots`. Its rows follow `settings.input`, by default the template.

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
    if settings.input is not None:
        if template.messages or template.text:
            raise UserError(
                "objective.teacher.input: needs template.input; conversations and plain text have "
                "no other form"
            )
        template = template.model_copy(update={"input": settings.input})
    shown = draw_demonstrations(template, verbalizer, records, settings.shots, seed)
    has_context = settings.context is not None
    # One virtual token marks the place of the context.
    marked = make_task(base, template, verbalizer, shown, virtual_tokens=int(has_context))
    if None in marked.pieces:
        raise UserError(
            "objective.teacher.context: is read once for all rows; put {prompt} before the first "
            "field of the teacher's input"
        )
    begin: list[int] = []
    pieces = list(marked.pieces)
    if pieces and isinstance(pieces[0], list) and marked.opening[:1] == [~0]:
        begin = pieces[0]  # the special tokens come before the context
        if pieces != list(student.pieces):
            pieces = pieces[1:]
    context = _context_ids(settings, base)
    first = [*begin]
    for token in marked.opening:
        first += context if token == ~0 else [token]
    window, needed = base.backbone.arch.context_length, template.max_tokens or 2
    if window - len(first) < needed:
        raise UserError(
            f"objective.teacher: base {base.name!r} has a context window of {window} tokens, too "
            f"short for the {len(first)} that the teacher reads first and {needed} of a row"
        )
    available = min(marked.max_tokens, window - len(first))
    task = dataclasses.replace(marked, pieces=pieces, opening=(), max_tokens=available)
    return TeacherText(first, task)


def same_rows(pieces: Sequence[Piece], student: Task) -> bool:
    """Return whether a teacher whose rows have these pieces can read the rows of the student.

    Special tokens at the beginning of the student's rows alone are no hindrance.
    """
    own, others = list(student.pieces), list(pieces)
    begins = bool(own) and isinstance(own[0], list)
    return None not in own and (own == others or (begins and own[1:] == others))


def _context_ids(settings: TeacherSettings, base: Base) -> list[int]:
    if settings.context is None:
        return []
    path = Path(settings.context)
    try:
        text = read_bytes(path, _LARGEST_CONTEXT).decode()
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    ids = base.tokenizer(text, add_special_tokens=False).input_ids
    if not ids:
        raise UserError(f"{path}: has no text for the teacher to read")
    base.require_embeddings(ids, str(path))
    return ids
