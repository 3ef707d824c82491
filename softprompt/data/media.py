"""Columns of images, audio and other files in a dataset of the `datasets` package."""

import logging
from collections.abc import Mapping
from typing import Any

from softprompt.errors import UserError

_log = logging.getLogger(__name__)


def without_media(rows: Any, source: str) -> Any:
    """Return a dataset without its columns of images, audio and other files.

    Reading such a value would open a file at a path that the dataset chooses.

    Args:
      rows: a `datasets.Dataset`.
      source: names the dataset in messages.

    Raises:
      UserError: if there are no other columns.
    """
    media = [name for name, feature in rows.features.items() if _holds_files(feature)]
    if not media:
        return rows
    names = ", ".join(map(repr, media))
    if len(media) == len(rows.features):
        raise UserError(f"{source}: has only images, audio or other files, in {names}")
    _log.info(f"{source}: left out {names}: images, audio and other files are not read")
    return rows.remove_columns(media)


def _holds_files(feature: Any) -> bool:
    """Return whether values are files, or contain files in lists or mappings."""
    if isinstance(feature, Mapping):
        return any(map(_holds_files, feature.values()))
    if isinstance(feature, list | tuple):
        return any(map(_holds_files, feature))
    inner = getattr(feature, "feature", None)  # of a list
    # Features that can hold the path of a file can also embed its content.
    return hasattr(feature, "embed_storage") or (inner is not None and _holds_files(inner))
