"""Reading: from the tensors of a file to the parameters of a backbone."""

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from softprompt.backbones.formats import parts
from softprompt.backbones.formats.digest import RememberedDigest
from softprompt.backbones.formats.directory import ModelFile
from softprompt.backbones.formats.names import WHOLE, Names, Stored, module_and_suffix
from softprompt.backbones.formats.parts import Part
from softprompt.errors import UserError, shortened, shown
from softprompt.parallel.hosts import is_main, text_of_main
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
    state: nnx.State, file: ModelFile, names: Names, arch: Any, mesh: Mesh | None
) -> str:
    """Read all parameters of a backbone from a file.

    The shapes of all tensors are checked before memory for any is allocated. Tensors are then read
    one at a time. A process reads only those parts that its devices hold, and needs memory for
    these parts and one tensor. If the digest of the weights is not known from an earlier start,
    the main process also reads the rest of each tensor to compute it.

    Args:
      state: the shapes and dtypes of the parameters. This function replaces them by arrays.
        Kernels of dtype int8 are quantized: each output channel is rounded to integer multiples
        of its largest absolute value / 127.
      file: the file to read from.
      names: the table of tensor names of the family.
      arch: the architecture of the backbone.
      mesh: the devices that the parameters are divided over; None for one device. With a mesh, all
        processes call this function together.

    Returns:
      The digest: the SHA-256 of all stored values. It does not depend on dtypes or `mesh`.

    Raises:
      UserError: names the tensors that are missing, unused or of the wrong shape, or one whose
        values are not finite.
    """
    flat = dict(nnx.to_flat_state(state))
    divided = {path: sharding_of(path, p.ndim, mesh) for path, p in flat.items()}
    remembered = RememberedDigest(file, arch)
    # With several processes, the main one alone knows the digest and sends it to the others.
    digest = remembered.read() if mesh is None or is_main() else ""
    hasher: Any = hashlib.sha256() if digest is None else None
    reader = _Reader(file, names, arch, hasher)
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
        held = parts.local_parts(parameter.shape, divided[path])
        values, scales = reader.parameter(path, parameter.shape, parameter.dtype, held)
        parameter.set_value(parts.assembled(parameter.shape, divided[path], values))
        if scales:
            scale = *path[:-1], "scale"
            flat[scale].set_value(parts.assembled(flat[scale].shape, divided[scale], scales))
        del values, scales  # before memory for the next parameter is allocated
    if digest is None:
        digest = hasher.hexdigest()
        remembered.write(digest)
    return digest if mesh is None else text_of_main(digest)


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


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """The tensor of one layer and expert of a parameter.

    Attributes:
      index: the layer and the expert, as an index of the parameter.
      name: the name in the file.
      entry: the conversion, if any.
      shape: in the file, after the conversion.
      is_kernel: whether the axes of the parameter have the other order.
    """

    index: tuple[int, ...]
    name: str
    entry: Stored | None
    shape: tuple[int, ...]
    is_kernel: bool


class _Reader:
    """Reads parameters and records which tensors are used and which do not fit.

    If there is a hasher, all tensors are read whole, and the hasher receives their values.
    """

    def __init__(self, file: ModelFile, names: Names, arch: Any, hasher: Any):
        self._file, self._names, self._arch, self._hasher = file, names, arch, hasher
        self._stored = file.names
        # Some files leave out the first part of all names, such as "model.".
        first = str(names["embedding"]).split(".")[0] + "."
        has_first = any(name.startswith(first) for name in self._stored)
        self._left_out = "" if has_first else first
        self.used: set[str] = set()
        self.problems: list[str] = []

    def check(self, path: tuple[Any, ...], shape: tuple[int, ...]) -> None:
        """Check that the file has the tensors of a parameter, for all layers and experts."""
        for tensor in self._tensors(path, shape):
            if len(self.problems) >= _MAX_COUNTED_PROBLEMS:
                return
            self._check_tensor(tensor)

    def parameter(
        self, path: tuple[Any, ...], shape: tuple[int, ...], dtype: Any, held: list[Part]
    ) -> tuple[dict[Part, np.ndarray], dict[Part, np.ndarray]]:
        """Read parts of a parameter for all layers and experts.

        Args:
          path: the path of the parameter in the backbone.
          shape: the shape of the whole parameter.
          dtype: the dtype of the result.
          held: the parts. Each contains all layers and experts.

        Returns:
          The values of each part. If `dtype` is int8, also the scales, which have no input axis.
        """
        quantized = dtype == np.int8
        values = {part: np.empty(parts.shape_of(part), dtype) for part in held}
        outputs = {part: (*part[:-2], part[-1]) for part in held} if quantized else {}
        scales = {part: np.empty(parts.shape_of(part), np.float32) for part in outputs.values()}
        for tensor in self._tensors(path, shape):
            stacked = {part[len(tensor.index) :]: part for part in held}
            for part, array, scale in self._parts(tensor, list(stacked), quantized):
                values[stacked[part]][tensor.index] = array
                if quantized:
                    scales[outputs[stacked[part]]][tensor.index] = scale
        return values, scales

    def _parts(
        self, tensor: _Tensor, wanted: list[Part], quantized: bool
    ) -> Iterator[tuple[Part, np.ndarray, np.ndarray | None]]:
        """Yield parts of a tensor, with axes in the parameter's order. No value is read twice.

        Yields:
          One of the wanted parts, its values, and the scales of its outputs if it is quantized.
        """
        shape = tensor.shape[::-1] if tensor.is_kernel else tensor.shape
        if self._hasher:
            blocks = [parts.whole(shape)]
        elif quantized:  # a scale depends on all inputs
            blocks = parts.covering([((0, shape[0]), outputs) for _, outputs in wanted])
        else:
            blocks = parts.covering(wanted)
        for block in blocks:
            array, scale = self._read(tensor, block), None
            if quantized:
                array, scale = quantize(array)
            for part in wanted:
                if parts.contains(block, part):
                    inside = parts.slices(part, block)
                    yield part, array[inside], None if scale is None else scale[inside[-1]]

    def _tensors(self, path: tuple[Any, ...], shape: tuple[int, ...]) -> Iterator[_Tensor]:
        """Yield the tensors of a parameter, one for each layer and expert."""
        module, suffix = module_and_suffix(path)
        name, entry = self._tensor_of(module)
        name += suffix
        axes = [axis for axis in ("layer", "expert") if f"{{{axis}}}" in name]
        stack, one = shape[: len(axes)], shape[len(axes) :]
        is_kernel = path[-1] == "kernel"
        wanted = one[::-1] if is_kernel else one
        for index in np.ndindex(stack):
            numbered = name.format(**dict(zip(axes, index, strict=True)))
            yield _Tensor(index, numbered, entry, wanted, is_kernel)

    def _tensor_of(self, module: str) -> tuple[str, Stored | None]:
        """Return the name of a module's tensors without suffix, and their conversion if any."""
        entry = self._names[module]
        if isinstance(entry, Stored):
            return entry.name.removeprefix(self._left_out), entry
        choices = entry if isinstance(entry, tuple) else (entry,)
        choices = tuple(choice.removeprefix(self._left_out) for choice in choices)
        present = (c for c in choices if f"{c}.weight".format(layer=0, expert=0) in self._stored)
        return next(present, choices[0]), None

    def _check_tensor(self, tensor: _Tensor) -> None:
        name, entry = tensor.name, tensor.entry
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
        if found != tensor.shape:
            wrong = f"from which {tensor.shape} cannot be taken" if entry else f"not {tensor.shape}"
            self.problems.append(f"{name} has shape {shortened(stored)}, {wrong}")

    def _converted(self, array: np.ndarray, entry: Stored) -> np.ndarray:
        array = np.atleast_1d(array.T if entry.transposed else array)
        return entry.form.split(array, self._arch)[entry.part]

    def _read(self, tensor: _Tensor, block: Part) -> np.ndarray:
        """Read a block of a tensor, with axes in the parameter's order."""
        index = parts.slices(block[::-1] if tensor.is_kernel else block)
        if entry := tensor.entry:
            # Conversions move rows, so they need all of them.
            first = index[0] if entry.form is WHOLE else slice(None)
            stored = (first, *index[1:])
            stored = stored[::-1] if entry.transposed else stored
            array = self._converted(self._file.read(tensor.name, stored), entry)
            array = array if entry.form is WHOLE else array[index[0]]
        else:
            array = self._file.read(tensor.name, index)
        if not _is_finite(array):
            raise UserError(
                f"{self._file.path}: tensor {tensor.name} has values that are not finite (NaN or "
                "infinity); use a base model without them"
            )
        if self._hasher:
            self._hasher.update(f"{tensor.name} {array.shape}".encode())
            self._hasher.update(np.ascontiguousarray(array).view(np.uint8).data)
        return array.T if tensor.is_kernel else array

    def check_tied_head(self) -> None:
        """Check that a tied head, if the file stores it, equals the embedding.

        The values are compared only if there is a hasher, because a digest that is remembered
        belongs to a model that was checked.
        """
        head, embedding = (
            f"{self._names[module]}.weight".removeprefix(self._left_out)
            for module in ("head", "embedding")
        )
        self.used.add(head)
        if self.problems or head not in self._stored:
            return
        fits = self._file.shape(head) == self._file.shape(embedding)
        if fits and not self._hasher:
            return
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
