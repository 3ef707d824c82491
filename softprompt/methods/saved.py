"""The folder `prompt/`: what a method learned, saved apart from the base model.

It holds the learned arrays (Orbax) and `prompt.json`, which describes them and their base model.
"""

import dataclasses
import importlib.metadata
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from softprompt.backbones.loading import Backbone, Base
from softprompt.backbones.quantization import parameter_count
from softprompt.data.task import Task, make_task
from softprompt.errors import UserError
from softprompt.experiment.methods import method_class
from softprompt.experiment.schema import GenerationSettings, ScoringSettings, TemplateSettings
from softprompt.files.json_files import checked
from softprompt.files.reading import MEBIBYTE
from softprompt.methods.method import Method
from softprompt.methods.prompt_file import PromptFile
from softprompt.parallel.sharding import with_shardings
from softprompt.storage.arrays import digest_of_files, load_arrays, load_description, save_arrays

_FILE = "prompt.json"
_FORMAT = 2
_LARGEST_FILE = 4 * MEBIBYTE  # its texts are tokenized, which takes seconds for a mebibyte
_ALWAYS_ALLOWED = 2**26  # learned values of a prompt, however small its base model is


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

    Examples:
      >>> base = load_base("smollm2-135m-instruct")
      >>> prompt = SoftPrompt.from_vocabulary(base, 10, jax.random.key(0))
      >>> save_prompt("prompts/start", prompt, base, step=0)
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
            "compute": base.compute.model_dump(exclude={"attention", "mesh"}),
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
    """A saved prompt whose `prompt.json` is valid.

    Attributes:
      folder: the folder that it is in.
      description: the whole content of `prompt.json`.
      content: the part that all methods share.
    """

    folder: Path
    description: Mapping[str, Any]
    content: PromptFile

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
        return cls(folder, description, PromptFile.model_validate(description))

    def task(self, base: Base) -> Task:
        """Return the task that the prompt was trained for.

        Raises:
          UserError: if the prompt does not fit the base model.
        """
        content = self.content
        self._saved_form(base)
        virtual, before = self._class.saved_virtual_tokens(content.arrays)
        described = content.virtual_tokens * max(len(content.tasks), 1)
        if virtual != described:
            raise UserError(
                f"{self.folder / _FILE}: virtual_tokens: there are {virtual} in the arrays, not "
                f"{described}"
            )
        return make_task(
            base,
            content.template,
            content.verbalizer,
            [(text, target) for text, target in content.demonstrations],
            virtual_tokens=content.virtual_tokens,
            prefix_length=before,
            tasks=content.tasks,
            task_field=content.task_field,
        )

    def method(self, base: Base, opening: Any) -> tuple[Method, dict[str, jax.Array]]:
        """Return the trained method, and its arrays by name.

        Args:
          base: the base model.
          opening: the opening of the task.

        Raises:
          UserError: if the prompt was trained on another base model.
        """
        trained_on = self.content.base
        if base.fingerprint != trained_on.fingerprint:
            raise UserError(
                f"{self.folder}: trained on the base model {trained_on.name!r} "
                f"({trained_on.fingerprint[:12]}), not on {base.name!r} ({base.fingerprint[:12]})"
            )
        form = with_shardings(self._saved_form(base), base.backbone.mesh)
        arrays = load_arrays(self.folder, form)
        return self._class.load(arrays, self.description, opening), arrays

    @property
    def digest(self) -> str:
        """SHA-256 of the checksums of `prompt.json` and of the learned arrays."""
        return digest_of_files(self.folder)

    @property
    def _class(self) -> type[Method]:
        return method_class(self.content.method)

    def _saved_form(self, base: Base) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes and types of the arrays, after checking them against the base model.

        The arrays are not loaded yet: files of a few bytes can describe arrays of any size.
        """
        try:
            form = self._class.saved_form(self.description, base.backbone)
        except ValueError as error:
            raise UserError(f"{self.folder / _FILE}: {error}") from None
        values = sum(math.prod(array.shape) for array in form.values())
        limit = max(_ALWAYS_ALLOWED, parameter_count(nnx.state(base.backbone, nnx.Param)))
        if values > limit:
            raise UserError(
                f"{self.folder / _FILE}: arrays: {values} values, more than the base model has"
            )
        return form


def read_description(folder: Path) -> dict[str, Any]:
    """Return the content of `prompt.json`, after checking it and all files of the folder.

    Raises:
      UserError: if a file is damaged or malformed, or has the format of another version.
    """
    description = load_description(folder, _FILE, _LARGEST_FILE)
    if description.get("format") != _FORMAT:
        raise UserError(f"{folder / _FILE}: has a format that this version cannot read")
    checked(PromptFile, description, str(folder / _FILE))
    return description


def _folder(path: Path) -> Path:
    """Return the folder of a prompt, given that folder or the folder of its run."""
    # `Path.exists` would raise an error if the name is too long.
    if os.path.exists(path / _FILE) or not os.path.exists(path / "config.yaml"):
        folder = path
    else:
        folder = path / "prompt"
    if not os.path.isdir(folder):
        raise UserError(f"{path}: contains no trained prompt")
    return folder
