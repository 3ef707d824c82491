"""Tensors on disk into the parameters of a backbone, one at a time."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from softprompt.backbones.formats.directory import ModelFile
from softprompt.backbones.formats.names import Names, Stored, place_of
from softprompt.errors import UserError

# What older versions of transformers saved beside the weights, and nobody needs.
_BUFFERS = (
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    "coder.embed_tokens.weight",
    ".EncDecAttention.relative_attention_bias.weight",
)
_MOST_SHOWN = 20  # problems in one message


def fill(state: nnx.State, file: ModelFile, names: Names, arch: Any, dtype: str) -> str:
    """Put every tensor in its place, one at a time, so that little more than the model is held.

    Args:
      state: the parameters' shapes, replaced by arrays. Kernels of int8 are quantised:
        an output channel is stored as whole multiples of its largest value / 127.
      file, names: what there is, and where which parameter is in it.
      arch: the backbone's architecture.
      dtype: of all parameters but norms, which are float32, and what is quantised.

    Returns:
      SHA-256 of all values as stored, so that it does not depend on `dtype`.

    Raises:
      UserError: which names the tensors that are missing, unused or misshapen.
    """
    flat = dict(nnx.to_flat_state(state))
    reader = _Reader(file, names, arch)
    if arch.tied_head:
        reader.check_tied_head()
    for path, parameter in flat.items():
        if path[-1] == "scale" and (*path[:-1], "kernel") in flat:
            continue  # made together with its kernel
        quantised = parameter.dtype == jnp.int8
        is_norm = "norm" in str(path[-2:-1])
        kind = np.float32 if is_norm else np.int8 if quantised else jnp.dtype(dtype)
        values, scales = reader.parameter(path, parameter.shape, kind)
        if not reader.problems:
            parameter.set_value(jax.device_put(values))  # asarray compiles for each shape
            if quantised:
                flat[*path[:-1], "scale"].set_value(jax.device_put(scales))
    reader.raise_problems()
    return reader.digest.hexdigest()


def quantise(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A kernel `[in, out]` as whole numbers from -127 to 127, and a scale for each of `[out]`."""
    kernel = kernel.astype(np.float32)
    scales = np.abs(kernel).max(axis=0) / 127
    scales[scales == 0] = 1
    return np.rint(kernel / scales).astype(np.int8), scales


class _Reader:
    """Reads parameters out of tensors, and notes what was used and what did not fit."""

    def __init__(self, file: ModelFile, names: Names, arch: Any):
        self._file, self._names, self._arch = file, names, arch
        self._stored = file.names
        # Some files leave out the model's own name, in front of all tensors' names.
        first = str(names["embedding"]).split(".")[0] + "."
        whole = any(name.startswith(first) for name in self._stored)
        self._prefix = "" if whole else first
        self.digest = hashlib.sha256()
        self.used: set[str] = set()
        self.problems: list[str] = []

    def parameter(
        self, path: tuple[Any, ...], shape: tuple[int, ...], kind: Any
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """A parameter, all its layers and experts, and if it is quantised its scales."""
        is_kernel = path[-1] == "kernel"
        module, ending = place_of(path)
        name, entry = self._where(module)
        name += ending
        axes = [axis for axis in ("layer", "expert") if f"{{{axis}}}" in name]
        stack, one = shape[: len(axes)], shape[len(axes) :]
        values: Any = None
        scales: Any = None
        for index in np.ndindex(stack):
            numbered = name.format(**dict(zip(axes, index, strict=True)))
            array = self._read(numbered, entry, one[::-1] if is_kernel else one)
            if array is None:
                continue
            if values is None:
                values = np.empty(shape, kind)
                scales = np.empty((*stack, one[-1]), np.float32)
            if is_kernel:
                array = array.T
            if kind == np.int8:
                array, scales[index] = quantise(array)
            values[index] = array
        return values, scales

    def _where(self, module: str) -> tuple[str, Stored | None]:
        """The name of a module's tensors, and their form if it is a special one."""
        entry = self._names[module]
        if isinstance(entry, Stored):
            return entry.name.removeprefix(self._prefix), entry
        choices = entry if isinstance(entry, tuple) else (entry,)
        choices = tuple(choice.removeprefix(self._prefix) for choice in choices)
        there = (c for c in choices if f"{c}.weight".format(layer=0, expert=0) in self._stored)
        return next(there, choices[0]), None

    def _read(self, name: str, entry: Stored | None, shape: tuple[int, ...]) -> np.ndarray | None:
        self.used.add(name)
        if name not in self._stored:
            self.problems.append(f"{name} is missing")
            return None
        stored = self._file.read(name)
        try:
            array = stored
            if entry:
                array = np.atleast_1d(stored.T if entry.transposed else stored)
                array = entry.form.apart(array, self._arch)[entry.part]
        except ValueError:
            array = None
        if array is None or array.shape != shape:
            wanted = f"from which {shape} cannot be taken" if entry else f"not {shape}"
            self.problems.append(f"{name} has shape {stored.shape}, {wanted}")
            return None
        self.digest.update(f"{name} {shape}".encode())
        self.digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        return array

    def check_tied_head(self) -> None:
        """Some files store a tied head again; one of its own would be another model."""
        head, embedding = (
            f"{self._names[module]}.weight".removeprefix(self._prefix)
            for module in ("head", "embedding")
        )
        self.used.add(head)
        if {head, embedding} <= self._stored and not np.array_equal(
            self._file.read(head), self._file.read(embedding)
        ):
            self.problems.append(f"{head} differs from {embedding}, with which it should be one")

    def raise_problems(self) -> None:
        unused = (n for n in sorted(self._stored - self.used) if not n.endswith(_BUFFERS))
        problems = list(dict.fromkeys(self.problems)) + [f"{name} is not used" for name in unused]
        if more := problems[_MOST_SHOWN:]:
            problems = [*problems[:_MOST_SHOWN], f"and {len(more)} more"]
        if problems:
            listed = "; ".join(problems)
            raise UserError(f"{self._file.path}: the weights do not fit the config: {listed}")
