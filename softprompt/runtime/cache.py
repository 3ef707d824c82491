"""The folder for files that can be made again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder `softprompt` in `$XDG_CACHE_HOME`, or in `~/.cache` without it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "softprompt"
