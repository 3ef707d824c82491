"""What a method learned, in use."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pydantic

from softprompt.backbones.loading import Backbone, Base, Prefix, load_base
from softprompt.data.records import Record
from softprompt.data.task import Task, log_truncated
from softprompt.errors import UserError
from softprompt.evaluation.scoring import calibrated_scores, prepare_model, score
from softprompt.experiment.schema import GenerationSettings, ScoringSettings
from softprompt.experiment.templates import template_fields
from softprompt.generation.engine import Engine, Generated, Request, requests_of
from softprompt.methods.method import Method
from softprompt.methods.saved import SavedPrompt
from softprompt.runtime.progress import Progress, silent

Input = str | Mapping[str, Any] | Record  # a text, or fields by name where there are several


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
      scoring, generation: how it labels and writes, if nothing else is said.
    """

    base: Base
    method: Method
    backbone: Backbone
    prefix: Prefix | None
    task: Task
    description: Mapping[str, Any]
    scoring: ScoringSettings = dataclasses.field(default_factory=ScoringSettings)
    generation: GenerationSettings = dataclasses.field(default_factory=GenerationSettings)

    @property
    def is_prefix(self) -> bool:
        """Whether all that was learned is in the prefix, which the frozen model itself reads."""
        return self.method.is_pure_prefix and None not in self.task.pieces

    def classify(self, inputs: Sequence[Input], batch_size: int = 32) -> list[Prediction]:
        """Label texts.

        Args:
          inputs: texts, or fields by name where the template has more than one.
          batch_size: texts at a time.

        Raises:
          UserError: if the prompt has no labels, or an input is empty or lacks a field.
        """
        records, labels = self._records(inputs), self.task.labels
        if not labels:
            raise UserError("this prompt was trained on free text and has no labels")
        if not records:
            return []
        examples = [self.task.example(record, with_answer=False) for record in records]
        log_truncated(examples, self.task, "inputs")
        scores = np.empty((len(examples), len(labels)), np.float32)
        model = self.backbone, self.prefix
        for numbers, part in score(*model, examples, batch_size):
            scores[numbers] = part
        scores = calibrated_scores(scores, examples, *model, self.task, self.scoring)
        probabilities = np.asarray(jax.nn.softmax(jnp.asarray(scores), axis=-1))
        return [
            Prediction(labels[row.argmax()], dict(zip(labels, row.tolist(), strict=True)))
            for row in probabilities
        ]

    def _records(self, inputs: Sequence[Input]) -> list[Record]:
        if isinstance(inputs, str | Mapping | Record):
            raise UserError("give a list of inputs, not one")
        return [self.record(text, f"input {i}") for i, text in enumerate(inputs, 1)]

    def record(self, text: Input, where: str) -> Record:
        """An input as a record; a bare text is the one field of the template."""
        if isinstance(text, Record):
            return text
        if isinstance(text, Mapping):
            return Record(text, where)
        if not isinstance(text, str):
            raise UserError(f"{where}: neither a text nor fields by name")
        fields = template_fields(self.task.template.input)
        if len(fields) > 1:
            raise UserError(f"{where}: give its fields by name ({', '.join(fields)})")
        return Record({fields[0]: text}, where)

    def perplexity(
        self,
        inputs: Sequence[Input],
        targets: Sequence[str],
        batch_size: int = 32,
    ) -> list[float]:
        """How unlikely the model finds each target behind its input.

        Args:
          inputs: as for `classify`.
          targets: for each the text of the field of the template's target.
          batch_size: pairs at a time.

        Returns:
          e to the power of the mean negative log-likelihood per token, at least 1. The
          end-of-text token closes a target, as in training.

        Raises:
          UserError: if a text is empty, the prompt was trained on labels, or the template's
            target has more than one field.
        """
        fields = template_fields(self.task.template.target)
        if self.task.labels or len(fields) > 1:
            raise UserError("perplexity is of free text, of which the target has one field")
        if len(inputs) != len(targets):
            raise UserError(f"{len(inputs)} inputs and {len(targets)} targets: give one for each")
        if not inputs:
            return []
        examples = [
            self.task.example(Record({**record.fields, fields[0]: target}, record.where))
            for record, target in zip(self._records(inputs), targets, strict=True)
        ]
        log_truncated(examples, self.task, "inputs")
        perplexities = np.empty(len(examples))
        for numbers, scores in score(self.backbone, self.prefix, examples, batch_size):
            tokens = [len(examples[i].candidates[0]) for i in numbers]
            perplexities[numbers] = np.exp(-scores[:, 0] / tokens)
        return perplexities.tolist()

    def generate(
        self,
        inputs: Sequence[Input],
        batch_size: int = 32,
        *,
        progress: Progress = silent,
        **settings: Any,
    ) -> list[Generated]:
        """What the model writes behind each input.

        Args:
          inputs: texts, or fields by name where the template has more than one. One that
            leaves no room for the new tokens is cut as in training.
          batch_size: texts at a time; fewer if the device has no memory for as many.
          progress: shows how many texts are done.
          settings: instead of those that the prompt was trained with: see
            `GenerationSettings`.

        Raises:
          UserError: if an input is empty or lacks a field, or the model has no such room.
        """
        how = changed(self.generation, settings)
        engine = Engine(self.backbone, self.base.tokenizer, how)
        requests = self.requests(self._records(inputs), how)
        return engine.generate(requests, batch_size, progress=progress)

    def stream(self, text: Input, **settings: Any) -> Iterator[str]:
        """Pieces of what the model writes behind an input, as they are written."""
        how = changed(self.generation, settings)
        (request,) = self.requests(self._records([text]), how)
        return Engine(self.backbone, self.base.tokenizer, how).stream(request)

    def requests(self, records: Sequence[Record], settings: GenerationSettings) -> list[Request]:
        """Records as what a `Engine` writes behind."""
        return requests_of(records, self.task, self.prefix, settings)


def changed(settings: GenerationSettings, changes: Mapping[str, Any]) -> GenerationSettings:
    """The settings with some of them changed.

    Raises:
      UserError: if there are no such settings, or they do not fit.
    """
    kept = settings.model_dump()
    if "temperature" in changes and not changes["temperature"]:  # and what is only for draws
        kept |= dict.fromkeys(("top_k", "top_p", "min_p"))
    try:
        return GenerationSettings(**kept | dict(changes))
    except pydantic.ValidationError as errors:
        raise UserError("; ".join(map(_explained, errors.errors()))) from None


def _explained(error: Any) -> str:
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"{name}: no setting of generation ({', '.join(GenerationSettings.model_fields)})"
    message = error["msg"].removeprefix("Value error, ")
    return f"{name}: {message}, not {error['input']!r}" if name else message


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
        base = load_base(base or saved.base_name, **saved.compute.model_dump())
    task = saved.task(base)
    method, arrays = saved.method(base, task.opening)
    backbone, prefix = prepare_model(method, method.restore(base.backbone, arrays))
    return TrainedPrompt(
        base, method, backbone, prefix, task, saved.description, saved.scoring, saved.generation
    )
