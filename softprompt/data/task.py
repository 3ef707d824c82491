"""From an experiment's template to token ids: what every row begins with, and what follows.

Virtual tokens have ids as well: virtual token i is `~i`, see `backbones.layers.Embedding`.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from string import Formatter

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerFast

from softprompt.backbones.loading import Base
from softprompt.data.examples import Example
from softprompt.data.records import Record
from softprompt.errors import UserError
from softprompt.experiment.schema import TemplateSettings
from softprompt.experiment.templates import template_fields, template_pieces

Demonstration = tuple[str, str]  # an input and its target
Piece = str | list[int] | None  # a template, ids, or the place of the virtual tokens


@dataclasses.dataclass(frozen=True)
class Task:
    """What turns a record into an example.

    An input is a sequence of pieces, which are tokenised apart. Those at the beginning that
    have no field are the same in every row: they are the opening, which a method runs once.

    Attributes:
      base: the model that reads it.
      template: the experiment's.
      verbalizer: label -> text, or None for free text, whose target the end-of-text
        token closes.
      demonstrations: solved examples that stand in front of every input.
      max_tokens: most tokens of a row and its longest candidate together, or each of
        them where an encoder-decoder reads them apart.
      virtual_tokens: number of them in an input.
      tasks, task_field: names of the tasks that have virtual tokens of their own, and the
        field of a record that says which one it is of; none if all have the same.
      opening: ids of what every row begins with.
      pieces: what follows.
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

    @property
    def labels(self) -> list[str]:
        """The labels, in the order of an example's candidates."""
        return list(self.verbalizer or ())

    def example(self, record: Record, *, with_answer: bool = True) -> Example:
        """Fill in the templates and tokenise.

        An input too long for `max_tokens` loses tokens from the end of its longest field.

        Raises:
          UserError: with the record's place, if a field is missing or empty, the label
            is not in the verbalizer, or the rest is too long even without the field.
        """
        if "prompt" in record.fields and "{prompt}" in self.template.input:
            raise UserError(
                f"{record.where}: {{prompt}} in template.input is the place of the soft prompt; "
                "give the field 'prompt' another name"
            )
        answer: int | None = None
        if self.verbalizer:
            if with_answer:
                answer = self.labels.index(_label(self.template, self.verbalizer, record))
            (field,) = template_fields(self.template.target)
            texts = [self.template.target.format(**{field: v}) for v in self.verbalizer.values()]
        elif with_answer:
            texts, answer = [_fill(self.template.target, record)[0]], 0
        else:
            texts = []
        candidates = [self._candidate(text, record) for text in texts]
        longest = max(map(len, candidates), default=0)
        if longest > self.max_tokens:
            raise UserError(
                f"{record.where}: its target has {longest} tokens, more than {self.max_tokens}"
            )
        room = self.max_tokens - (0 if self.base.backbone.separate_targets else longest)
        tokens, truncated = self._input(record, room)
        self.base.require_embeddings(itertools.chain(tokens, *candidates), record.where)
        return Example(tokens, candidates, answer, record, truncated)

    def content_free(self, text: str) -> Example:
        """An example of labels without an answer, with this text in place of all fields."""
        fields = dict.fromkeys(template_fields(self.template.input), text)
        return self.example(Record(fields, "scoring.calibrate"), with_answer=False)

    def reference(self, record: Record) -> str:
        """A record's target of free text, as written texts are compared with it."""
        return _fill(self.template.target, record)[0].strip()

    def input_fields(self, record: Record) -> dict[str, str]:
        """The fields that a record's input is made of."""
        return {field: record.text(field) for field in template_fields(self.template.input)}

    def with_room(self, new_tokens: int, in_front: int) -> "Task":
        """The task with inputs short enough for a model to write so many tokens behind them.

        Args:
          new_tokens: that shall be written.
          in_front: tokens that stand in front of every row.

        Raises:
          UserError: if there is no room for an input at all.
        """
        context = self.base.backbone.arch.context_length
        room = context - in_front
        if not self.base.backbone.separate_targets:
            room -= new_tokens
        if room < 1:
            raise UserError(
                f"max_new_tokens {new_tokens}: the base model has room for {context} tokens, "
                f"{in_front} of which stand in front of every input"
            )
        return dataclasses.replace(self, max_tokens=min(self.max_tokens, room))

    def _candidate(self, text: str, record: Record) -> list[int]:
        tokens = self.base.tokenizer(text, add_special_tokens=False).input_ids
        if not self.verbalizer:
            if self.base.tokenizer.eos_token_id is None:
                raise UserError("the base model's tokenizer has no end-of-text token for free text")
            tokens = [*tokens, self.base.tokenizer.eos_token_id]
        if not tokens:
            raise UserError(f"{record.where}: the target {text!r} has no tokens")
        return tokens

    def _input(self, record: Record, room: int) -> tuple[list[int], bool]:
        tokens: list[int] = []
        fields: list[list[int]] = []  # places in `tokens` of the tokens of each field
        longest: tuple[int, int] = (-1, -1)  # characters, and number, of the longest field
        for piece in self.pieces:
            if not isinstance(piece, str):
                tokens += self._virtual_ids(record) if piece is None else piece
                continue
            text, spans = _fill(piece, record)
            encoded = self.base.tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True
            )
            starts, ends = np.array(encoded.offset_mapping or [(0, 0)]).T
            for begin, end in spans:
                longest = max(longest, (end - begin, -len(fields)))
                (inside,) = np.nonzero((starts >= begin) & (ends <= end) & (ends > starts))
                fields.append((len(tokens) + inside).tolist())
            tokens += encoded.input_ids
        excess = len(tokens) - room
        if excess <= 0:
            return tokens, False
        inside_longest = fields[-longest[1]]
        if len(inside_longest) <= excess:
            raise UserError(
                f"{record.where}: {len(tokens)} tokens, {excess} too many, and its longest field "
                f"has only {len(inside_longest)}; shorten the template or raise template.max_tokens"
            )
        return np.delete(tokens, inside_longest[-excess:]).tolist(), True

    def _virtual_ids(self, record: Record) -> list[int]:
        first = 0
        if self.tasks:
            name = record.text(self.task_field)
            if name not in self.tasks:
                raise UserError(
                    f"{record.where}: {self.task_field} {name!r} is none of prompt.tasks "
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
    before: int = 0,
    tasks: Sequence[str] = (),
    task_field: str = "task",
) -> Task:
    """The task of an experiment on a base model.

    Args:
      base, template, verbalizer, demonstrations, tasks, task_field: see `Task`.
      virtual_tokens: how many stand where the template says.
      before: how many tokens of a causal model's context stand in front of the opening
        besides: those of prefix tuning.

    Raises:
      UserError: if the model's context is too short, or it has no chat template.
    """
    if base.backbone.separate_targets:
        before = 0
    pieces = pieces_of(template, demonstrations, base.tokenizer, virtual=virtual_tokens > 0)
    constant = list(itertools.takewhile(lambda piece: _is_constant(piece, tasks), pieces))
    while constant and isinstance(constant[-1], list):
        constant.pop()  # special tokens alone stay in the rows
    opening: list[int] = []
    for piece in constant:
        if piece is None:
            opening += [~i for i in range(virtual_tokens)]
        elif isinstance(piece, str):
            opening += base.tokenizer(piece.format(), add_special_tokens=False).input_ids
        else:
            opening += piece
    base.require_embeddings(opening, "template")
    context = base.backbone.arch.context_length
    room = context - before - len(opening)
    if room < 2 or (template.max_tokens or 0) > room:
        asked = f" and template.max_tokens {template.max_tokens}" if template.max_tokens else ""
        raise UserError(
            f"base {base.name!r} has a context of {context} tokens, too short for the "
            f"{before + len(opening)} that stand in front of every input{asked}"
        )
    return Task(
        base,
        template,
        verbalizer,
        demonstrations,
        template.max_tokens or room,
        virtual_tokens,
        tasks,
        task_field,
        opening,
        pieces[len(constant) :],
    )


def draw_demonstrations(
    template: TemplateSettings,
    verbalizer: Mapping[str, str] | None,
    records: Sequence[Record],
    count: int,
    seed: int,
) -> list[Demonstration]:
    """Inputs and targets of `count` records, drawn without repetition.

    Raises:
      UserError: if there are fewer, or one lacks a field.
    """
    if count > len(records):
        raise UserError(f"shots: {count}, but there are only {len(records)} training records")
    drawn = np.random.default_rng(seed).choice(len(records), count, replace=False)
    return [_demonstrate(template, verbalizer, records[i]) for i in drawn]


def _demonstrate(
    template: TemplateSettings, verbalizer: Mapping[str, str] | None, record: Record
) -> Demonstration:
    text = _fill("".join(template_pieces(template.input)), record)[0]
    if not verbalizer:
        return text, _fill(template.target, record)[0]
    (field,) = template_fields(template.target)
    target = template.target.format(**{field: verbalizer[_label(template, verbalizer, record)]})
    return text, target


def _label(template: TemplateSettings, verbalizer: Mapping[str, str], record: Record) -> str:
    (field,) = template_fields(template.target)
    label = record.text(field)
    if label not in verbalizer:
        raise UserError(
            f"{record.where}: label {label!r} is not in the verbalizer "
            f"(labels: {', '.join(verbalizer)})"
        )
    return label


def pieces_of(
    template: TemplateSettings,
    demonstrations: Sequence[Demonstration],
    tokenizer: PreTrainedTokenizerFast,
    virtual: bool,
) -> list[Piece]:
    """The pieces of an input, special tokens among them."""
    begin: list[int] = []
    end: list[int] = []
    if template.chat:  # which writes special tokens as text
        written = _chat(template, demonstrations, tokenizer)
    else:
        shown = [f"{_braced(text)}{_braced(target)}\n\n" for text, target in demonstrations]
        written = ["".join(shown), template.input]
        begin, end = _special_tokens(tokenizer)
    pieces: list[Piece] = [begin]
    for text in written:
        first, *rest = template_pieces(text)
        if virtual:
            pieces += [first, *(piece for part in rest for piece in (None, part))]
        else:
            pieces.append("".join([first, *rest]))
    pieces.append(end)
    if virtual and None not in pieces:
        pieces.insert(0, None)
    return [piece for piece in pieces if piece not in ("", [])]


def _is_constant(piece: Piece, tasks: Sequence[str]) -> bool:
    """Whether a piece is the same in every row."""
    if piece is None:
        return not tasks
    return isinstance(piece, list) or not template_fields(piece)


def _chat(
    template: TemplateSettings,
    demonstrations: Sequence[Demonstration],
    tokenizer: PreTrainedTokenizerFast,
) -> list[str]:
    """What the chat template makes of the conversation, up to the input and from there on."""
    contents = [] if template.system is None else [template.system]
    roles = [] if template.system is None else ["system"]
    for demonstration in demonstrations:
        contents += map(_braced, demonstration)
        roles += ["user", "assistant"]
    contents.append(template.input)
    roles.append("user")
    # A private character stands for each content, which no chat template may alter.
    marks = [chr(0xE000 + i) for i in range(len(contents))]
    messages = [{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (ValueError, jinja2.TemplateError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"template.chat: the base model's chat template: {reason}") from error
    text = _braced(str(text))
    if not all(mark in text for mark in marks):
        raise UserError("template.chat: the base model's chat template leaves out a message")
    before, _, behind = text.rpartition(marks[-1])
    for mark, content in zip(marks[:-1], contents[:-1], strict=True):
        before = before.replace(mark, content)
    return [before, template.input + behind]


def _braced(text: str) -> str:
    """A text as a template without fields."""
    return text.replace("{", "{{").replace("}", "}}")


def _special_tokens(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts in front of and behind every text."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    raise UserError("the base model's tokenizer changes texts when it adds special tokens")


def _fill(template: str, record: Record) -> tuple[str, list[tuple[int, int]]]:
    """The text, and where in it each field stands."""
    text, spans = "", []
    for literal, field, _, _ in Formatter().parse(template):
        text += literal
        if field is not None:
            value = record.text(field)
            spans.append((len(text), len(text) + len(value)))
            text += value
    return text, spans
