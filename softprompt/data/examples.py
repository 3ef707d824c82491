"""From records to examples: templates filled in and turned into token ids."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from string import Formatter

import numpy as np
from transformers import PreTrainedTokenizerFast

from softprompt.config import Template, template_fields
from softprompt.console import Bar, say
from softprompt.data.records import Record
from softprompt.errors import UserError


@dataclasses.dataclass(frozen=True)
class Example:
    """One input and its possible continuations, as token ids.

    Attributes:
      input: ids of what the model reads, at least one.
      candidates: ids of each continuation: one for each label, or the one target.
      answer: which candidate is the right one; None if that is not known.
      where: the place of its record.
      truncated: whether the input was cut.
    """

    input: Sequence[int]
    candidates: Sequence[Sequence[int]]
    answer: int | None
    where: str
    truncated: bool


@dataclasses.dataclass(frozen=True)
class Task:
    """What turns a record into an example: template, verbalizer, tokenizer and limit.

    Attributes:
      template: the experiment's.
      verbalizer: label -> text, or None for free text, whose target the end-of-text
        token closes.
      tokenizer: the base model's.
      vocab_size: tokens that the base model has embeddings of.
      max_tokens: most tokens of an input and its longest candidate together, or each if
        `encoder_decoder`, whose model reads them apart.
    """

    template: Template
    verbalizer: Mapping[str, str] | None
    tokenizer: PreTrainedTokenizerFast
    vocab_size: int
    max_tokens: int
    encoder_decoder: bool

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
        answer: int | None = None
        if self.verbalizer:
            (field,) = template_fields(self.template.target)
            if with_answer:
                label = record.text(field)
                if label not in self.verbalizer:
                    raise UserError(
                        f"{record.where}: label {label!r} is not in the verbalizer "
                        f"(labels: {', '.join(self.labels)})"
                    )
                answer = self.labels.index(label)
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
        room = self.max_tokens - (0 if self.encoder_decoder else longest)
        tokens, truncated = self._input(record, room)
        for token in {token for ids in (tokens, *candidates) for token in ids}:
            if token >= self.vocab_size:
                text = self.tokenizer.convert_ids_to_tokens(token)
                raise UserError(f"{record.where}: the base model has no embedding of {text!r}")
        return Example(tokens, candidates, answer, record.where, truncated)

    def _candidate(self, text: str, record: Record) -> list[int]:
        tokens = self.tokenizer(text, add_special_tokens=False).input_ids
        if not self.verbalizer:
            if self.tokenizer.eos_token_id is None:
                raise UserError("the base model's tokenizer has no end-of-text token for free text")
            tokens = [*tokens, self.tokenizer.eos_token_id]
        if not tokens:
            raise UserError(f"{record.where}: the target {text!r} has no tokens")
        return tokens

    def _input(self, record: Record, room: int) -> tuple[list[int], bool]:
        text, spans = _fill(self.template.input, record)
        encoded = self.tokenizer(text, return_offsets_mapping=True)
        tokens, excess = encoded.input_ids, len(encoded.input_ids) - room
        if excess <= 0:
            return tokens, False
        begin, end = max(spans, key=lambda span: span[1] - span[0])
        starts, ends = np.array(encoded.offset_mapping).T
        (inside,) = np.nonzero((starts >= begin) & (ends <= end) & (ends > starts))
        if len(inside) <= excess:
            raise UserError(
                f"{record.where}: {len(tokens)} tokens, {excess} too many, and its longest field "
                f"has only {len(inside)}; shorten the template or raise template.max_tokens"
            )
        return np.delete(tokens, inside[-excess:]).tolist(), True


def make_examples(task: Task, records: Sequence[Record], split: str) -> list[Example]:
    """An example of every record, under a progress bar; says how many were cut."""
    examples = []
    with Bar(f"tokenise {split}", len(records), "examples") as bar:
        for record in records:
            examples.append(task.example(record))
            bar.advance()
    say(f"{split}: {len(examples)} examples")
    say_truncated(examples, task, split)
    return examples


def examples_digest(splits: Mapping[str, Sequence[Example]]) -> str:
    """SHA-256 of all that training and evaluation read of the examples."""
    digest = hashlib.sha256()
    for split, examples in splits.items():
        for example in examples:
            content = [
                split,
                list(example.input),
                list(map(list, example.candidates)),
                example.answer,
            ]
            digest.update(json.dumps(content).encode())
    return digest.hexdigest()


def say_truncated(examples: Sequence[Example], task: Task, split: str) -> None:
    """Say how many inputs were cut, if any were."""
    if cut := sum(example.truncated for example in examples):
        say(f"{split}: {cut} cut to {task.max_tokens} tokens, at the end of their longest field")


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
