"""What a teacher reads before the rows: a text, more solved examples, or both."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from softprompt.backbones.loading import Base
from softprompt.data.records import Record
from softprompt.data.task import Task, make_task
from softprompt.data.template import draw_demonstrations
from softprompt.errors import UserError
from softprompt.experiment.objective_settings import TeacherSettings
from softprompt.experiment.schema import TemplateSettings
from softprompt.files.reading import MEBIBYTE, read_bytes

_LARGEST_CONTEXT = 64 * MEBIBYTE


def teacher_opening(
    settings: TeacherSettings,
    base: Base,
    template: TemplateSettings,
    verbalizer: Mapping[str, str] | None,
    records: Sequence[Record],
    seed: int,
    task: Task,
) -> list[int]:
    """Return the ids of the tokens that the teacher reads before every row.

    The teacher reads the text of `settings.context` in the place of the virtual tokens, and as many
    solved examples as `settings.shots`.

    Args:
      settings: the section `objective.teacher`.
      base: the base model.
      template, verbalizer: of the experiment.
      records: the training records, from which solved examples are drawn.
      seed: determines the draw.
      task: the task of the student, whose rows the teacher reads too.

    Raises:
      UserError: if the context cannot be read, the context window is too short, or the teacher
        would need other rows than the student.
    """
    shown = draw_demonstrations(template, verbalizer, records, settings.shots, seed)
    # One virtual token marks the place of the context.
    marked = make_task(base, template, verbalizer, shown, virtual_tokens=1)
    pieces, own = list(marked.pieces), list(task.pieces)
    if own != pieces and not (own and isinstance(own[0], list) and own[1:] == pieces):
        raise UserError(
            "objective.teacher: the teacher must read the same rows as the student; put {prompt} "
            "before the first field of template.input and leave out all text before it"
        )
    ids = opening_with(_context_ids(settings, base), marked)
    window, needed = base.backbone.arch.context_length, template.max_tokens or 2
    if window - len(ids) < needed:
        raise UserError(
            f"objective.teacher: base {base.name!r} has a context window of {window} tokens, too "
            f"short for the {len(ids)} that the teacher reads first and {needed} of a row"
        )
    return ids


def opening_with(context: Sequence[int], marked: Task) -> list[int]:
    """Return the ids of the opening of a task, with a text in the place of its virtual token.

    Args:
      context: the ids of the text.
      marked: a task with one virtual token, which marks the place of the text.
    """
    ids: list[int] = []
    if marked.opening[:1] == [~0] and marked.pieces and isinstance(marked.pieces[0], list):
        ids += marked.pieces[0]  # the special tokens come before the text
    for token in marked.opening:
        ids += context if token == ~0 else [token]
    return ids


def read_context(path: Path) -> str:
    """Return the text of a file for a teacher to read.

    Raises:
      UserError: if it cannot be read, is not UTF-8, or is blank.
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
