"""A first guess at the task of a dataset: which fields are read, and which one is predicted."""

import dataclasses
import enum
from collections.abc import Sequence

from softprompt.data.columns import Column
from softprompt.errors import UserError

_LABELS = ("label", "labels", "class", "category", "sentiment", "topic", "intent", "target", "y")
_TARGETS = (
    *("target", "output", "completion", "response", "answer", "summary", "highlights"),
    *("translation", "reference"),
)
_ABOUT_RECORDS = (  # fields that say where a record comes from, and are not part of the task
    *("id", "idx", "index", "uid", "uuid", "guid", "url", "date", "time", "timestamp", "split"),
    *("source", "origin", "dataset", "domain", "author", "language", "lang", "license"),
)


class Format(enum.Enum):
    """How a record becomes text."""

    LABELS = enum.auto()
    """The fields of the input fill a template, and the target is a label."""
    FREE_TEXT = enum.auto()
    """The fields of the input fill a template, and the target is free text."""
    PROMPTS = enum.auto()
    """The field `prompt` is the input, and the field `completion` is the target."""
    MESSAGES = enum.auto()
    """The target is a conversation."""
    PLAIN_TEXT = enum.auto()
    """The target is a text. All of it is learned."""


@dataclasses.dataclass(frozen=True)
class Guess:
    """A task.

    Attributes:
      format: how a record becomes text.
      inputs: the fields that the model reads.
      target: the field that it predicts.
      left_out: fields of text that some records do not have.
      reason: why this field is the target.
    """

    format: Format
    inputs: Sequence[Column]
    target: Column
    left_out: Sequence[Column]
    reason: str


def guess_task(columns: Sequence[Column], where: str) -> Guess:
    """Guess the task from the fields of a dataset.

    Messages are a conversation, and `prompt` and `completion` are a pair. A field with few values
    is a label, if its name says so or if it is the last such field. Otherwise the target is a field
    whose name says so, or the last text. A single text is plain text.

    Args:
      columns: the fields.
      where: the dataset, for error messages.

    Raises:
      UserError: if there are no fields for an input and a target.
    """
    for column in columns:
        if column.has_conversations:
            return Guess(Format.MESSAGES, [], column, [], "has conversations")
    useful = [column for column in columns if column.useful and column.name]
    by_name = {column.name: column for column in useful}
    if {"prompt", "completion"} <= by_name.keys():
        prompt, completion = by_name["prompt"], by_name["completion"]
        return Guess(Format.PROMPTS, [prompt], completion, [], "belongs to the field prompt")
    labels = [column for column in useful if column.has_labels]
    texts = [column for column in useful if not column.has_labels and not column.numeric]
    named_label, named_target = _named(labels, _LABELS), _named(texts, _TARGETS)
    task_labels, task_texts = _of_task(labels), _of_task(texts)
    if named_label:
        target, reason = named_label, "has few values and the name of a label"
    elif named_target and useful != [named_target]:
        target, reason = named_target, "has the name of a target"
    elif task_labels and len(useful) > 1:
        target, reason = task_labels[-1], "has few values"
    elif len(task_texts) > 1:
        target, reason = task_texts[-1], "is the last text"
    elif len(texts) == 1 or len(task_texts) == 1:
        (text,) = task_texts or texts
        return Guess(Format.PLAIN_TEXT, [], text, [], "is the only text")
    else:
        raise _no_task(useful, where)
    others = [column for column in useful if column is not target]
    inputs = [column for column in task_texts if column is not target]
    inputs = inputs or _of_task(others) or others
    if target is named_target:  # a text with the name `source` belongs to the task
        inputs += [c for c in texts if c.name.lower() == "source" and c not in inputs]
    if not inputs:
        raise _no_task(useful, where)
    left_out = [column for column in inputs if not column.complete]
    if len(left_out) < len(inputs):
        inputs = [column for column in inputs if column.complete]
    else:
        left_out = []  # the user has to decide
    kind = Format.LABELS if target.has_labels else Format.FREE_TEXT
    return Guess(kind, inputs, target, left_out, reason)


def _named(columns: Sequence[Column], names: Sequence[str]) -> Column | None:
    by_name = {column.name.lower(): column for column in columns}
    return next((by_name[name] for name in names if name in by_name), None)


def _of_task(columns: Sequence[Column]) -> list[Column]:
    return [column for column in columns if column.name.lower() not in _ABOUT_RECORDS]


def _no_task(columns: Sequence[Column], where: str) -> UserError:
    names = ", ".join(column.name for column in columns)
    return UserError(
        f"{where}: found no input and target among its fields with text ({names or 'none'}); "
        "a record needs a text, and a label or another text to predict"
    )
