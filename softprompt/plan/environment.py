"""The environment of a process that makes a plan. This module imports no JAX."""

import os

_ENVIRONMENT = {
    # Nothing runs on an accelerator, and a plan must not take one from a program that uses it.
    "JAX_PLATFORMS": "cpu",
    # Without these, libtpu asks the network what machine this is, and prints that it failed.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
_NO_AUTOTUNING = "--xla_gpu_autotune_level=0"  # it would run kernels on the card


def prepare_environment() -> None:
    """Set environment variables for the compilers. To be called before JAX is imported."""
    os.environ.update(_ENVIRONMENT)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_NO_AUTOTUNING}".strip()
