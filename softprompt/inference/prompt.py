"""What a method learned, in use."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.backbones.loading import Backbone, Base, Prefix, load_base
from softprompt.data.batches import evaluation_batches
from softprompt.data.examples import say_truncated
from softprompt.data.records import Record
from softprompt.data.task import Task
from softprompt.errors import UserError
from softprompt.templates import template_fields
from softprompt.evaluation.evaluate import make_prefix, score
from softprompt.inference.generate import greedy
from softprompt.inference.saved import SavedPrompt
from softprompt.methods.method import FullFineTuning, Method, with_parameters


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The likeliest label, and the probability of each, the labels given."""

    label: str
    probabilities: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class TrainedPrompt:
    """What a method learned, on its base model and ready for use.

    Attributes:
      base: the frozen model.
      method: the module with what was learned.
      backbone, prefix: what it says to run; the prefix is computed once.
      task: template, verbalizer and limits it was trained with.
      description: what `prompt.json` says.
    """

    base: Base
    method: Method
    backbone: Backbone
    prefix: Prefix | None
    task: Task
    description: Mapping[str, Any]

    def classify(
        self, inputs: Sequence[str | Mapping[str, Any]], batch_size: int = 32
    ) -> list[Prediction]:
        """Label texts.

        Args:
          inputs: texts, or fields by name where the template has more than one.
          batch_size: texts at a time.

        Raises:
          UserError: if the prompt has no labels, or an input is empty or lacks a field.
        """
        return self.classify_records(self._records(inputs), batch_size)

    def _records(self, inputs: Sequence[str | Mapping[str, Any]]) -> list[Record]:
        if isinstance(inputs, str | Mapping):
            raise UserError("give a list of inputs, not one")
        return [self.record(text, f"input {i}") for i, text in enumerate(inputs, 1)]

    def record(self, text: str | Mapping[str, Any], where: str) -> Record:
        """An input as a record; a bare text is the one field of the template."""
        if isinstance(text, Mapping):
            return Record(text, where)
        if not isinstance(text, str):
            raise UserError(f"{where}: neither a text nor fields by name")
        fields = template_fields(self.task.template.input)
        if len(fields) > 1:
            raise UserError(f"{where}: give its fields by name ({', '.join(fields)})")
        return Record({fields[0]: text}, where)

    def classify_records(self, records: Sequence[Record], batch_size: int) -> list[Prediction]:
        """As `classify`, of records."""
        labels = self.task.labels
        if not labels:
            raise UserError("this prompt was trained on free text and has no labels")
        if not records:
            return []
        examples = [self.task.example(record, with_answer=False) for record in records]
        say_truncated(examples, self.task, "inputs")
        probabilities = np.empty((len(examples), len(labels)))
        for numbers, scores in score(self.backbone, self.prefix, examples, batch_size):
            probabilities[numbers] = jax.nn.softmax(jnp.asarray(scores), axis=-1)
        return [
            Prediction(labels[row.argmax()], dict(zip(labels, row.tolist(), strict=True)))
            for row in probabilities
        ]

    def generate(
        self,
        inputs: Sequence[str | Mapping[str, Any]],
        max_new_tokens: int = 64,
        batch_size: int = 32,
    ) -> list[str]:
        """What the model writes behind each input, token by likeliest token.

        Args:
          inputs: texts, or fields by name where the template has more than one. One that
            leaves no room for the new tokens is cut as in training.
          max_new_tokens: where to stop if the end-of-text token does not come before.
          batch_size: texts at a time.

        Raises:
          UserError: if an input is empty or lacks a field, or the model has no such room.
        """
        arch, end = self.base.backbone.arch, self.base.tokenizer.eos_token_id
        if end is None:
            raise UserError("the base model's tokenizer has no end-of-text token to stop at")
        records = self._records(inputs)
        virtual = self.prefix.length if self.prefix else 0
        room = arch.context_length - virtual
        if not self.base.backbone.is_encoder_decoder:
            room -= max_new_tokens
        if room < 1 or max_new_tokens < 1:
            raise UserError(
                f"max_new_tokens {max_new_tokens}: the base model has room for "
                f"{arch.context_length} tokens, {virtual} of which stand in front of every input"
            )
        task = dataclasses.replace(self.task, max_tokens=min(self.task.max_tokens, room))
        examples = [
            dataclasses.replace(task.example(record, with_answer=False), candidates=[])
            for record in records
        ]
        say_truncated(examples, task, "inputs")
        texts = [""] * len(examples)
        for batch, numbers in evaluation_batches(
            examples, batch_size, encoder_decoder=self.base.backbone.is_encoder_decoder
        ):
            written = greedy(
                self.backbone,
                self.prefix,
                batch.tokens,
                batch.lengths,
                end,
                count=max_new_tokens,
            )
            for number, ids in zip(numbers, np.asarray(written), strict=False):
                stop = np.append(np.flatnonzero(ids == end), len(ids))[0]
                texts[number] = str(self.base.tokenizer.decode(ids[:stop]))
        return texts


def load_prompt(path: str | Path, base: Base | str | None = None) -> TrainedPrompt:
    """Load what a method learned, ready for use.

    Args:
      path: a run's folder, or its `prompt/`.
      base: the base model or its name; by default the one the prompt names, held and run
        as in training.

    Raises:
      UserError: if a file of it is damaged, or it was trained on another base model.
    """
    saved = SavedPrompt.read(Path(path))
    if not isinstance(base, Base):
        base = load_base(base or saved.name, **saved.compute.model_dump())
    task = saved.task(base)
    method, arrays = saved.method(base, task.opening)
    trained_on = base.backbone
    if isinstance(method, FullFineTuning):
        trained_on = with_parameters(trained_on, arrays)
    backbone = method.adapt(trained_on)
    prefix = make_prefix(method, backbone)
    return TrainedPrompt(base, method, backbone, prefix, task, saved.description)
