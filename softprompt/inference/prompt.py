"""A trained prompt: the folder it is saved in, and its use.

`prompt/` holds the learned array alone (Orbax), apart from the base model, and
`prompt.json`, which says what it belongs to.
"""

import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.backbones.loading import Base, Prefix, load_base
from softprompt.config import Compute, Experiment, Template, template_fields
from softprompt.data.batches import evaluation_batches
from softprompt.data.examples import Task, say_truncated
from softprompt.data.records import Record
from softprompt.errors import UserError
from softprompt.evaluation.evaluate import make_prefix, score
from softprompt.inference.generate import greedy
from softprompt.methods.soft_prompt import SoftPrompt
from softprompt.training.checkpoint import load_arrays, load_description, save_arrays

_FILE = "prompt.json"
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The likeliest label, and the probability of each, the labels given."""

    label: str
    probabilities: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class TrainedPrompt:
    """A soft prompt on its base model, ready for use.

    Attributes:
      base: the frozen model.
      method: the module with the learned vectors.
      prefix: what the vectors become: keys and values, computed once.
      task: template, verbalizer and limits it was trained with.
      description: what `prompt.json` says.
    """

    base: Base
    method: SoftPrompt
    prefix: Prefix
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
        if isinstance(inputs, str):
            raise UserError("classify takes a list of texts, not one text")
        records = [self.record(text, f"input {i}") for i, text in enumerate(inputs, 1)]
        return self.classify_records(records, batch_size)

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
        for numbers, scores in score(self.base.backbone, self.prefix, examples, batch_size):
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
        records = [self.record(text, f"input {i}") for i, text in enumerate(inputs, 1)]
        room = arch.context_length - self.prefix.length
        if not self.task.encoder_decoder:
            room -= max_new_tokens
        if room < 1 or max_new_tokens < 1:
            raise UserError(
                f"max_new_tokens {max_new_tokens}: the base model has room for "
                f"{arch.context_length} tokens, {self.prefix.length} of them virtual"
            )
        task = dataclasses.replace(self.task, max_tokens=min(self.task.max_tokens, room))
        examples = [
            dataclasses.replace(task.example(record, with_answer=False), candidates=[])
            for record in records
        ]
        say_truncated(examples, task, "inputs")
        texts = [""] * len(examples)
        for batch, numbers in evaluation_batches(
            examples, batch_size, encoder_decoder=task.encoder_decoder
        ):
            written = greedy(
                self.base.backbone,
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


def make_task(base: Base, template: Template, verbalizer: Any, length: int) -> Task:
    """The task of an experiment, for a prompt of `length` virtual tokens on a base model."""
    room = base.backbone.arch.context_length - length
    if room < 2 or (template.max_tokens or 0) > room:
        asked = f" and template.max_tokens {template.max_tokens}" if template.max_tokens else ""
        raise UserError(
            f"base {base.name!r} has a context of {base.backbone.arch.context_length} tokens, "
            f"too short for prompt.length {length}{asked}"
        )
    return Task(
        template,
        verbalizer,
        base.tokenizer,
        base.backbone.arch.vocab_size,
        template.max_tokens or room,
        base.backbone.is_encoder_decoder,
    )


def save_prompt(
    folder: Path,
    method: SoftPrompt,
    experiment: Experiment,
    base: Base,
    step: int,
    metrics: Mapping[str, float],
) -> None:
    """Save the artifact, replacing an older one.

    The vectors are saved as the first layer reads them: behind the factor by which some
    models (Gemma, Granite) scale embeddings, which `embedding_scale` tells.

    Args:
      folder: the folder to make.
      method: the module whose vectors are saved.
      experiment, base: what it was trained by and on.
      step, metrics: when, and how good it was on the validation data.
    """
    vectors = method.vectors[...]
    description = {
        "format": _FORMAT,
        "method": experiment.method,
        "length": vectors.shape[0],
        "hidden_size": vectors.shape[1],
        "base": {
            "name": base.name,
            "fingerprint": base.fingerprint,
            "compute": experiment.compute.model_dump(exclude={"attention"}),
        },
        "embedding_scale": getattr(base.backbone.arch, "embedding_scale", 1.0),
        "template": experiment.template.model_dump(),
        "verbalizer": experiment.verbalizer,
        "experiment": experiment.name,
        "step": step,
        "validation": dict(metrics),
        "versions": {p: importlib.metadata.version(p) for p in ("softprompt", "jax", "flax")},
    }
    save_arrays(folder, {"vectors": vectors}, description, _FILE)


def prompt_folder(path: Path) -> Path:
    """The artifact's folder, from its own path or that of its run."""
    if (path / _FILE).exists() or not (path / "config.yaml").exists():
        folder = path
    else:
        folder = path / "prompt"
    if not folder.is_dir():
        raise UserError(f"{path}: no trained prompt there")
    return folder


def read_description(folder: Path) -> dict[str, Any]:
    """What `prompt.json` says, once all files of the artifact have been checked."""
    description = load_description(folder, _FILE)
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise UserError(f"{folder / _FILE}: of a format that this version does not read")
    return description


def load_prompt(path: str | Path, base: Base | str | None = None) -> TrainedPrompt:
    """Load a trained prompt for use.

    Args:
      path: a run's folder, or its `prompt/`.
      base: the base model or its name; by default the one the prompt names, held and run
        as in training.

    Raises:
      UserError: if a file of it is damaged, or it was trained on another base model.
    """
    folder = prompt_folder(Path(path))
    description = read_description(folder)
    try:
        name, fingerprint = description["base"]["name"], description["base"]["fingerprint"]
        compute = Compute(**description["base"]["compute"])
        template, verbalizer = Template(**description["template"]), description["verbalizer"]
        shape = length, _ = (description["length"], description["hidden_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / _FILE}: malformed ({str(error).splitlines()[0]})") from error
    if not isinstance(base, Base):
        base = load_base(base or name, **compute.model_dump())
    if base.fingerprint != fingerprint:
        raise UserError(
            f"{folder}: trained on the base model {name!r} ({fingerprint[:12]}), "
            f"not on {base.name!r} ({base.fingerprint[:12]})"
        )
    like = {"vectors": jax.ShapeDtypeStruct(shape, jnp.float32)}
    method = SoftPrompt(load_arrays(folder, like)["vectors"])
    task = make_task(base, template, verbalizer, length)
    return TrainedPrompt(base, method, make_prefix(method, base.backbone), task, description)
