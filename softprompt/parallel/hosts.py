"""The processes of a run on several hosts. Process 0, the main one, alone writes files.

With one process, the functions here do nothing.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_main() -> bool:
    """Return whether this process writes the files and the console."""
    return jax.process_index() == 0


def text_of_main(text: str) -> str:
    """Return the text that the main process passes. All processes call this together."""
    if jax.process_count() == 1:
        return text
    content = np.frombuffer(text.encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    content = np.resize(content, length) if is_main() else np.zeros(length, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(content)).tobytes().decode()


def wait_for_all(name: str) -> None:
    """Wait until all processes have called this with the same name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
