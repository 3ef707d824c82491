"""Conversations: records of messages as examples with a target for every assistant turn.

The row of a conversation is the text of the chat template. The answers are targets where they
stand, so the history is read once. The last answer is the candidate of the example.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding

from softprompt.backbones.formats.tokenizer import encode_texts
from softprompt.backbones.loading import Base
from softprompt.data.chat import ChatRenderer, Messages, Rendered
from softprompt.data.examples import Example
from softprompt.data.records import Record
from softprompt.errors import UserError

_UNSUPPORTED = ("weight", "tool_calls")  # keys of a message that change what it means
_RENDERED_TOGETHER = 32  # conversations


class ConversationEncoder:
    """Encodes conversations with the chat template of a base model. Close it after use.

    Args:
      base: the base model.
      field: the field of a record that holds its messages.
      max_tokens: limit for the tokens of a row.
      before: the ids that the row of a record begins with.
    """

    def __init__(
        self, base: Base, field: str, max_tokens: int, before: Callable[[Record], list[int]]
    ):
        self._tokenizer, self._field, self._max_tokens = base.tokenizer, field, max_tokens
        self._require_embeddings, self._before = base.require_embeddings, before
        self._renderer = ChatRenderer(base.tokenizer)

    def close(self) -> None:
        """End the process that renders the template."""
        self._renderer.close()

    def encode(self, records: Sequence[Record], with_answer: bool) -> list[Example]:
        """Encode conversations.

        A conversation of more than `max_tokens` loses its first turns, but not a system message.

        Args:
          records: the conversations.
          with_answer: whether to read the answers. Without it, an answer at the end is left out.

        Raises:
          UserError: if a record is malformed, its last turn does not fit, or the template cannot
            be split.
        """
        conversations = [messages_of(record, self._field) for record in records]
        if with_answer:
            for turns, record in zip(conversations, records, strict=True):
                where = self._where(record)
                if isinstance(record.fields[self._field], str):
                    raise UserError(f"{where}: must be a list of messages, not text")
                if turns[-1]["role"] != "assistant":
                    raise UserError(f"{where}: its last message is not from the assistant")
        else:
            conversations = [question_of(turns) for turns in conversations]
        rendered: list[Rendered] = []
        for start in range(0, len(records), _RENDERED_TOGETHER):
            part = slice(start, start + _RENDERED_TOGETHER)
            rendered += self._render(conversations[part], records[start].where, with_answer)
        encodings = encode_texts(self._tokenizer, [each.text for each in rendered])
        return [
            self._example(*parts, with_answer)
            for parts in zip(records, conversations, rendered, encodings, strict=True)
        ]

    def _where(self, record: Record) -> str:
        return f"{record.where}: field {self._field!r}"

    def _render(
        self, conversations: Sequence[Messages], where: str, with_answer: bool
    ) -> list[Rendered]:
        """Render conversations. An error names the first of them, `where`, and is exact for one."""
        try:
            if with_answer:
                return self._renderer.render_answers(conversations)
            return [Rendered(self._renderer.render(turns), []) for turns in conversations]
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def _example(
        self,
        record: Record,
        turns: Messages,
        rendered: Rendered,
        encoding: Encoding,
        with_answer: bool,
    ) -> Example:
        before = self._before(record)
        row = self._row(record, before, rendered, encoding, with_answer)
        if truncated := row.length > self._max_tokens:
            row = self._shortened(row, record, before, turns, with_answer)
        self._require_embeddings(row.ids, record.where)
        if not with_answer:
            return Example(row.ids, [], None, record, truncated)
        *earlier, (start, stop) = row.spans
        return Example(row.ids[:start], [row.ids[start:stop]], 0, record, truncated, earlier)

    def _shortened(
        self, row: "_Row", record: Record, before: list[int], turns: Messages, with_answer: bool
    ) -> "_Row":
        """Leave out as few of the first turns of a conversation as possible so that it fits.

        Raises:
          UserError: if not even the last turn fits.
        """
        asked = [number for number, turn in enumerate(turns) if turn["role"] == "user"]

        def without(count: int) -> _Row:
            shorter = [*turns[: asked[0]], *turns[asked[count] :]]
            (rendered,) = self._render([shorter], record.where, with_answer)
            (encoding,) = encode_texts(self._tokenizer, [rendered.text])
            return self._row(record, before, rendered, encoding, with_answer)

        last = len(asked) - 1
        if last > 0:
            row = without(last)
        if row.length > self._max_tokens:
            raise UserError(
                f"{self._where(record)}: its last turn has {row.length} tokens, but at most "
                f"{self._max_tokens} fit; shorten it or raise template.max_tokens"
            )
        low, high = 1, last  # without more turns, a row is never longer
        while low < high:
            middle = (low + high) // 2
            shorter = without(middle)
            if shorter.length <= self._max_tokens:
                high, row = middle, shorter
            else:
                low = middle + 1
        return row

    def _row(
        self,
        record: Record,
        before: list[int],
        rendered: Rendered,
        encoding: Encoding,
        with_answer: bool,
    ) -> "_Row":
        ids = [*before, *encoding.ids]
        spans = [
            (len(before) + start, len(before) + stop)
            for start, stop in target_spans(encoding, rendered.answers, self._where(record))
        ]
        return _Row(ids, spans, spans[-1][1] if with_answer else len(ids))


class _Row(NamedTuple):
    """A conversation as ids, the tokens of its answers, and the number of tokens it needs."""

    ids: list[int]
    spans: list[tuple[int, int]]
    length: int


def messages_of(record: Record, field: str) -> Messages:
    """Return the messages of a record. A text is a conversation of one user message.

    Raises:
      UserError: if the field is missing or malformed, with the number of the message.
    """
    value = record.fields.get(field)
    if field not in record.fields or isinstance(value, str):
        return [{"role": "user", "content": record.text(field)}]
    where = f"{record.where}: field {field!r}"
    if not isinstance(value, Sequence | np.ndarray) or not len(value):
        raise UserError(f"{where}: must be a list of messages")
    messages = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping):
            raise UserError(f"{where}: message {number} is not an object with role and content")
        one = Record(message, f"{where}: message {number}")
        if given := [key for key in _UNSUPPORTED if message.get(key) is not None]:
            raise UserError(f"{one.where}: {given[0]!r} is not supported; leave it out")
        messages.append({key: one.text(key) for key in ("role", "content")})
    return messages


def question_of(turns: Messages) -> Messages:
    """Return a conversation without the answer at its end."""
    return turns[:-1] if turns[-1]["role"] == "assistant" else turns


def target_spans(
    encoding: Encoding, answers: Sequence[tuple[int, int]], where: str
) -> list[tuple[int, int]]:
    """Return the tokens of each answer, as start and stop.

    Args:
      encoding: the tokens of a conversation.
      answers: the characters of each answer, as start and stop.
      where: names the conversation in error messages.

    Raises:
      UserError: if a token holds a part of an answer and a part of the text around it.
    """
    starts, ends = np.array(encoding.offsets or [(0, 0)]).T
    spans = []
    for number, (start, stop) in enumerate(answers, 1):
        inside = np.flatnonzero((ends > start) & (starts < stop))
        if not inside.size or starts[inside[0]] < start or ends[inside[-1]] > stop:
            raise UserError(
                f"{where}: answer {number} shares a token with the text around it, so that it "
                "cannot be separated exactly; remove white space at its ends"
            )
        spans.append((int(inside[0]), int(inside[-1]) + 1))
    return spans
