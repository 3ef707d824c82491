"""Reading: from the tensors of a file to the parameters of a backbone."""

import hashlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from softprompt.backbones.formats.directory import ModelFile
from softprompt.backbones.formats.names import Names, Stored, module_and_suffix
from softprompt.errors import UserError, shortened, shown
from softprompt.parallel.sharding import sharding_of

# Suffixes of tensors that old versions of transformers saved and that are not needed.
_UNUSED = (
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    "coder.embed_tokens.weight",
    ".EncDecAttention.relative_attention_bias.weight",
)
_MAX_PROBLEMS = 20  # in one message
_MAX_COUNTED_PROBLEMS = 1000


def load_weights(
    state: nnx.State, file: ModelFile, names: Names, arch: Any, dtype: str, mesh: Mesh | None
) -> str:
    """Read all parameters of a backbone from a file.

    The shapes of all tensors are checked before memory for any is allocated. Tensors are then read
    one at a time, so memory use stays close to the size of the model.

    Args:
      state: the shapes and dtypes of the parameters. This function replaces them by arrays.
        Kernels of dtype int8 are quantized: each output channel is rounded to integer multiples
        of its largest absolute value / 127.
      file: the file to read from.
      names: the table of tensor names of the family.
      arch: the architecture of the backbone.
      dtype: the dtype of parameters, except of norms (float32) and int8 kernels.
      mesh: the devices that the parameters are divided over; None for one device.

    Returns:
      The SHA-256 of all stored values. It does not depend on `dtype`.

    Raises:
      UserError: names the tensors that are missing, unused or of the wrong shape, or one whose
        values are not finite.
    """
    flat = dict(nnx.to_flat_state(state))
    divided = {path: sharding_of(path, p.ndim, mesh) for path, p in flat.items()}
    reader = _Reader(file, names, arch)
    read = {  # without the scales of kernels, which are set together with the kernels
        path: parameter
        for path, parameter in flat.items()
        if not (path[-1] == "scale" and (*path[:-1], "kernel") in flat)
    }
    for path, parameter in read.items():
        reader.check(path, parameter.shape)
    if arch.tied_head:
        reader.check_tied_head()
    reader.raise_problems()
    for path, parameter in read.items():
        quantized = parameter.dtype == jnp.int8
        is_norm = "norm" in str(path[-2:-1])
        stored_dtype = np.float32 if is_norm else np.int8 if quantized else jnp.dtype(dtype)
        values, scales = reader.parameter(path, parameter.shape, stored_dtype)
        # `jnp.asarray` would compile a program for each shape.
        parameter.set_value(jax.device_put(values, divided[path]))
        if quantized:
            scale = *path[:-1], "scale"
            flat[scale].set_value(jax.device_put(scales, divided[scale]))
    return reader.digest.hexdigest()


def quantize(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a kernel to int8.

    Args:
      kernel: `[in, out]`.

    Returns:
      Integers from -127 to 127, `[in, out]`, and the scale of each output channel, `[out]`.
    """
    kernel = kernel.astype(np.float32)
    scales = np.abs(kernel).max(axis=0) / 127
    scales[scales == 0] = 1
    return np.rint(kernel / scales).astype(np.int8), scales


class _Reader:
    """Reads parameters and records which tensors are used and which do not fit."""

    def __init__(self, file: ModelFile, names: Names, arch: Any):
        self._file, self._names, self._arch = file, names, arch
        self._stored = file.names
        # Some files leave out the first part of all names, such as "model.".
        first = str(names["embedding"]).split(".")[0] + "."
        has_first = any(name.startswith(first) for name in self._stored)
        self._left_out = "" if has_first else first
        self.digest = hashlib.sha256()
        self.used: set[str] = set()
        self.problems: list[str] = []

    def check(self, path: tuple[Any, ...], shape: tuple[int, ...]) -> None:
        """Check that the file has the tensors of a parameter, for all layers and experts."""
        for _, name, entry, wanted in self._tensors(path, shape):
            if len(self.problems) >= _MAX_COUNTED_PROBLEMS:
                return
            self._check_tensor(name, entry, wanted)

    def parameter(
        self, path: tuple[Any, ...], shape: tuple[int, ...], dtype: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Read a parameter for all layers and experts; also its scales if `dtype` is int8."""
        values = np.empty(shape, dtype)
        scales = np.empty((*shape[:-2], shape[-1]), np.float32)
        for index, name, entry, wanted in self._tensors(path, shape):
            array = self._read(name, entry, wanted)
            if path[-1] == "kernel":
                array = array.T
            if dtype == np.int8:
                array, scales[index] = quantize(array)
            values[index] = array
        return values, scales

    def _tensors(
        self, path: tuple[Any, ...], shape: tuple[int, ...]
    ) -> Iterator[tuple[tuple[int, ...], str, Stored | None, tuple[int, ...]]]:
        """Yield the tensors of a parameter, one for each layer and expert.

        Yields:
          The index in the parameter, and the tensor's name, conversion, and shape in the file
          after the conversion.
        """
        module, suffix = module_and_suffix(path)
        name, entry = self._tensor_of(module)
        name += suffix
        axes = [axis for axis in ("layer", "expert") if f"{{{axis}}}" in name]
        stack, one = shape[: len(axes)], shape[len(axes) :]
        wanted = one[::-1] if path[-1] == "kernel" else one
        for index in np.ndindex(stack):
            yield index, name.format(**dict(zip(axes, index, strict=True))), entry, wanted

    def _tensor_of(self, module: str) -> tuple[str, Stored | None]:
        """Return the name of a module's tensors without suffix, and their conversion if any."""
        entry = self._names[module]
        if isinstance(entry, Stored):
            return entry.name.removeprefix(self._left_out), entry
        choices = entry if isinstance(entry, tuple) else (entry,)
        choices = tuple(choice.removeprefix(self._left_out) for choice in choices)
        present = (c for c in choices if f"{c}.weight".format(layer=0, expert=0) in self._stored)
        return next(present, choices[0]), None

    def _check_tensor(self, name: str, entry: Stored | None, wanted: tuple[int, ...]) -> None:
        self.used.add(name)
        if name not in self._stored:
            self.problems.append(f"{name} is missing")
            return
        stored = self._file.shape(name)
        found: tuple[int, ...] | None = stored
        if entry:
            try:
                # An array that takes no memory.
                found = self._converted(np.broadcast_to(np.float32(0), stored), entry).shape
            except ValueError:
                found = None
        if found != wanted:
            wrong = f"from which {wanted} cannot be taken" if entry else f"not {wanted}"
            self.problems.append(f"{name} has shape {shortened(stored)}, {wrong}")

    def _converted(self, array: np.ndarray, entry: Stored) -> np.ndarray:
        array = np.atleast_1d(array.T if entry.transposed else array)
        return entry.form.split(array, self._arch)[entry.part]

    def _read(self, name: str, entry: Stored | None, shape: tuple[int, ...]) -> np.ndarray:
        array = self._file.read(name)
        if entry:
            array = self._converted(array, entry)
        if not _is_finite(array):
            raise UserError(
                f"{self._file.path}: tensor {name} has values that are not finite (NaN or "
                "infinity); use a base model without them"
            )
        self.digest.update(f"{name} {shape}".encode())
        self.digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        return array

    def check_tied_head(self) -> None:
        """Check that a tied head, if the file stores it, equals the embedding."""
        head, embedding = (
            f"{self._names[module]}.weight".removeprefix(self._left_out)
            for module in ("head", "embedding")
        )
        self.used.add(head)
        if self.problems or head not in self._stored:
            return
        fits = self._file.shape(head) == self._file.shape(embedding)
        if not fits or not np.array_equal(self._file.read(head), self._file.read(embedding)):
            self.problems.append(
                f"{head} differs from {embedding}, but the config says that the two are tied"
            )

    def raise_problems(self) -> None:
        """Raise an error that names the tensors that do not fit, if there are any."""
        problems = list(dict.fromkeys(self.problems))
        more = len(problems) - _MAX_PROBLEMS
        if len(self.problems) < _MAX_COUNTED_PROBLEMS:
            unused = [n for n in sorted(self._stored - self.used) if not n.endswith(_UNUSED)]
            problems += [f"{shown(name, 200) or repr(name)} is not used" for name in unused]
            more = len(problems) - _MAX_PROBLEMS
        if more > 0:
            problems = [*problems[:_MAX_PROBLEMS], f"and {more} more"]
        if problems:
            listed = "; ".join(problems)
            raise UserError(f"{self._file.path}: the weights do not fit the config: {listed}")


def _is_finite(array: np.ndarray) -> bool:
    if array.dtype.itemsize != 2:
        return bool(np.isfinite(array).all())
    # `np.isfinite` is slow for these types. A value is not finite if all bits of its exponent are.
    exponent = np.uint16(0x7C00 if array.dtype == np.float16 else 0x7F80)
    return not ((array.view(np.uint16) & exponent) == exponent).any()
