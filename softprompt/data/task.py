"""Tasks: encode records as examples of token ids.

Virtual tokens have ids too: virtual token i is `~i`, see `backbones.layers.Embedding`.
"""

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from softprompt.backbones.formats.tokenizer import encode_ids, encode_texts
from softprompt.backbones.loading import Base
from softprompt.data.chat import require_chat_template, turn_end
from softprompt.data.conversations import ConversationEncoder, messages_of, question_of
from softprompt.data.encoding import record_batches, truncated_input
from softprompt.data.examples import Example
from softprompt.data.plain_text import document_rows
from softprompt.data.records import Record
from softprompt.data.template import (
    Demonstration,
    Filled,
    Piece,
    check_names,
    compile_template,
    end_of_text,
    fill,
    label_ids,
    label_of,
    split_opening,
)
from softprompt.errors import UserError
from softprompt.experiment.schema import GenerationSettings, TemplateSettings
from softprompt.experiment.templates import template_fields

_log = logging.getLogger(__name__)

Input = str | Mapping[str, Any] | Record  # a text, or fields by name if the template has several


@dataclasses.dataclass(frozen=True)
class Task:
    """Encodes records as examples.

    An input is a sequence of pieces, which are tokenized one by one. The first pieces, up to
    the first one that depends on the record, form the opening, which a method may run once for
    all rows. The pieces after the opening are tokenized for every record.

    Attributes:
      base: the base model.
      template: the experiment's template.
      verbalizer: label -> text; None for free text, whose targets end with the end-of-text
        token.
      demonstrations: solved examples that are written before every input.
      max_tokens: limit for the tokens of an input and its longest candidate together; for
        each of them where the backbone has `separate_targets`. The opening does not count.
      virtual_tokens: number of virtual tokens in an input.
      tasks: names of the tasks that have virtual tokens of their own; empty if all records
        share them.
      task_field: the field of a record that names its task.
      opening: ids of the tokens that every row begins with.
      pieces: the pieces after the opening.
    """

    base: Base
    template: TemplateSettings
    verbalizer: Mapping[str, str] | None
    demonstrations: Sequence[Demonstration]
    max_tokens: int
    virtual_tokens: int
    tasks: Sequence[str]
    task_field: str
    opening: Sequence[int]
    pieces: Sequence[Piece]

    def __repr__(self) -> str:
        targets = f"{len(self.labels)} labels" if self.labels else "free text"
        return f"Task({targets}, {self.virtual_tokens} virtual tokens, base {self.base.name!r})"

    @property
    def labels(self) -> list[str]:
        """The labels, in the order of an example's candidates; empty for free text."""
        return list(self.verbalizer or ())

    def examples(self, records: Iterable[Record], *, with_answer: bool = True) -> Iterator[Example]:
        """Encode records as `example` does, but tokenize many at a time, in parallel threads.

        Plain text of more than `max_tokens` becomes several examples.

        Args:
          records: they are read lazily, one batch at a time.
          with_answer: see `example`.

        Yields:
          The examples of each record, in order.

        Raises:
          UserError: see `example`. The examples of all records before the bad one come first.
        """
        with self.encoder() as encode:
            for batch in record_batches(records):
                try:
                    yield from encode(batch, with_answer)
                except UserError:  # encoded one by one, the first bad record raises its error
                    for record in batch:
                        yield from encode([record], with_answer)

    def example(self, record: Record, *, with_answer: bool = True) -> Example:
        """Fill in the templates and tokenize.

        An input that exceeds `max_tokens` is truncated at the end of its longest field. A
        conversation loses its first turns. Plain text is divided, and this is its first part.

        Args:
          record: the record to encode.
          with_answer: whether to read the target. Without it, an example of free text has
            no candidates, and one of labels has no answer.

        Raises:
          UserError: if a field is missing or empty, the label or the task is not known, the
            target is too long, or the input is too long even without its longest field.
        """
        with self.encoder() as encode:
            return encode([record], with_answer)[0]

    @contextlib.contextmanager
    def encoder(self) -> Iterator[Callable[[Sequence[Record], bool], list[Example]]]:
        """Yield a function that encodes records as `example` does, given `with_answer`.

        For conversations, the context runs a process that renders the chat template.
        """
        if field := self.template.messages:
            encoder = ConversationEncoder(self.base, field, self.max_tokens, self._row_opening)
            with contextlib.closing(encoder):
                yield encoder.encode
        else:
            yield self._encode

    def record(self, text: Input, where: str) -> Record:
        """Return an input as a record. A bare text fills the only field of the template.

        Args:
          text: a text, fields by name, or a record.
          where: names the input in error messages.

        Raises:
          UserError: if the type is wrong, or a text is given for a template with several fields.
        """
        if isinstance(text, Record):
            return text
        if isinstance(text, Mapping):
            return Record(text, where)
        if not isinstance(text, str):
            raise UserError(f"{where}: neither text nor a mapping of fields")
        fields = template_fields(self.template.input)
        if len(fields) > 1:
            raise UserError(f"{where}: give its fields by name ({', '.join(fields)})")
        return Record({fields[0]: text}, where)

    def content_free(self, text: str) -> Example:
        """Return an example without an answer, with this text in every field, for calibration."""
        fields = dict.fromkeys(template_fields(self.template.input), text)
        return self.example(Record(fields, "scoring.calibrate"), with_answer=False)

    def reference(self, record: Record) -> str:
        """Return the free text that a prediction for this record is compared with."""
        if field := self.template.messages:
            return messages_of(record, field)[-1]["content"].strip()
        return fill(self.template.target, record)[0].strip()

    def with_target(self, record: Record, target: str) -> Record:
        """Return a record with a free text as its target."""
        if field := self.template.messages:
            question = question_of(messages_of(record, field))
            value: Any = [*question, {"role": "assistant", "content": target}]
        else:
            (field,), value = template_fields(self.template.target), target
        return Record({**record.fields, field: value}, record.where)

    def input_fields(self, record: Record) -> dict[str, Any]:
        """Return the fields of a record that its input uses."""
        if field := self.template.messages:
            return {field: question_of(messages_of(record, field))}
        return {field: record.text(field) for field in template_fields(self.template.input)}

    def stopping(self, settings: GenerationSettings, *, trained: bool = True) -> GenerationSettings:
        """Return the settings with the token that ends an answer, if it ends no text.

        Args:
          settings: how text is generated.
          trained: whether the model was trained on this task. With `template.chat`, it has then
            learned to end an answer with the end-of-text token instead.
        """
        chat = self.template.messages or (self.template.chat and not trained)
        end = turn_end(self.base.tokenizer) if chat else ""
        if end in ("", self.base.tokenizer.eos_token, *settings.stop):
            return settings
        return settings.model_copy(update={"stop": [*settings.stop, end]})

    def for_generation(self, new_tokens: int, prefix_length: int) -> "Task":
        """Return the task with `max_tokens` low enough to leave space for generated tokens.

        Args:
          new_tokens: number of tokens to generate.
          prefix_length: number of tokens before every row, including the opening.

        Raises:
          UserError: if no space is left for an input.
        """
        context = self.base.backbone.arch.context_length
        available = context - prefix_length
        if not self.base.backbone.separate_targets:
            available -= new_tokens
        if available < 1:
            raise UserError(
                f"max_new_tokens {new_tokens}: the context window of the base model has {context} "
                f"tokens, and every input begins with {prefix_length}; generate fewer tokens"
            )
        return dataclasses.replace(self, max_tokens=min(self.max_tokens, available))

    def _row_opening(self, record: Record) -> list[int]:
        """Return the virtual tokens of a record that stand in its row."""
        return self._virtual_ids(record) if None in self.pieces else []

    def _encode(self, records: Sequence[Record], with_answer: bool) -> list[Example]:
        if self.template.text and with_answer:
            texts = [fill(self.template.input, record)[0] for record in records]
            return list(
                document_rows(self.base, records, texts, self._row_opening, self.max_tokens)
            )
        check_names(self.template, records)
        answers = self._answers(records) if with_answer else [None] * len(records)
        targets = self._targets(records, with_answer)
        inputs = self._inputs(records, [max(map(len, each), default=0) for each in targets])
        examples = []
        for record, (tokens, truncated), candidates, answer in zip(
            records, inputs, targets, answers, strict=True
        ):
            self.base.require_embeddings(itertools.chain(tokens, *candidates), record.where)
            examples.append(Example(tokens, candidates, answer, record, truncated))
        return examples

    def _answers(self, records: Sequence[Record]) -> Sequence[int | None]:
        """Return the index of the right candidate of each record."""
        if not self.verbalizer:
            return [0] * len(records)
        numbers = {label: number for number, label in enumerate(self.verbalizer)}
        return [numbers[label_of(self.template, self.verbalizer, record)] for record in records]

    def _targets(self, records: Sequence[Record], with_answer: bool) -> list[list[list[int]]]:
        """Return the ids of the candidates of each record."""
        if self.verbalizer:
            tokenizer, where = self.base.tokenizer, records[0].where
            labels = label_ids(self.template, self.verbalizer, tokenizer, where)
            targets = [labels] * len(records)
        elif with_answer:
            end = end_of_text(self.base.tokenizer)
            texts = [fill(self.template.target, record)[0] for record in records]
            targets = [[[*ids, end]] for ids in encode_ids(self.base.tokenizer, texts)]
        else:
            targets = [[] for _ in records]
        for record, candidates in zip(records, targets, strict=True):
            longest = max(map(len, candidates), default=0)
            if longest > self.max_tokens:
                raise UserError(
                    f"{record.where}: its target has {longest} tokens, but at most "
                    f"{self.max_tokens} fit; shorten it or raise template.max_tokens"
                )
        return targets

    def _inputs(
        self, records: Sequence[Record], reserved: Sequence[int]
    ) -> Iterator[tuple[list[int], bool]]:
        """Yield the ids of each record's input, and whether it was truncated.

        Args:
          records: the records.
          reserved: for each record, the number of tokens of its longest candidate.
        """
        filled = [[self._filled(piece, record) for piece in self.pieces] for record in records]
        texts = [part[0] for parts in filled for part in parts if isinstance(part, tuple)]
        encoded = iter(encode_ids(self.base.tokenizer, texts))
        for record, parts, taken in zip(records, filled, reserved, strict=True):
            if self.base.backbone.separate_targets:
                taken = 0
            tokens: list[int] = []
            for part in parts:
                tokens += next(encoded) if isinstance(part, tuple) else part
            if len(tokens) <= self.max_tokens - taken:
                yield tokens, False
            else:
                yield self._truncated(parts, self.max_tokens - taken, record.where), True

    def _truncated(
        self, parts: Sequence[list[int] | Filled], max_tokens: int, where: str
    ) -> list[int]:
        """Return the ids of an input that is too long."""
        texts = [part[0] for part in parts if isinstance(part, tuple)]
        encodings = iter(encode_texts(self.base.tokenizer, texts))
        encoded = [
            (next(encodings), part[1]) if isinstance(part, tuple) else part for part in parts
        ]
        return truncated_input(encoded, max_tokens, where)

    def _filled(self, piece: Piece, record: Record) -> list[int] | Filled:
        """Return the ids of a piece, or its text, which must be tokenized."""
        if piece is None:
            return self._virtual_ids(record)
        return fill(piece, record) if isinstance(piece, str) else piece

    def _virtual_ids(self, record: Record) -> list[int]:
        first = 0
        if self.tasks:
            name = record.text(self.task_field)
            if name not in self.tasks:
                raise UserError(
                    f"{record.where}: {self.task_field} {name!r} is not one of prompt.tasks "
                    f"({', '.join(self.tasks)})"
                )
            first = self.tasks.index(name) * self.virtual_tokens
        return [~i for i in range(first, first + self.virtual_tokens)]


def make_task(
    base: Base,
    template: TemplateSettings,
    verbalizer: Mapping[str, str] | None,
    demonstrations: Sequence[Demonstration] = (),
    *,
    virtual_tokens: int = 0,
    prefix_length: int = 0,
    tasks: Sequence[str] = (),
    task_field: str = "task",
) -> Task:
    """Compile a template for a base model.

    Args:
      base, template, verbalizer, demonstrations, tasks, task_field: see `Task`.
      virtual_tokens: number of virtual tokens in an input.
      prefix_length: number of tokens that prefix tuning puts before the opening. They take
        up context window, except where the backbone has `separate_targets`.

    Raises:
      UserError: if the context window is too short, or the base model has no chat template.

    Examples:
      >>> base = load_base("smollm2-135m-instruct")
      >>> template = TemplateSettings(input="Review: {text} Sentiment:")
      >>> verbalizer = {"positive": " positive", "negative": " negative"}
      >>> task = make_task(base, template, verbalizer, virtual_tokens=5)
      >>> task
      Task(2 labels, 5 virtual tokens, base 'smollm2-135m-instruct')
      >>> task.opening[:5]  # the virtual tokens, followed by the ids of "Review: "
      [-1, -2, -3, -4, -5]
    """
    if base.backbone.separate_targets:
        prefix_length = 0
    for name in ("messages", "text"):
        if base.backbone.separate_targets and getattr(template, name) is not None:
            raise UserError(
                f"template.{name}: base {base.name!r} is an encoder-decoder, which cannot predict "
                "the tokens that it reads; use template.input and template.target"
            )
    context = base.backbone.arch.context_length
    if prefix_length + virtual_tokens > context:  # before a list of them fills the memory
        raise UserError(
            f"base {base.name!r} has a context window of {context} tokens, too short for "
            f"{prefix_length + virtual_tokens} virtual tokens"
        )
    virtual = virtual_tokens > 0
    if template.messages:  # the chat template writes everything but the virtual tokens
        require_chat_template(base.tokenizer)
        pieces: list[Piece] = [None] if virtual else []
    else:
        pieces = compile_template(template, demonstrations, base.tokenizer, virtual=virtual)
    opening, pieces = split_opening(
        pieces, base.tokenizer, virtual_tokens, virtual_varies=bool(tasks)
    )
    base.require_embeddings(opening, "template")
    taken = prefix_length + len(opening)
    available = context - taken
    if available < 2 or (template.max_tokens or 0) > available:
        asked = f" and template.max_tokens {template.max_tokens}" if template.max_tokens else ""
        raise UserError(
            f"base {base.name!r} has a context window of {context} tokens, too short for the "
            f"{taken} that every input begins with{asked}"
        )
    return Task(
        base,
        template,
        verbalizer,
        demonstrations,
        template.max_tokens or available,
        virtual_tokens,
        tasks,
        task_field,
        opening,
        pieces,
    )
