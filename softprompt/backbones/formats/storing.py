"""The parameters of a backbone as the tensors of a model directory: the inverse of `weights.py`."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from softprompt.backbones.formats.names import WHOLE, Names, Stored, place_of
from softprompt.backbones.loading import Backbone


def stored_tensors(backbone: Backbone, names: Names) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor by its name, its axes in PyTorch's order, made one at a time.

    A tied head is not among them. Each has its parameter's type, or float32 for int8.

    Args:
      backbone: the model, from whatever file.
      names: of the family, as in a model directory.
    """
    parameters = {
        tuple(map(str, path)): variable[...]
        for path, variable in nnx.to_flat_state(nnx.state(backbone, nnx.Param))
    }
    tensors: dict[Stored, dict[int, tuple[str, ...]]] = {}  # and the parameters in each
    for path in parameters:
        if path[-1] == "scale" and (*path[:-1], "kernel") in parameters:
            continue  # belongs to its kernel
        module, ending = place_of(path)
        entry = find_entry(names, module, backbone.arch)
        tensor = dataclasses.replace(entry, name=entry.name + ending, part=0)
        tensors.setdefault(tensor, {})[entry.part] = path
    for tensor, parts in tensors.items():
        paths = [parts[part] for part in sorted(parts)]
        axes = [axis for axis in ("layer", "expert") if f"{{{axis}}}" in tensor.name]
        for index in np.ndindex(parameters[paths[0]].shape[: len(axes)]):
            arrays = tuple(_one(parameters, path, index) for path in paths)
            array = tensor.form.together(arrays, backbone.arch)
            numbered = tensor.name.format(**dict(zip(axes, index, strict=True)))
            yield numbered, np.ascontiguousarray(array.T if tensor.transposed else array)


def save_tensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Write a safetensors file that others may read, as they may any new file."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, {"format": "pt"})
    path.chmod(mode)


def find_entry(names: Names, module: str, arch: Any) -> Stored:
    """Where a module's parameter is, and in which form.

    Args:
      names: of the family.
      module: its path in the backbone.
      arch: the backbone's architecture.
    """
    entry = names[module]
    if isinstance(entry, Stored):
        return entry
    if isinstance(entry, tuple):  # T5's names for layers with a gate and without
        entry = entry[0 if arch.gated else 1]
    return Stored(entry, WHOLE)


def _one(parameters: Any, path: tuple[str, ...], index: tuple[int, ...]) -> np.ndarray:
    """One layer's or expert's parameter, in PyTorch's axis order."""
    array = parameters[path][index]
    if path[-1] != "kernel":
        return np.asarray(array)
    scale = parameters.get((*path[:-1], "scale"))
    if scale is not None:
        array = array.astype(jnp.float32) * scale[index][None]
    return np.asarray(array).T
