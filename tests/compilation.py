"""How tests compile programs, in pytest and in the processes that tests start."""

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import jax
from jax._src import lru_cache

_CACHE = str(Path(__file__).parent.parent / ".pytest_cache" / "compiled")
_FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def compile_quickly() -> None:
    """Compile with few optimizations, and share compiled programs between processes.

    Tests run each program only briefly, so they spend most of their time compiling. Without
    optimizations and with XLA's older fusion emitters, programs compile four times as fast.
    Call this before anything is compiled.
    """
    # Processes that tests start compile in the same way. They read the shared programs, but do not
    # store any, because JAX itself does not store a program in one step.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1e9"
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
    jax.config.update("jax_compilation_cache_dir", _CACHE)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_disable_most_optimizations", True)
    if _FLAGS not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
    lru_cache.LRUCache.put = _put
    # Tracing makes many small objects that live long. Scan them less often.
    gc.freeze()
    gc.set_threshold(200_000, 50, 1000)


@contextlib.contextmanager
def compiled_programs() -> Iterator[list[str]]:
    """Yield a list that grows with each program that is compiled in this context."""
    compiled: list[str] = []

    def listen(event, *_, **__):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + 3)(1.0)
        assert compiled
        compiled.clear()
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _put(self: lru_cache.LRUCache, key: str, value: bytes) -> None:
    """Store a program so that no process reads half a file, even if its writer is killed."""
    path = Path(str(self.path)) / f"{key}-cache"
    temporary = path.with_name(f"{key}.{os.getpid()}")
    temporary.write_bytes(value)
    temporary.replace(path)
