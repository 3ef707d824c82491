"""The cache of compiled programs on disk."""

import os

import jax

from softprompt.runtime.cache import cache_folder


def use_compilation_cache() -> None:
    """Keep compiled programs on disk, so that the next process need not compile them again.

    The folder is `softprompt/jax` in `$XDG_CACHE_HOME`, or in `~/.cache` without that variable.
    Programs that compile in less than 0.2 seconds are not stored.

    If a folder is already configured, by the environment variable `JAX_COMPILATION_CACHE_DIR` or
    by `jax.config`, it stays as it is. An empty `JAX_COMPILATION_CACHE_DIR` turns the cache off.
    `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS` overrides the 0.2 seconds.
    """
    configured = jax.config.values["jax_compilation_cache_dir"] is not None
    if configured or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    # JAX opens the cache when it compiles the first program for which a folder is configured.
    # Programs compiled before this call therefore do not prevent its use.
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "jax"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
