"""What a method learned, as a folder: saved, described and read again.

`prompt/` holds the learned arrays alone (Orbax), apart from the base model, and
`prompt.json`, which says what they belong to.
"""

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from softprompt.backbones.loading import Backbone, Base
from softprompt.data.task import Task, make_task
from softprompt.errors import UserError
from softprompt.experiment.schema import (
    ComputeSettings,
    Experiment,
    GenerationSettings,
    ScoringSettings,
    TemplateSettings,
)
from softprompt.methods.lora import LoRA
from softprompt.methods.making import method_of
from softprompt.methods.method import FullFineTuning, Method, parameters_of
from softprompt.storage.arrays import load_arrays, load_description, save_arrays

_FILE = "prompt.json"
_FORMAT = 2


def save_prompt(
    folder: Path,
    method: Method,
    backbone: Backbone,
    name: str,
    base: Base,
    task: Task,
    about: Mapping[str, Any],
) -> None:
    """Save what a method learned, replacing what was there.

    Vectors are saved as the first layer reads them: behind the factor by which some
    models (Gemma, Granite) scale embeddings, which `embedding_scale` tells.

    Args:
      folder: the folder to make.
      method: a folded method.
      backbone: the one it was trained on.
      name: the method's name in an experiment.
      base, task: what it was trained for.
      about: `experiment`, `step`, `validation`: where it comes from, and how good it is; and
        `usage`.
    """
    arrays = method.arrays(backbone)
    description = {
        "format": _FORMAT,
        "method": name,
        "virtual_tokens": task.virtual_tokens,
        "arrays": {key: list(array.shape) for key, array in arrays.items()},
        "base": {
            "name": base.name,
            "fingerprint": base.fingerprint,
            "compute": base.compute.model_dump(exclude={"attention"}),
        },
        "embedding_scale": backbone.embedding.scale,
        "template": task.template.model_dump(),
        "verbalizer": task.verbalizer,
        "demonstrations": task.demonstrations,
        "tasks": task.tasks,
        "task_field": task.task_field,
        **about,
        "versions": {p: importlib.metadata.version(p) for p in ("softprompt", "jax", "flax")},
    }
    if isinstance(method, FullFineTuning):
        del description["arrays"]  # they are the base model's
    if isinstance(method, LoRA):
        description["scales"] = dict(method.scales)
    save_arrays(folder, arrays, description, _FILE)


def usage(experiment: Experiment) -> dict[str, Any]:
    """What an experiment says of how a prompt labels and writes."""
    return experiment.model_dump(include={"scoring", "generation"})


@dataclasses.dataclass(frozen=True)
class SavedPrompt:
    """What `prompt.json` says, checked for its form.

    Attributes:
      folder: where it is.
      description: all of it.
      name, fingerprint: of the base model.
      compute: how that was held and run in training.
      template, scoring, generation: the experiment's.
    """

    folder: Path
    description: Mapping[str, Any]
    name: str
    fingerprint: str
    compute: ComputeSettings
    template: TemplateSettings
    scoring: ScoringSettings
    generation: GenerationSettings

    @classmethod
    def read(cls, path: Path) -> "SavedPrompt":
        """From a run's folder, or that of the prompt; every file is checked for damage.

        Raises:
          UserError: if it is damaged or malformed, or of another version's format.
        """
        folder = _folder(path)
        description = read_description(folder)
        try:
            base = description["base"]
            return cls(
                folder,
                description,
                base["name"],
                base["fingerprint"],
                ComputeSettings(**base["compute"]),
                TemplateSettings(**description["template"]),
                ScoringSettings(**description.get("scoring", {})),
                GenerationSettings(**description.get("generation", {})),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise cls._malformed(folder, error) from error

    def task(self, base: Base) -> Task:
        """The task it was trained for."""
        description = self.description
        try:
            shapes = description.get("arrays", {})
            return make_task(
                base,
                self.template,
                description["verbalizer"],
                [(text, target) for text, target in description["demonstrations"]],
                virtual_tokens=description["virtual_tokens"],
                prefix_length=shapes["keys"][1] if description["method"] == "prefix" else 0,
                tasks=description["tasks"],
                task_field=description["task_field"],
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise self._malformed(self.folder, error) from error

    def method(self, base: Base, opening: Any) -> tuple[Method, dict[str, jax.Array]]:
        """The method and its arrays.

        Raises:
          UserError: if it was trained on another base model.
        """
        if base.fingerprint != self.fingerprint:
            raise UserError(
                f"{self.folder}: trained on the base model {self.name!r} "
                f"({self.fingerprint[:12]}), not on {base.name!r} ({base.fingerprint[:12]})"
            )
        try:
            name = self.description["method"]
            if name == "full":
                like: dict[str, Any] = dict(parameters_of(base.backbone))
            else:
                shapes = self.description["arrays"].items()
                like = {key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in shapes}
            arrays = load_arrays(self.folder, like)
            return method_of(name, arrays, self.description.get("scales", {}), opening), arrays
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._malformed(self.folder, error) from error

    @staticmethod
    def _malformed(folder: Path, error: Exception) -> UserError:
        return UserError(f"{folder / _FILE}: malformed ({str(error).splitlines()[0]})")


def read_description(folder: Path) -> dict[str, Any]:
    """What `prompt.json` says, once all files of the folder have been checked."""
    description = load_description(folder, _FILE)
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise UserError(f"{folder / _FILE}: of a format that this version does not read")
    return description


def _folder(path: Path) -> Path:
    """The prompt's folder, from its own path or that of its run."""
    if (path / _FILE).exists() or not (path / "config.yaml").exists():
        folder = path
    else:
        folder = path / "prompt"
    if not folder.is_dir():
        raise UserError(f"{path}: no trained prompt there")
    return folder
