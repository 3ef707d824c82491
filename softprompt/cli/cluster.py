"""Working together with processes on other hosts: how a process joins them, and how it ends."""

import atexit
import contextlib
import ctypes
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from softprompt.errors import Stopped, UserError, reason_of

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_START_SECONDS = 60  # all processes must start within this time
_HEARTBEAT_SECONDS = 30  # a process that is silent for longer counts as lost
_END_SECONDS = 30  # a process that ends waits this long for the others
_REPORT_SECONDS = 20  # a process with an error waits this long for process 0 to report one
_ERROR = "softprompt/error"  # the key under which process 0 stores its error message


@contextlib.contextmanager
def cluster() -> Iterator[bool]:
    """Join the cluster that this process was started in, if there is one.

    JAX detects Slurm, Open MPI, GKE and Cloud TPU. Elsewhere, the environment variables
    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` describe the cluster. Call
    this before any computation. With a single process, it has no effect.

    Yields:
      Whether this process shows results, messages and progress. Only one process of a cluster does.

    Raises:
      UserError: if the variables are incomplete or wrong, or another process was lost.
    """
    arguments = _arguments()
    if arguments is None:
        yield True
        return
    import jax

    output = _Output()
    output.line_at_abort = (
        f"the processes did not all connect within {_START_SECONDS} seconds; start the command on "
        f"all hosts at the same time, and check that process 0 can be reached at "
        f"{arguments.get('coordinator_address', 'its address')}"
    )
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=_START_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_END_SECONDS,
        )
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"the cluster cannot be joined: {reason_of(error)}") from None
    process, count = jax.process_index(), jax.process_count()
    lost = (
        f"process {process} of {count}: another process ended or was lost; its own messages may "
        "say why; start the same command on all hosts again to resume"
    )
    output.line_at_abort = lost
    atexit.register(_leave, output)
    log = logging.getLogger("softprompt")
    if process:
        log.setLevel(logging.CRITICAL)
    log.info(f"{count} processes with {jax.device_count()} devices in all")
    try:
        yield process == 0
    except Stopped as stopped:
        if process:
            sys.exit(128 + stopped.number)
        raise
    except UserError as error:
        if _is_reported(error, process):
            sys.exit(1)
        raise
    except jax.errors.JaxRuntimeError as error:
        if not any(sign in str(error) for sign in ("Gloo", "UNAVAILABLE", "ABORTED")):
            raise
        raise UserError(lost) from None


def _arguments() -> dict[str, Any] | None:
    """Return the arguments of `jax.distributed.initialize`; None for a single process."""
    given = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    if len(given) == len(_VARIABLES):
        address, count, process = given.values()
        if not address.rpartition(":")[2].isdecimal() or ":" not in address:
            raise UserError(f"{_VARIABLES[0]}={address}: not an address such as 10.0.0.1:1234")
        for name in _VARIABLES[1:]:
            if not given[name].isdecimal():
                raise UserError(f"{name}={given[name]}: not a whole number")
        if int(process) >= int(count):
            raise UserError(f"JAX_PROCESS_ID={process}: must be from 0 to {int(count) - 1}")
        if int(count) == 1:
            return None
        return {
            "coordinator_address": address,
            "num_processes": int(count),
            "process_id": int(process),
            "cluster_detection_method": "deactivate",
        }
    if _is_detected():
        return {}
    if given:
        missing = " and ".join(name for name in _VARIABLES if name not in given)
        raise UserError(
            f"{next(iter(given))} is set, but not {missing}; set all three on every host"
        )
    return None


def _is_detected() -> bool:
    """Return whether JAX detects a cluster with several processes."""
    from jax._src import clusters  # there is no public function that only detects

    # In an interactive shell, the job has many tasks and the step of the shell has one.
    if os.environ.get("SLURM_STEP_NUM_TASKS") == "1":
        return False
    kinds = (
        clusters.OmpiCluster,
        clusters.SlurmCluster,
        clusters.GkeTpuCluster,
        clusters.GceTpuCluster,
    )
    found = next((kind for kind in kinds if kind.is_env_present()), None)
    return found is not None and found.get_process_count() > 1


def _is_reported(error: UserError, process: int) -> bool:
    """Return whether process 0 prints an error, so that this process need not."""
    import jax
    from jax._src import distributed  # the store of keys and values is not public

    client: Any = distributed.global_state.client
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        if process == 0:
            client.key_value_set(_ERROR, str(error))
        else:
            client.blocking_key_value_get(_ERROR, _REPORT_SECONDS * 1000)
            return True
    return False


def _leave(output: "_Output") -> None:
    """Wait briefly for the other processes. If one is lost now, nothing more is printed."""
    import jax

    output.line_at_abort = ""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        jax.distributed.shutdown()


class _Output:
    """Hides what C++ libraries print, and prints one line if they abort the process.

    When a process is lost, JAX aborts the others and prints pages. Gloo, which connects CPUs,
    prints to standard output, where only results belong. Python prints as before.

    Attributes:
      line_at_abort: the line for an abort by `jax.distributed`.
    """

    def __init__(self) -> None:
        self.line_at_abort = ""
        self._errors = os.dup(2)
        self._hidden = tempfile.TemporaryFile()  # noqa: SIM115 (for the whole life of the process)
        sys.stdout = os.fdopen(os.dup(1), "w", errors="backslashreplace")
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
        for descriptor in (1, 2):
            os.dup2(self._hidden.fileno(), descriptor)
        # Python's own handlers run in the main thread, which an abort never reaches.
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._end)
        ctypes.CDLL(None).signal(signal.SIGABRT, self._handler)

    def _end(self, number: int) -> None:
        self._hidden.seek(0)
        text = self._hidden.read()
        if b"JAX distributed service" in text:
            text = f"{self.line_at_abort}\n".encode() if self.line_at_abort else b""
        os.write(self._errors, text)
        os._exit(1)
