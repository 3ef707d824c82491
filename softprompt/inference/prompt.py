"""A trained prompt in use: label texts, generate, measure perplexity."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
from jax.sharding import Mesh

from softprompt.backbones.loading import Backbone, Base, Prefix, load_base
from softprompt.data.datasets import log_truncated
from softprompt.data.records import Record
from softprompt.data.task import Input, Task
from softprompt.errors import UserError
from softprompt.evaluation.scoring import calibrated_scores, prepare_model, score
from softprompt.experiment.schema import GenerationSettings, ScoringSettings
from softprompt.experiment.templates import template_fields
from softprompt.generation.engine import Engine, Generated, Request, requests_of
from softprompt.methods.method import Method
from softprompt.methods.saved import SavedPrompt, describe, text_task
from softprompt.runtime.bars import bars_in_notebooks
from softprompt.runtime.progress import Progress


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The predicted label of an input.

    Attributes:
      label: the most probable label.
      probabilities: of every label; they sum to 1.

    Examples:
      >>> prediction = load_prompt("runs/sentiment").classify(["A joy from start to end."])[0]
      >>> prediction.label
      'positive'
      >>> list(prediction.probabilities)
      ['positive', 'negative']
    """

    label: str
    probabilities: Mapping[str, float]


@dataclasses.dataclass(frozen=True, repr=False)
class TrainedPrompt:
    """A trained method on its base model, ready for use. `load_prompt` returns one.

    Attributes:
      base: the base model.
      method: the module that holds the learned arrays.
      backbone: the backbone to run, as returned by the method.
      prefix: the prefix that all rows share, computed once; None if there is none.
      task: the template, verbalizer and limits of training.
      description: the content of `prompt.json`.
      scoring: how the prompt labels inputs.
      generation: how the prompt generates text, unless a call changes it.

    Examples:
      >>> prompt = load_prompt("runs/sentiment")
      >>> prompt.classify(["A dull, lifeless film."])[0].label
      'negative'
    """

    base: Base
    method: Method
    backbone: Backbone
    prefix: Prefix | None
    task: Task
    description: Mapping[str, Any]
    scoring: ScoringSettings = dataclasses.field(default_factory=ScoringSettings)
    generation: GenerationSettings = dataclasses.field(default_factory=GenerationSettings)

    @classmethod
    def from_method(
        cls,
        method: Method,
        base: Base,
        task: Task | None = None,
        *,
        backbone: Backbone | None = None,
    ) -> "TrainedPrompt":
        """Use a method that is not saved, such as a `SoftPrompt` from a training loop of your own.

        Args:
          method: the trained method. Its arrays are used as they are now.
          base: the base model.
          task: template and verbalizer; by default free text after `{text}`. The task's
            opening replaces the method's.
          backbone: the backbone after training; by default the frozen backbone of the base model.
            Only full fine-tuning changes it.
        """
        method = method.folded()
        task = task or text_task(method, base)
        arrays = method.arrays(backbone or base.backbone)
        description = describe(method, arrays, base, task)
        method = type(method).load(arrays, description, task.opening)
        backbone, prefix = prepare_model(method, method.restore(base.backbone, arrays))
        return cls(base, method, backbone, prefix, task, description)

    def __repr__(self) -> str:
        what = f"labels {', '.join(self.task.labels)}" if self.task.labels else "free text"
        return f"TrainedPrompt({self.method!r}, base {self.base.name!r}, {what})"

    @property
    def is_prefix(self) -> bool:
        """Whether the prefix holds everything learned, so that the frozen backbone can run it."""
        return self.method.is_pure_prefix and None not in self.task.pieces

    def classify(self, inputs: Sequence[Input], batch_size: int = 32) -> list[Prediction]:
        """Predict the label of each input.

        Args:
          inputs: texts, or fields by name if the template has more than one.
          batch_size: the number of inputs per batch.

        Returns:
          One prediction per input, in order.

        Raises:
          UserError: if the prompt has no labels, or an input is empty or lacks a field.
        """
        records, labels = self._records(inputs), self.task.labels
        if not labels:
            raise UserError("this prompt was trained on free text and has no labels")
        if not records:
            return []
        examples = list(self.task.examples(records, with_answer=False))
        log_truncated(sum(e.truncated for e in examples), self.task, "inputs")
        scores = np.empty((len(examples), len(labels)), np.float32)
        model = self.backbone, self.prefix
        for numbers, part in score(*model, examples, batch_size):
            scores[numbers] = part
        scores = calibrated_scores(scores, examples, *model, self.task, self.scoring)
        return predictions(scores, labels)

    def _records(self, inputs: Sequence[Input]) -> list[Record]:
        if isinstance(inputs, str | Mapping | Record):
            raise UserError("give a list of inputs, not one")
        return [self.record(text, f"input {i}") for i, text in enumerate(inputs, 1)]

    def record(self, text: Input, where: str) -> Record:
        """Return an input as a record. A bare text fills the only field of the template.

        Args:
          text: the input.
          where: names the input in error messages.
        """
        return self.task.record(text, where)

    def perplexity(
        self,
        inputs: Sequence[Input],
        targets: Sequence[str],
        batch_size: int = 32,
    ) -> list[float]:
        """Return the perplexity of each target, given its input.

        Args:
          inputs: as for `classify`.
          targets: for each input, the text of the field in `template.target`, or the answer to a
            conversation.
          batch_size: the number of pairs per batch.

        Returns:
          exp of the mean negative log-likelihood per token, at least 1. As in training, the
          end-of-text token is the last token of a target.

        Raises:
          UserError: if a text is empty, the prompt was trained on labels or plain text, or
            `template.target` has more than one field.
        """
        fields = template_fields(self.task.template.target)
        if self.task.labels or len(fields) > 1 or self.task.template.text:
            raise UserError("perplexity needs free text, and template.target must have one field")
        if len(inputs) != len(targets):
            raise UserError(f"{len(inputs)} inputs and {len(targets)} targets: give one for each")
        if not inputs:
            return []
        pairs = [
            self.task.with_target(record, target)
            for record, target in zip(self._records(inputs), targets, strict=True)
        ]
        examples = [
            dataclasses.replace(example, earlier=()) for example in self.task.examples(pairs)
        ]
        log_truncated(sum(e.truncated for e in examples), self.task, "inputs")
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
        progress: Progress = bars_in_notebooks,
        **settings: Any,
    ) -> list[Generated]:
        """Generate text after each input.

        Args:
          inputs: texts, or fields by name if the template has more than one. An input that
            leaves too few tokens of the context window for the new text is truncated, as in
            training.
          batch_size: the number of texts per batch; fewer if the device has too little memory.
          progress: shows how many texts are done.
          settings: replace those that the prompt was trained with: see `GenerationSettings`.

        Returns:
          One result per input, in order.

        Raises:
          UserError: if an input is empty or lacks a field, or the context window is too short.
        """
        how = self.stopping(changed(self.generation, settings))
        engine = Engine(self.backbone, self.base.tokenizer, how)
        requests = self.requests(self._records(inputs), how)
        return engine.generate(requests, batch_size, progress=progress)

    def stream(self, text: Input, **settings: Any) -> Iterator[str]:
        """Generate text after one input, and yield its pieces as soon as they are final."""
        how = self.stopping(changed(self.generation, settings))
        (request,) = self.requests(self._records([text]), how)
        return Engine(self.backbone, self.base.tokenizer, how).stream(request)

    def stopping(self, settings: GenerationSettings) -> GenerationSettings:
        """Return settings that also stop at the end of an answer; see `Task.stopping`."""
        return self.task.stopping(settings, trained=self.method.trainable is not False)

    def requests(self, records: Sequence[Record], settings: GenerationSettings) -> list[Request]:
        """Return records as requests to an `Engine`."""
        return requests_of(records, self.task, self.prefix, settings)


def predictions(scores: np.ndarray, labels: Sequence[str]) -> list[Prediction]:
    """Return the predicted labels for scores in nats, `[N, C]`."""
    # Not `jax.nn.softmax`, which compiles six programs when it is first called.
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return [
        Prediction(labels[row.argmax()], dict(zip(labels, row.tolist(), strict=True)))
        for row in probabilities
    ]


def changed(settings: GenerationSettings, changes: Mapping[str, Any]) -> GenerationSettings:
    """Return generation settings with some of them changed.

    Raises:
      UserError: if a setting does not exist, or settings contradict each other.
    """
    kept = settings.model_dump()
    if (
        "temperature" in changes and not changes["temperature"]
    ):  # greedy: drop what needs a temperature
        kept |= dict.fromkeys(("top_k", "top_p", "min_p"))
    try:
        return GenerationSettings(**kept | dict(changes))
    except pydantic.ValidationError as errors:
        raise UserError("; ".join(map(_explained, errors.errors()))) from None


def _explained(error: Any) -> str:
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"{name}: unknown setting (known: {', '.join(GenerationSettings.model_fields)})"
    message = error["msg"].removeprefix("Value error, ")
    return f"{name}: {message}, not {error['input']!r}" if name else message


def load_prompt(
    path: str | Path, base: Base | str | None = None, *, mesh: Mesh | None = None
) -> TrainedPrompt:
    """Load a trained prompt, ready for use.

    Args:
      path: the folder of a run, or of a saved prompt.
      base: the base model or its name. By default the one that the prompt names, with the
        `dtype` and `quantize` of training.
      mesh: the devices that the base model is divided over, see `make_mesh`; None for one device.
        A `Base` already has its mesh.

    Raises:
      UserError: if a file is damaged, or the prompt was trained on another base model.

    Examples:
      >>> prompt = load_prompt("runs/sentiment")
      >>> prompt.task.labels
      ['positive', 'negative']
    """
    saved = SavedPrompt.read(Path(path))
    content = saved.content
    if not isinstance(base, Base):
        stored = content.base
        settings = stored.compute.model_dump(exclude={"mesh"})
        base = load_base(base or stored.name, **settings, mesh=mesh)
    elif mesh is not None:
        raise UserError("mesh: the base model is loaded already; give the mesh to load_base")
    task = saved.task(base)
    method, arrays = saved.method(base, task.opening)
    backbone, prefix = prepare_model(method, method.restore(base.backbone, arrays))
    return TrainedPrompt(
        base, method, backbone, prefix, task, saved.description, content.scoring, content.generation
    )
