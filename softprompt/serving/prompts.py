"""The prompts that a server offers by name."""

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from softprompt.backbones.loading import Base
from softprompt.data.task import Task, make_task
from softprompt.errors import UserError
from softprompt.experiment.schema import GenerationSettings, ScoringSettings, TemplateSettings
from softprompt.methods.method import Method
from softprompt.methods.saved import SavedPrompt
from softprompt.methods.zero_shot import ZeroShot
from softprompt.serving.reading import Reading, content_of
from softprompt.serving.scheduler import Removed, Scheduler
from softprompt.serving.scorer import require_scorable

Kind = Literal["own", "raw", "chat"]
"""Which template a request uses: the prompt's own, none, or the chat template of the base."""

_CONVERSATION = TemplateSettings(messages="messages")
_TEXT = TemplateSettings(input="{text}")


class ServedPrompt:
    """A prompt, or the base model alone, with the templates that requests use.

    Args:
      name: the name of the model in requests.
      root: the name of the folder that it was loaded from, or of the base model.
      base: the base model.
      scheduler: puts prefixes into the bank.
      task: the prompt's own template.
      load: makes the method for the opening of a task.
      virtual_tokens: how many virtual tokens a template places, and how many come before them.
      generation: the default generation settings of requests.
      scoring: how labels are scored.

    Attributes:
      candidates: the ids of each label.
      bias: the scores of the labels for a text without content, `[C]`; None without calibration.

    Raises:
      UserError: if the prompt cannot share the base model with others, or the bank is full.
    """

    def __init__(
        self,
        name: str,
        root: str,
        base: Base,
        scheduler: Scheduler,
        task: Task,
        load: Callable[[Task], Method],
        virtual_tokens: tuple[int, int] = (0, 0),
        generation: GenerationSettings | None = None,
        scoring: ScoringSettings | None = None,
    ):
        self.name, self.root, self.created = name, root, int(time.time())
        self.task, self.virtual_tokens = task, virtual_tokens
        self.generation = task.stopping(generation or GenerationSettings())
        self.scoring = scoring or ScoringSettings()
        self._base, self._scheduler, self._load = base, scheduler, load
        self._readings: dict[Kind, Reading] = {}
        self._lock = threading.Lock()
        self._closed = False
        try:
            self.candidates, self.bias = self._prepare_labels()
        except BaseException:
            self.close()
            raise

    def _prepare_labels(self) -> tuple[Sequence[Sequence[int]], np.ndarray | None]:
        """Return the ids of the labels, and the scores to subtract from theirs, `[C]`."""
        reading = self.reading("own")
        if not self.task.labels:
            return [], None
        neutral = reading.content_free(self.scoring.calibrate or "N/A")
        require_scorable(neutral.candidates)
        if self.scoring.calibrate is None:
            return neutral.candidates, None
        return neutral.candidates, self._scheduler.score(reading.prefix, [neutral])[0].result()

    def reading(self, kind: Kind) -> Reading:
        """Return the reading for a template. Its prefix is computed at the first use.

        Raises:
          UserError: if the base model has no chat template, or the bank is full.
          Removed: if the prompt has been removed.
        """
        if (reading := self._readings.get(kind)) is not None:
            return reading  # without waiting while another one loads
        with self._lock:
            if self._closed:
                raise Removed
            if kind not in self._readings:
                self._readings[kind] = self._new_reading(kind)
            return self._readings[kind]

    def close(self) -> None:
        """Free the places in the bank."""
        with self._lock:
            self._closed = True
            for reading in self._readings.values():
                reading.close()
                self._scheduler.release(reading.prefix)
            self._readings = {}

    def _new_reading(self, kind: Kind) -> Reading:
        task = self.task
        if kind != "own":
            virtual, before = self.virtual_tokens
            template = _TEXT if kind == "raw" else _CONVERSATION
            task = make_task(
                self._base, template, None, virtual_tokens=virtual, prefix_length=before
            )
        content = content_of(self._load(task), task, self._base)
        prefix = self._scheduler.load(content)
        room = self._scheduler.length - prefix.length
        # As offline, a text is truncated so that the whole answer fits.
        new = 1 if kind == "raw" or task.labels else self.generation.max_new_tokens
        longest = room - max(1, min(new, room // 2))
        task = dataclasses.replace(task, max_tokens=min(task.max_tokens, longest))
        try:
            return Reading(task, prefix)
        except BaseException:
            self._scheduler.release(prefix)
            raise


def require_servable(folder: Path, base: Base) -> None:
    """Require that a prompt can share the base model with others.

    Raises:
      UserError: see `Prompts.load`.
    """
    _, task, method, _ = _read(folder, base)
    try:
        content_of(method, task, base)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def _read(folder: Path, base: Base) -> tuple[SavedPrompt, Task, Method, dict[str, jax.Array]]:
    """Return a saved prompt, its task, its method and its arrays."""
    saved = SavedPrompt.read(folder)
    task = saved.task(base)
    method, arrays = saved.method(base, task.opening)
    return saved, task, method, arrays


class Prompts:
    """The base model and its prompts, by name.

    Args:
      name: the name of the base model in requests.
      base: the base model.
      scheduler: computes prefixes; its thread runs.
    """

    def __init__(self, name: str, base: Base, scheduler: Scheduler):
        self.base_name = name
        self._base, self._scheduler = base, scheduler
        task = make_task(base, _TEXT, None)
        self._served = {
            name: ServedPrompt(
                name, base.name, base, scheduler, task, lambda task: ZeroShot(task.opening)
            )
        }
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close all prompts."""
        for served in self._served.values():
            served.close()
        self._served = {}

    def names(self) -> list[str]:
        """Return the names of the base model and the prompts, the base model first."""
        return list(self._served)

    def get(self, name: str) -> ServedPrompt | None:
        """Return a prompt, or None if there is none with this name."""
        return self._served.get(name)

    def load(self, name: str, folder: Path, root: str | None = None) -> None:
        """Load a prompt. One with the same name is replaced when the new one is ready.

        Args:
          name: its name in requests.
          folder: the folder of a run, or of a saved prompt.
          root: the name of the folder that `/v1/models` shows; by default its own name.

        Raises:
          UserError: see `load_prompt` and `ServedPrompt`, and if the name is the base model's.
        """
        if name == self.base_name:
            raise UserError(f"{name} is the name of the base model; choose another name")
        saved, task, first, arrays = _read(folder, self._base)

        def load(task: Task) -> Method:
            return type(first).load(arrays, saved.description, task.opening)

        content = saved.content
        virtual = type(first).saved_virtual_tokens(content.arrays)
        try:
            served = ServedPrompt(
                name,
                root or folder.resolve().name,
                self._base,
                self._scheduler,
                task,
                load,
                virtual,
                content.generation,
                content.scoring,
            )
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
        with self._lock:
            old = self._served.get(name)
            self._served = {**self._served, name: served}
        if old is not None:
            old.close()

    def remove(self, name: str) -> bool:
        """Remove a prompt. Return whether it existed. Requests that wait for it still run."""
        with self._lock:
            if name == self.base_name or name not in self._served:
                return False
            served = self._served[name]
            self._served = {key: value for key, value in self._served.items() if key != name}
        served.close()
        return True
