"""The cache of compiled programs on disk."""

import functools
import logging
import os
from pathlib import Path

import jax

from softprompt.runtime.cache import cache_folder

_log = logging.getLogger(__name__)


def use_compilation_cache() -> None:
    """Keep compiled programs on disk, so that the next process need not compile them again.

    The folder is `softprompt/jax` in `$XDG_CACHE_HOME`, or in `~/.cache` without that variable.
    Programs that compile in less than 0.2 seconds are not stored. If the folder cannot be written,
    there is no cache, and a warning says so.

    If a folder is already configured, by the environment variable `JAX_COMPILATION_CACHE_DIR` or
    by `jax.config`, it stays as it is. An empty `JAX_COMPILATION_CACHE_DIR` turns the cache off.
    `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS` overrides the 0.2 seconds.
    """
    configured = jax.config.values["jax_compilation_cache_dir"] is not None
    if configured or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = cache_folder() / "jax"
    if not _is_usable(folder):
        return
    # JAX opens the cache when it compiles the first program for which a folder is configured.
    # Programs compiled before this call therefore do not prevent its use.
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@functools.cache  # so that it warns once
def _is_usable(folder: Path) -> bool:
    """Create a folder, and return whether files can be written there. Warn if they cannot.

    JAX would warn about every program that it cannot store.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK | os.X_OK) else "Permission denied"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason is not None:
        _log.warning(
            f"{folder}: cannot be written ({reason}), so compiled programs are not kept for the "
            "next start; set XDG_CACHE_HOME to a folder that can be written"
        )
    return reason is None
