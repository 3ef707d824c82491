"""Atomic writes: a file is either complete or unchanged."""

import os
from pathlib import Path


def write_file(path: Path, text: str) -> None:
    """Replace a file atomically.

    The text is written to a temporary file, flushed to disk and renamed, so that a crash
    leaves either the old content or the new one.
    """
    new = path.with_name(f".{path.name}.new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
