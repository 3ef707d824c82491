"""The folder `prompt/`: what a method learned, saved apart from the base model.

It holds the learned arrays (Orbax) and `prompt.json`, which describes them and their base model.
"""

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from softprompt.backbones.loading import Backbone, Base
from softprompt.data.task import Task, make_task
from softprompt.errors import UserError
from softprompt.experiment.methods import method_class
from softprompt.experiment.schema import (
    ComputeSettings,
    GenerationSettings,
    ScoringSettings,
    TemplateSettings,
)
from softprompt.methods.method import Method
from softprompt.storage.arrays import load_arrays, load_description, save_arrays

_FILE = "prompt.json"
_FORMAT = 2


def save_prompt(
    folder: Path | str,
    method: Method,
    base: Base,
    task: Task | None = None,
    *,
    backbone: Backbone | None = None,
    experiment: str = "",
    step: int = 0,
    validation: Mapping[str, float] | None = None,
    scoring: ScoringSettings | None = None,
    generation: GenerationSettings | None = None,
) -> None:
    """Save what a method learned. Replaces a prompt that is already in the folder.

    Args:
      folder: the folder to write.
      method: the trained method.
      base: the base model.
      task: what it was trained for; by default `text_task`, free text after `{text}`.
      backbone: the backbone after training; by default the frozen backbone of the base model. Only
        full fine-tuning changes it.
      experiment: the name of the experiment.
      step: the number of training steps.
      validation: metrics on the validation data, by name.
      scoring: how the prompt labels inputs; by default the default settings.
      generation: how the prompt generates text; by default the default settings.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    method = method.folded()
    arrays = method.arrays(backbone or base.backbone)
    description = describe(
        method,
        arrays,
        base,
        task or text_task(method, base),
        experiment=experiment,
        step=step,
        validation=validation,
        scoring=scoring,
        generation=generation,
    )
    save_arrays(folder, arrays, description, _FILE)


def describe(
    method: Method,
    arrays: Mapping[str, jax.Array],
    base: Base,
    task: Task,
    *,
    experiment: str = "",
    step: int = 0,
    validation: Mapping[str, float] | None = None,
    scoring: ScoringSettings | None = None,
    generation: GenerationSettings | None = None,
) -> dict[str, Any]:
    """Return the content of `prompt.json`.

    Vectors are saved as the first layer reads them, that is, after the factor by which some
    models (Gemma, Granite) scale embeddings. `embedding_scale` is that factor.

    Args:
      method: a folded method.
      arrays: its arrays, as returned by `Method.arrays`.
      base: see `save_prompt`, as for all other arguments.
    """
    return {
        "format": _FORMAT,
        "method": method.name,
        "virtual_tokens": task.virtual_tokens,
        **method.description(arrays),
        "base": {
            "name": base.name,
            "fingerprint": base.fingerprint,
            "compute": base.compute.model_dump(exclude={"attention"}),
        },
        "embedding_scale": base.backbone.embedding.scale,
        "template": task.template.model_dump(),
        "verbalizer": task.verbalizer,
        "demonstrations": task.demonstrations,
        "tasks": task.tasks,
        "task_field": task.task_field,
        "experiment": experiment,
        "step": step,
        "validation": dict(validation or {}),
        "scoring": (scoring or ScoringSettings()).model_dump(),
        "generation": (generation or GenerationSettings()).model_dump(),
        "versions": {p: importlib.metadata.version(p) for p in ("softprompt", "jax", "flax")},
    }


def text_task(method: Method, base: Base) -> Task:
    """Return the task of free text after an input `{text}`, for a method without one."""
    arrays = method.folded().arrays(base.backbone)
    shapes = {name: array.shape for name, array in arrays.items()}
    virtual, before = method.saved_virtual_tokens(shapes)
    template = TemplateSettings(input="{text}")
    return make_task(base, template, None, virtual_tokens=virtual, prefix_length=before)


@dataclasses.dataclass(frozen=True)
class SavedPrompt:
    """The validated content of `prompt.json`.

    Attributes:
      folder: the folder that it is in.
      description: the whole content.
      base_name: the name of the base model.
      fingerprint: the fingerprint of the base model.
      compute: how the base model was held and run in training.
      template: the template of the experiment.
      scoring: how the prompt labels inputs.
      generation: how the prompt generates text.
    """

    folder: Path
    description: Mapping[str, Any]
    base_name: str
    fingerprint: str
    compute: ComputeSettings
    template: TemplateSettings
    scoring: ScoringSettings
    generation: GenerationSettings

    @classmethod
    def read(cls, path: Path) -> "SavedPrompt":
        """Read a prompt's description, and check all its files for damage.

        Args:
          path: the folder of a run, or of the prompt itself.

        Raises:
          UserError: if a file is damaged or malformed, or has the format of another version.
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
        """Return the task that the prompt was trained for."""
        description = self.description
        try:
            method = method_class(description["method"])
            _, before = method.saved_virtual_tokens(description.get("arrays", {}))
            return make_task(
                base,
                self.template,
                description["verbalizer"],
                [(text, target) for text, target in description["demonstrations"]],
                virtual_tokens=description["virtual_tokens"],
                prefix_length=before,
                tasks=description["tasks"],
                task_field=description["task_field"],
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise self._malformed(self.folder, error) from error

    def method(self, base: Base, opening: Any) -> tuple[Method, dict[str, jax.Array]]:
        """Return the trained method, and its arrays by name.

        Args:
          base: the base model.
          opening: the opening of the task.

        Raises:
          UserError: if the prompt was trained on another base model.
        """
        if base.fingerprint != self.fingerprint:
            raise UserError(
                f"{self.folder}: trained on the base model {self.base_name!r} "
                f"({self.fingerprint[:12]}), not on {base.name!r} ({base.fingerprint[:12]})"
            )
        try:
            method = method_class(self.description["method"])
            arrays = load_arrays(self.folder, method.saved_form(self.description, base.backbone))
            return method.load(arrays, self.description, opening), arrays
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._malformed(self.folder, error) from error

    @staticmethod
    def _malformed(folder: Path, error: Exception) -> UserError:
        return UserError(f"{folder / _FILE}: malformed ({str(error).splitlines()[0]})")


def read_description(folder: Path) -> dict[str, Any]:
    """Return the content of `prompt.json`, after checking all files of the folder for damage."""
    description = load_description(folder, _FILE)
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise UserError(f"{folder / _FILE}: has a format that this version cannot read")
    return description


def _folder(path: Path) -> Path:
    """Return the folder of a prompt, given that folder or the folder of its run."""
    if (path / _FILE).exists() or not (path / "config.yaml").exists():
        folder = path
    else:
        folder = path / "prompt"
    if not folder.is_dir():
        raise UserError(f"{path}: contains no trained prompt")
    return folder
