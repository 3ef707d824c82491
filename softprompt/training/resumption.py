"""Choosing the checkpoint from which a stopped run resumes."""

import dataclasses
from pathlib import Path
from typing import Any

import pydantic

from softprompt.data.examples import same_data
from softprompt.errors import FolderError
from softprompt.storage.arrays import DamagedError
from softprompt.storage.checkpoints import Checkpoints
from softprompt.training.preparation import Prepared
from softprompt.training.reporting import log_message
from softprompt.training.state import RunState

_RUN_STATE = pydantic.TypeAdapter(RunState)


def newest_usable(
    checkpoints: Checkpoints,
    folder: Path,
    began: RunState,
    prepared: Prepared,
    saved_prompt: int,
    name: str,
) -> dict[str, Any] | None:
    """Return the run state in the newest intact checkpoint whose best prompt can be loaded.

    Args:
      checkpoints: the checkpoints of the run.
      folder: the run folder.
      began: the state with which the run would begin now.
      prepared: the experiment as it was prepared now.
      saved_prompt: the step of the prompt in the run folder; -1 if there is none.
      name: text before log messages; empty for none.

    Returns:
      None if no checkpoint can be used.

    Raises:
      FolderError: if a checkpoint belongs to another base model, other data, another teacher, or
        an optimizer with another state.
    """
    found = dict(checkpoints.read_descriptions())
    intact = {}
    for step, description in found.items():
        if isinstance(description, DamagedError):
            log_message(name, f"{description}; not using this checkpoint")
            continue
        try:
            intact[step] = _RUN_STATE.validate_python(description)
        except pydantic.ValidationError:
            log_message(name, f"checkpoint {step}: made by another version; not using it")
    best_prompts = {0, *intact, saved_prompt}
    for run in intact.values():
        if changed := _changed(run, began, prepared):
            raise FolderError(
                f"{folder}: its {changed} has changed since the run began; restore it, or choose "
                "another folder"
            )
        if run.best_step in best_prompts:
            return dataclasses.asdict(run)
    if found:
        log_message(name, "no checkpoint can be used: starting from the beginning")
    return None


def _changed(run: RunState, began: RunState, prepared: Prepared) -> str | None:
    """Name the difference between the run of a checkpoint and the run as it would begin now."""
    if run.base != began.base:
        return "base model"
    if run.optimizer.get("state") != began.optimizer.get("state"):
        return "optimizer"
    if not same_data(run.examples, prepared.examples):
        return "data"
    if run.objective and run.objective != began.objective:
        return "teacher" if prepared.teacher_digest else "data"
    return None
