"""The `config.json` of a base model, without its weights."""

import contextlib
from pathlib import Path
from typing import Any

from softprompt.backbones.config import architecture_of
from softprompt.backbones.formats.gguf import GGUFFile
from softprompt.backbones.loading import SHORT_NAMES, find_model
from softprompt.errors import UserError, reason_of
from softprompt.experiment.schema import Experiment
from softprompt.files.json_files import read_json
from softprompt.plan.public_models import PUBLIC_MODELS


def read_models(experiment: Experiment) -> tuple[dict[str, Any], list[Any]]:
    """Return the config of an experiment's base model, and the architectures of its models.

    The first architecture belongs to the base model. If the teacher has another base model, its
    architecture comes second.

    Raises:
      UserError: if a model does not exist, or its architecture is not supported.
    """
    names = [experiment.base, *teacher_bases(experiment)]
    configs = [read_config(name) for name in names]
    archs: list[Any] = []
    for name, config in zip(names, configs, strict=True):
        try:
            archs.append(architecture_of(config, ()))
        except UserError as error:
            raise UserError(f"base {name}: {error}") from None
    return configs[0], archs


def teacher_bases(experiment: Experiment) -> list[str]:
    """Return the teacher's base model if it is another one and the step runs it."""
    teacher = experiment.objective.teacher
    return [teacher.base] if teacher and teacher.base and teacher.top_tokens is None else []


def read_config(name: str) -> dict[str, Any]:
    """Return the config of a base model.

    Args:
      name: a name in `PUBLIC_MODELS`, a directory with `config.json`, a GGUF file, a short name,
        or a hub id (only its `config.json` is downloaded).

    Raises:
      UserError: if the model does not exist.
    """
    if name in PUBLIC_MODELS:
        return PUBLIC_MODELS[name]
    if _is_hub_id(name):
        return read_json(_download_config(name))
    try:
        path = find_model(name)
    except UserError as error:
        if name in SHORT_NAMES:
            raise
        raise UserError(f"{error}; models without weights: {', '.join(PUBLIC_MODELS)}") from None
    return read_json(path / "config.json") if path.is_dir() else GGUFFile(path).config


def _is_hub_id(name: str) -> bool:
    is_path = name.startswith((".", "/", "~", "package:")) or Path(name).exists()
    return name.count("/") == 1 and not is_path and not name.endswith(".gguf")


def _download_config(name: str) -> Path:
    import huggingface_hub as hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    file: dict[str, Any] = {"filename": "config.json", "revision": revision or None}
    try:
        with contextlib.suppress(LocalEntryNotFoundError):
            return Path(hub.hf_hub_download(repository, **file, local_files_only=True))
        hub.get_hf_file_metadata(hub.hf_hub_url(repository, **file))  # fails without retries
        return Path(hub.hf_hub_download(repository, **file))
    except Exception as error:  # the HTTP library, which depends on the version, has its own types
        raise UserError(
            f"base {name!r}: not a local path, and its config.json is not available from the hub "
            f"({reason_of(error)})"
        ) from error
