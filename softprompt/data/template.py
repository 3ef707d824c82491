"""Compile a template: from an experiment's template to the pieces of an input.

A piece is text with fields to fill in, special tokens, or the place of the virtual tokens.
"""

import contextlib
import functools
import itertools
from collections.abc import Mapping, Sequence
from string import Formatter

import numpy as np
from transformers import PreTrainedTokenizerFast

from softprompt.backbones.formats.tokenizer import encode_texts
from softprompt.data.chat import ChatRenderer
from softprompt.data.records import Record
from softprompt.errors import UserError
from softprompt.experiment.schema import TemplateSettings
from softprompt.experiment.templates import (
    PROMPT_FIELD,
    field_name,
    filled_in,
    template_fields,
    template_pieces,
)

Demonstration = tuple[str, str]
"""The input and the target of a solved example."""

Piece = str | list[int] | None
"""Text with `{field}`s, token ids, or None for the virtual tokens."""

Spans = list[tuple[int, int]]
"""The characters where each field of a text begins and ends."""

Filled = tuple[str, Spans]
"""A text whose fields are filled in, and their characters."""


def compile_template(
    template: TemplateSettings,
    demonstrations: Sequence[Demonstration],
    tokenizer: PreTrainedTokenizerFast,
    *,
    virtual: bool,
) -> list[Piece]:
    """Return the pieces of an input, which are tokenized one by one.

    Args:
      template: the experiment's template. One of conversations stands for a single user message.
      demonstrations: solved examples to write before the input.
      tokenizer: the base model's. It supplies the special tokens or the chat template.
      virtual: whether the input contains virtual tokens. They come first unless the
        template places them with `{prompt}`.

    Raises:
      UserError: if the chat template or the tokenizer cannot be used.
    """
    begin: list[int] = []
    end: list[int] = []
    if template.chat or template.messages:  # a chat template writes special tokens as text
        texts = _apply_chat_template(template, demonstrations, tokenizer)
    else:
        solved = [f"{_escape(text)}{_escape(target)}\n\n" for text, target in demonstrations]
        texts = ["".join(solved), template.input]
        begin, end = special_tokens(tokenizer)
    pieces: list[Piece] = [begin]
    for text in texts:
        first, *rest = template_pieces(text)
        if virtual:
            pieces += [first, *(piece for part in rest for piece in (None, part))]
        else:
            pieces.append("".join([first, *rest]))
    if not template.text:  # the text goes on
        pieces.append(end)
    if virtual and None not in pieces:
        pieces.insert(0, None)
    return [piece for piece in pieces if piece not in ("", [])]


def split_opening(
    pieces: Sequence[Piece],
    tokenizer: PreTrainedTokenizerFast,
    virtual_tokens: int,
    *,
    virtual_varies: bool,
) -> tuple[list[int], list[Piece]]:
    """Split an input after the pieces that are the same in every row.

    Args:
      pieces: as returned by `compile_template`.
      tokenizer: the base model's.
      virtual_tokens: number of virtual tokens.
      virtual_varies: whether they depend on the record.

    Returns:
      The ids of the opening, and the pieces of a row.
    """

    def is_constant(piece: Piece) -> bool:
        if piece is None:
            return not virtual_varies
        return isinstance(piece, list) or not template_fields(piece)

    constant = list(itertools.takewhile(is_constant, pieces))
    while constant and isinstance(constant[-1], list):
        constant.pop()  # special tokens at the end of the opening stay in the rows
    opening: list[int] = []
    for piece in constant:
        if piece is None:
            opening += [~i for i in range(virtual_tokens)]
        elif isinstance(piece, str):
            opening += tokenizer(piece.format(), add_special_tokens=False).input_ids
        else:
            opening += piece
    return opening, list(pieces[len(constant) :])


def fill(template: str, record: Record) -> Filled:
    """Fill in the fields of a template."""
    text = ""
    spans: Spans = []
    for literal, field in _parsed(template):
        text += literal
        if field is not None:
            value = record.text(field)
            spans.append((len(text), len(text) + len(value)))
            text += value
    return text, spans


@functools.lru_cache(64)
def _parsed(template: str) -> list[tuple[str, str | None]]:
    """Return the texts of a template, each with the field after it."""
    parts = Formatter().parse(template)
    return [(literal, field and field_name(field)) for literal, field, _, _ in parts]


def check_names(template: TemplateSettings, records: Sequence[Record]) -> None:
    """Reject records with fields that the template may mean, but does not name.

    Raises:
      UserError: if `{prompt}` may mean a field, or a record without a template is no pair of
        `prompt` and `completion`.
    """
    marked = "{prompt}" in template.input and "prompt" not in template_fields(template.input)
    is_default = "input" not in template.model_fields_set
    for record in records:
        fields = record.fields
        if marked and "prompt" in fields:
            raise UserError(
                f"{record.where}: {{prompt}} in template.input marks the place of the soft "
                f"prompt; write {PROMPT_FIELD} for the field 'prompt'"
            )
        if is_default and ("prompt" not in fields or "messages" in fields):
            raise UserError(
                f"{record.where}: without a template, a record has the fields 'prompt' and "
                f"'completion', and no 'messages' (its fields: {', '.join(map(str, fields))}); "
                "set template.input, template.messages or template.text"
            )


def label_of(template: TemplateSettings, verbalizer: Mapping[str, str], record: Record) -> str:
    """Return the label of a record.

    Raises:
      UserError: if the field is missing, or its value is not in the verbalizer.
    """
    label = record.text(_label_field(template.target))
    if label not in verbalizer:
        raise UserError(
            f"{record.where}: label {label!r} is not in the verbalizer "
            f"(labels: {', '.join(verbalizer)})"
        )
    return label


@functools.lru_cache(64)
def _label_field(target: str) -> str:
    """Return the only field of a target."""
    (field,) = template_fields(target)
    return field


def label_texts(template: TemplateSettings, verbalizer: Mapping[str, str]) -> dict[str, str]:
    """Return the target of each label."""
    (field,) = template_fields(template.target)
    return {label: filled_in(template.target, {field: t}) for label, t in verbalizer.items()}


def label_ids(
    template: TemplateSettings,
    verbalizer: Mapping[str, str],
    tokenizer: PreTrainedTokenizerFast,
    where: str,
) -> list[list[int]]:
    """Return the ids of the target of each label.

    Raises:
      UserError: beginning with `where`, if a target has no tokens.
    """
    texts = list(label_texts(template, verbalizer).values())
    encoded = encode_texts(tokenizer, texts)
    for text, encoding in zip(texts, encoded, strict=True):
        if not encoding.ids:
            raise UserError(f"{where}: the target {text!r} has no tokens")
    return [encoding.ids for encoding in encoded]


def draw_demonstrations(
    template: TemplateSettings,
    verbalizer: Mapping[str, str] | None,
    records: Sequence[Record],
    count: int,
    seed: int,
) -> list[Demonstration]:
    """Draw `count` records without replacement and return their inputs and targets.

    Raises:
      UserError: if there are fewer records, or one of those drawn lacks a field.
    """
    if count > len(records):
        raise UserError(f"shots: {count}, but there are only {len(records)} training records")
    drawn = np.random.default_rng(seed).choice(len(records), count, replace=False)
    return [_demonstrate(template, verbalizer, records[int(i)]) for i in drawn]


def _demonstrate(
    template: TemplateSettings, verbalizer: Mapping[str, str] | None, record: Record
) -> Demonstration:
    text = fill("".join(template_pieces(template.input)), record)[0]
    if not verbalizer:
        return text, fill(template.target, record)[0]
    return text, label_texts(template, verbalizer)[label_of(template, verbalizer, record)]


def _apply_chat_template(
    template: TemplateSettings,
    demonstrations: Sequence[Demonstration],
    tokenizer: PreTrainedTokenizerFast,
) -> list[str]:
    """Return the chat as two templates: what comes before the input, and the rest."""
    contents = [] if template.system is None else [template.system]
    roles = [] if template.system is None else ["system"]
    for demonstration in demonstrations:
        contents += map(_escape, demonstration)
        roles += ["user", "assistant"]
    contents.append(template.input)
    roles.append("user")
    # A private-use character takes the place of each message, because chat templates may trim or
    # otherwise change ordinary text.
    marks = [chr(0xF0000 + i) for i in range(len(contents))]
    messages = [{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)]
    try:
        with contextlib.closing(ChatRenderer(tokenizer)) as renderer:
            text = _escape(renderer.render(messages))
    except UserError as error:
        raise UserError(f"template.chat: {error}") from None
    if any(text.count(mark) != 1 for mark in marks):
        raise UserError(
            "template.chat: the base model's chat template leaves out or repeats a message"
        )
    before, _, after = text.rpartition(marks[-1])
    for mark, content in zip(marks[:-1], contents[:-1], strict=True):
        before = before.replace(mark, content)
    return [before, template.input + after]


def _escape(text: str) -> str:
    """Escape braces: return a template without fields whose text is this text."""
    return text.replace("{", "{{").replace("}", "}}")


def end_of_text(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the end-of-text token.

    Raises:
      UserError: if there is none.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the base model's tokenizer has no end-of-text token for free text")
    return tokenizer.eos_token_id


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer adds before and after every text."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    raise UserError("the base model's tokenizer changes texts when it adds special tokens")
