"""Plugins of JAX that are installed for their compilers alone."""

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

_GOOGLE = "0x1ae0"  # the vendor of TPUs on the PCI bus
_CUDA = "jax_plugins.xla_cuda12"


class _Ignored(ModuleType):
    """Takes the place of a plugin that JAX would initialize."""

    asked = False  # whether JAX has asked all plugins to initialize

    def initialize(self) -> None:
        self.asked = True


def ignore_compilers() -> None:
    """Keep JAX on the CPU if its plugins for TPUs and NVIDIA GPUs have nothing to run on.

    `softprompt plan` needs the plugins to compile for hardware that is not here. Without this
    function, all other commands would try to use them, print errors, and only then use the CPU.
    To be called before JAX is imported. It has no effect if a TPU or an NVIDIA GPU is here, if
    another plugin is installed, or if `JAX_PLATFORMS` is set.
    """
    plugins = _installed_plugins()
    has_compiler = _CUDA in plugins or importlib.util.find_spec("libtpu") is not None
    if not has_compiler or plugins - {_CUDA} or _has_nvidia() or _has_tpu():
        return
    if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
        sys.modules[_CUDA] = _Ignored(_CUDA)


def load_cuda() -> None:
    """Load the plugin for NVIDIA GPUs if `ignore_compilers` made JAX ignore it."""
    ignored = sys.modules.get(_CUDA)
    if isinstance(ignored, _Ignored):
        del sys.modules[_CUDA]
        if ignored.asked and _CUDA in _installed_plugins():
            importlib.import_module(_CUDA).initialize()


def _installed_plugins() -> set[str]:
    package = importlib.util.find_spec("jax_plugins")
    folders = (package.submodule_search_locations if package else None) or []
    names = {path.name for folder in folders for path in Path(folder).iterdir() if path.is_dir()}
    return {f"jax_plugins.{name}" for name in names if name.isidentifier()} - {
        "jax_plugins.__pycache__"
    }


def _has_nvidia() -> bool:
    # In the Windows Subsystem for Linux, the card has another device file.
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def _has_tpu() -> bool:
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(vendor.read_text().strip() == _GOOGLE for vendor in vendors)
