"""Writing: from the parameters of a backbone to the tensors of a model directory."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from softprompt.backbones.formats.names import WHOLE, Names, Stored, module_and_suffix
from softprompt.backbones.loading import Backbone
from softprompt.backbones.quantization import COMPANIONS, dequantize, is_companion, kind_of


def stored_tensors(backbone: Backbone, names: Names) -> Iterator[tuple[str, np.ndarray]]:
    """Convert the parameters of a backbone to tensors, one at a time.

    This is the inverse of `weights.load_weights`. A tied head is left out.

    Args:
      backbone: loaded from a file of any format.
      names: the table for model directories of the family.

    Yields:
      The name and the value of each tensor, with axes in PyTorch's order, in the dtype of the
      parameter, or float32 for quantized kernels.
    """
    parameters = {
        tuple(map(str, path)): variable[...]
        for path, variable in nnx.to_flat_state(nnx.state(backbone, nnx.Param))
    }
    tensors: dict[Stored, dict[int, tuple[str, ...]]] = {}  # the path of each part
    for path in parameters:
        if is_companion(path, parameters):
            continue  # converted together with its kernel
        module, suffix = module_and_suffix(path)
        entry = find_entry(names, module, backbone.arch)
        tensor = dataclasses.replace(entry, name=entry.name + suffix, part=0)
        tensors.setdefault(tensor, {})[entry.part] = path
    for tensor, parts in tensors.items():
        paths = [parts[part] for part in sorted(parts)]
        axes = [axis for axis in ("layer", "expert") if f"{{{axis}}}" in tensor.name]
        for index in np.ndindex(parameters[paths[0]].shape[: len(axes)]):
            arrays = tuple(_slice(parameters, path, index) for path in paths)
            array = tensor.form.join(arrays, backbone.arch)
            numbered = tensor.name.format(**dict(zip(axes, index, strict=True)))
            yield numbered, np.ascontiguousarray(array.T if tensor.transposed else array)


def save_tensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Write a safetensors file with the permissions of an ordinary new file."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, {"format": "pt"})
    path.chmod(mode)


def find_entry(names: Names, module: str, arch: Any) -> Stored:
    """Return the tensor, and the conversion, of a module's parameter.

    Args:
      names: the table of the family.
      module: the path of the module in the backbone.
      arch: the architecture of the backbone.
    """
    entry = names[module]
    if isinstance(entry, Stored):
        return entry
    if isinstance(entry, tuple):  # T5 has different names for gated layers and for others
        entry = entry[0 if arch.gated else 1]
    return Stored(entry, WHOLE)


def _slice(parameters: Any, path: tuple[str, ...], index: tuple[int, ...]) -> np.ndarray:
    """Return the parameter of one layer or expert, with axes in PyTorch's order."""
    if path[-1] != "kernel":
        return np.asarray(parameters[path][index])
    paths = {name: (*path[:-1], name) for name in ("kernel", *COMPANIONS)}
    arrays = {name: parameters[p][index] for name, p in paths.items() if p in parameters}
    kernel = arrays["kernel"]
    return np.asarray(dequantize(arrays, jnp.float32 if kind_of(kernel) else kernel.dtype)).T
