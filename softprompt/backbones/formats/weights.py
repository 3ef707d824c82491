"""Reading: from the tensors of a file to the parameters of a backbone."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from softprompt.backbones.formats import parts
from softprompt.backbones.formats.digest import RememberedDigest
from softprompt.backbones.formats.directory import ModelFile
from softprompt.backbones.formats.names import WHOLE, Names, Stored, module_and_suffix
from softprompt.backbones.formats.parts import Part
from softprompt.backbones.quantization import (
    COMPANIONS,
    is_companion,
    kernel_shape,
    kind_of,
    quantize,
)
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
        Kernels of dtype int8 or uint8 are quantized, see `quantization`.
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
    read = [path for path in flat if not is_companion(path, flat)]
    for path in read:
        reader.check(path, _shape_of(path, flat[path]))
    if arch.tied_head:
        reader.check_tied_head()
    reader.raise_problems()
    for path in read:
        arrays = {str(path[-1]): flat[path]}
        if path[-1] == "kernel":  # the scales of a quantized kernel are arrays of their own
            beside = {name: (*path[:-1], name) for name in COMPANIONS}
            arrays |= {name: flat[p] for name, p in beside.items() if p in flat}
        shardings = {name: divided[*path[:-1], name] for name in arrays}
        held = {name: parts.local_parts(a.shape, shardings[name]) for name, a in arrays.items()}
        values = reader.parameter(path, _shape_of(path, flat[path]), arrays, held)
        for name, array in arrays.items():
            array.set_value(parts.assembled(array.shape, shardings[name], values[name]))
        del values  # before memory for the next parameter is allocated
    if digest is None:
        digest = hasher.hexdigest()
        remembered.write(digest)
    return digest if mesh is None else text_of_main(digest)


def _shape_of(path: tuple[Any, ...], parameter: Any) -> tuple[int, ...]:
    """Return the shape of a parameter before it was quantized."""
    return kernel_shape(parameter) if path[-1] == "kernel" else parameter.shape


def _stored_part(block: Part, stored: tuple[int, ...], shape: tuple[int, ...]) -> Part:
    """Return the part of an array that stores a block of a tensor: the inverse of `_source`."""
    if len(stored) < len(shape):
        return block[1:]
    inputs = shape[0] // stored[0]
    (start, end), *rest = block
    return ((start // inputs, end // inputs), *rest)


def _source(part: Part, stored: tuple[int, ...], shape: tuple[int, ...]) -> Part:
    """Return the part of a tensor that determines a part of an array that stores it.

    Args:
      part: the part of the array.
      stored: the shape of the array. One of its rows can stand for several inputs of the tensor.
        The scales of output channels have no rows, and depend on all inputs.
      shape: the shape of the tensor.
    """
    if len(stored) < len(shape):
        return ((0, shape[0]), *part)
    inputs = shape[0] // stored[0]
    (start, end), *rest = part
    return ((start * inputs, end * inputs), *rest)


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
        self,
        path: tuple[Any, ...],
        shape: tuple[int, ...],
        arrays: Mapping[str, Any],
        held: Mapping[str, list[Part]],
    ) -> dict[str, dict[Part, np.ndarray]]:
        """Read parts of a parameter for all layers and experts.

        Args:
          path: the path of the parameter in the backbone.
          shape: the shape of the whole parameter, before it was quantized.
          arrays: by name, the arrays that store it, with their shapes and dtypes.
          held: by name, the parts of each array. Each contains all layers and experts.

        Returns:
          By name, the values of each part.
        """
        values = {
            name: {part: np.empty(parts.shape_of(part), arrays[name].dtype) for part in held[name]}
            for name in arrays
        }
        for tensor in self._tensors(path, shape):
            for name, part, array in self._parts(tensor, arrays, held):
                values[name][part][tensor.index] = array
        return values

    def _parts(
        self, tensor: _Tensor, arrays: Mapping[str, Any], held: Mapping[str, list[Part]]
    ) -> Iterator[tuple[str, Part, np.ndarray]]:
        """Yield parts of the arrays that store a tensor. No value of the tensor is read twice.

        Args:
          tensor: the tensor.
          arrays, held: see `parameter`.

        Yields:
          The name of an array, one of its parts, and the values of this layer and expert.
        """
        shape = tensor.shape[::-1] if tensor.is_kernel else tensor.shape
        stack = len(tensor.index)
        shapes = {name: array.shape[stack:] for name, array in arrays.items()}
        sources = {
            name: {part: _source(part[stack:], shapes[name], shape) for part in each}
            for name, each in held.items()
        }
        # The scales come last, and depend on at least as many inputs as the codes.
        needed = list(sources[list(arrays)[-1]].values())
        blocks = [parts.whole(shape)] if self._hasher else parts.covering(needed)
        for block in blocks:
            stored = self._stored_arrays(tensor, block, arrays)
            for name, each in sources.items():
                outer = _stored_part(block, shapes[name], shape)
                for part, source in each.items():
                    if parts.contains(block, source):
                        yield name, part, stored[name][parts.slices(part[stack:], outer)]

    def _stored_arrays(
        self, tensor: _Tensor, block: Part, arrays: Mapping[str, Any]
    ) -> dict[str, np.ndarray]:
        """Read a block of a tensor and return the arrays that store it, by name."""
        values = self._read(tensor, block)
        kind = kind_of(arrays["kernel"]) if tensor.is_kernel else None
        if kind is None:
            return dict.fromkeys(arrays, values)
        grid = self._block(self._file.grid, tensor, block) if kind == "int4" else None
        try:
            return quantize(kind, values, None if grid is None else grid.T)
        except ValueError as error:
            raise UserError(f"{self._file.path}: tensor {tensor.name}: {error}") from None

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
        array = self._block(self._file.read, tensor, block)
        assert array is not None
        if not _is_finite(array):
            raise UserError(
                f"{self._file.path}: tensor {tensor.name} has values that are not finite (NaN or "
                "infinity); use a base model without them"
            )
        if self._hasher:
            self._hasher.update(f"{tensor.name} {array.shape}".encode())
            self._hasher.update(np.ascontiguousarray(array).view(np.uint8).data)
        return array.T if tensor.is_kernel else array

    def _block(
        self,
        read: Callable[[str, tuple[slice, ...]], np.ndarray | None],
        tensor: _Tensor,
        block: Part,
    ) -> np.ndarray | None:
        """Return a block as a function reads it, converted, with axes in PyTorch's order."""
        index = parts.slices(block[::-1] if tensor.is_kernel else block)
        entry = tensor.entry
        if entry is None:
            return read(tensor.name, index)
        # Conversions move rows, so they need all of them.
        first = index[0] if entry.form is WHOLE else slice(None)
        stored = (first, *index[1:])
        array = read(tensor.name, stored[::-1] if entry.transposed else stored)
        if array is None:
            return None
        array = self._converted(array, entry)
        return array if entry.form is WHOLE else array[index[0]]

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
