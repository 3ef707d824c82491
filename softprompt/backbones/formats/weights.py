"""Reading: from the tensors of a file to the parameters of a backbone."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from softprompt.backbones.formats.directory import ModelFile
from softprompt.backbones.formats.names import Names, Stored, module_and_suffix
from softprompt.errors import UserError

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


def load_weights(state: nnx.State, file: ModelFile, names: Names, arch: Any, dtype: str) -> str:
    """Read all parameters of a backbone from a file.

    Tensors are read one at a time, so memory use stays close to the size of the model.

    Args:
      state: the shapes and dtypes of the parameters. This function replaces them by arrays.
        Kernels of dtype int8 are quantized: each output channel is rounded to integer multiples
        of its largest absolute value / 127.
      file: the file to read from.
      names: the table of tensor names of the family.
      arch: the architecture of the backbone.
      dtype: the dtype of parameters, except of norms (float32) and int8 kernels.

    Returns:
      The SHA-256 of all stored values. It does not depend on `dtype`.

    Raises:
      UserError: names the tensors that are missing, unused or of the wrong shape.
    """
    flat = dict(nnx.to_flat_state(state))
    reader = _Reader(file, names, arch)
    if arch.tied_head:
        reader.check_tied_head()
    for path, parameter in flat.items():
        if path[-1] == "scale" and (*path[:-1], "kernel") in flat:
            continue  # set together with its kernel
        quantized = parameter.dtype == jnp.int8
        is_norm = "norm" in str(path[-2:-1])
        stored_dtype = np.float32 if is_norm else np.int8 if quantized else jnp.dtype(dtype)
        values, scales = reader.parameter(path, parameter.shape, stored_dtype)
        if not reader.problems:
            # `jnp.asarray` would compile a program for each shape.
            parameter.set_value(jax.device_put(values))
            if quantized:
                flat[*path[:-1], "scale"].set_value(jax.device_put(scales))
    reader.raise_problems()
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
    """Reads parameters and records which tensors were used and which did not fit."""

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

    def parameter(
        self, path: tuple[Any, ...], shape: tuple[int, ...], dtype: Any
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Read a parameter for all layers and experts; also its scales if `dtype` is int8."""
        is_kernel = path[-1] == "kernel"
        module, suffix = module_and_suffix(path)
        name, entry = self._tensor_of(module)
        name += suffix
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
                values = np.empty(shape, dtype)
                scales = np.empty((*stack, one[-1]), np.float32)
            if is_kernel:
                array = array.T
            if dtype == np.int8:
                array, scales[index] = quantize(array)
            values[index] = array
        return values, scales

    def _tensor_of(self, module: str) -> tuple[str, Stored | None]:
        """Return the name of a module's tensors without suffix, and their conversion if any."""
        entry = self._names[module]
        if isinstance(entry, Stored):
            return entry.name.removeprefix(self._left_out), entry
        choices = entry if isinstance(entry, tuple) else (entry,)
        choices = tuple(choice.removeprefix(self._left_out) for choice in choices)
        present = (c for c in choices if f"{c}.weight".format(layer=0, expert=0) in self._stored)
        return next(present, choices[0]), None

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
                array = entry.form.split(array, self._arch)[entry.part]
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
        """Check that a tied head, if the file stores it, equals the embedding."""
        head, embedding = (
            f"{self._names[module]}.weight".removeprefix(self._left_out)
            for module in ("head", "embedding")
        )
        self.used.add(head)
        if {head, embedding} <= self._stored and not np.array_equal(
            self._file.read(head), self._file.read(embedding)
        ):
            self.problems.append(
                f"{head} differs from {embedding}, but the config says that the two are tied"
            )

    def raise_problems(self) -> None:
        unused = (n for n in sorted(self._stored - self.used) if not n.endswith(_UNUSED))
        problems = list(dict.fromkeys(self.problems)) + [f"{name} is not used" for name in unused]
        if more := problems[_MAX_PROBLEMS:]:
            problems = [*problems[:_MAX_PROBLEMS], f"and {len(more)} more"]
        if problems:
            listed = "; ".join(problems)
            raise UserError(f"{self._file.path}: the weights do not fit the config: {listed}")
