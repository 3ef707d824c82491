"""The header of a GGUF file: its metadata and the locations of its tensors.

The format is described at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. This module
parses the header itself, because the `gguf` package takes twenty seconds for a large vocabulary.
A header can be damaged or hostile: every count, length and offset is compared with the size of the
file before anything is allocated.
"""

import dataclasses
import itertools
import math
import mmap
import struct
from typing import Any

import gguf
import numpy as np

from softprompt.errors import shortened
from softprompt.files.reading import MEBIBYTE

_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
# No existing model comes near these limits. They keep the parsing of a header below a gigabyte.
_MAX_HEADER = 64 * MEBIBYTE
_MAX_ITEMS = 2**22  # in all arrays together
_MAX_FIELDS = 2**16
_MAX_TENSORS = 2**17
_MAX_NAME = 1024
_MAX_ARRAY_DEPTH = 4
_MAX_DIMENSIONS = 4
_MAX_ALIGNMENT = 2**16


@dataclasses.dataclass(frozen=True)
class Tensor:
    """The location of a tensor.

    Attributes:
      shape: in PyTorch's axis order.
      kind: the type of its values.
      offset: in the file, in bytes.
      size: in bytes.
    """

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int
    size: int


def parse_header(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the metadata and the locations of the tensors of a GGUF file.

    Args:
      data: the whole file.

    Raises:
      ValueError: says what is damaged.
    """
    header = _Header(data)
    magic, version = header.take("4sI")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError("not a little-endian GGUF file of version 2 or 3")
    tensor_count, field_count = header.take("QQ")
    if tensor_count > _MAX_TENSORS or field_count > _MAX_FIELDS:
        raise ValueError(f"{tensor_count} tensors and {field_count} metadata fields")
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        name = header.name(fields)
        try:
            fields[name] = header.value(*header.take("I"))
        except ValueError as error:
            raise ValueError(f"metadata {shortened(name)}: {error}") from None
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= _MAX_ALIGNMENT:
        raise ValueError(f"general.alignment {shortened(alignment)}")
    found: dict[str, tuple[int, ...]] = {}
    for _ in range(tensor_count):
        name = header.name(found)
        (dimensions,) = header.take("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise ValueError(f"tensor {shortened(name)} has {dimensions} dimensions")
        found[name] = header.take(f"{dimensions}QIQ")
    start = -(-header.position // alignment) * alignment
    tensors = {}
    for name, (*sizes, kind, offset) in found.items():
        try:
            tensors[name] = _locate(sizes[::-1], kind, start, offset, alignment, len(data))
        except ValueError as error:
            raise ValueError(f"tensor {shortened(name)}: {error}") from None
    _check_overlap(tensors)
    return fields, tensors


class _Header:
    """A reader of the values at the start of a file.

    Attributes:
      position: of the next value, in bytes.
    """

    def __init__(self, data: mmap.mmap):
        self.position = 0
        self._data, self._end = data, min(len(data), _MAX_HEADER)
        self._items = 0  # in all arrays so far

    def take(self, form: str) -> tuple[Any, ...]:
        """Read the values of a format of `struct`."""
        form = "<" + form
        start = self._advance(struct.calcsize(form))
        return struct.unpack_from(form, self._data, start)

    def name(self, earlier: dict[str, Any]) -> str:
        """Read a name that differs from all earlier ones."""
        (name,) = self._texts(1)
        if not name or len(name) > _MAX_NAME or not name.isprintable():
            raise ValueError(f"the name {shortened(name)}")
        if name in earlier:
            raise ValueError(f"two entries named {name}")
        return name

    def value(self, kind: int, depth: int = 0) -> Any:
        """Read a value of metadata. Arrays become lists."""
        if kind == _STRING:
            return self._texts(1)[0]
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])[0]
        if kind != _ARRAY:
            raise ValueError(f"the type {kind}")
        if depth == _MAX_ARRAY_DEPTH:
            raise ValueError("arrays nested too deeply")
        item_kind, count = self.take("IQ")
        self._items += count
        if self._items > _MAX_ITEMS:
            raise ValueError("too many items in arrays")
        if item_kind == _STRING:
            return self._texts(count)
        if item_kind not in _SCALARS:
            return [self.value(item_kind, depth + 1) for _ in range(count)]
        dtype = np.dtype("<" + _SCALARS[item_kind])
        start = self._advance(count * dtype.itemsize)
        return np.frombuffer(self._data, dtype, count, start).tolist()

    def _texts(self, count: int) -> list[str]:
        # Large vocabularies have a million texts, so this loop calls no other methods.
        data, position, end, texts = self._data, self.position, self._end, []
        try:
            for _ in range(count):
                start = position + 8
                position = start + int.from_bytes(data[position:start], "little")
                if position > end:
                    break
                texts.append(data[start:position].decode())
        except UnicodeDecodeError:
            raise ValueError(f"text that is not UTF-8, at byte {start}") from None
        self._advance(position - self.position)
        return texts

    def _advance(self, size: int) -> int:
        """Move over `size` bytes, and return where they start."""
        start = self.position
        if size > self._end - start:
            large = self._end < len(self._data)
            raise ValueError(
                f"its header is larger than {_MAX_HEADER // MEBIBYTE} MiB"
                if large
                else "it ends too early"
            )
        self.position = start + size
        return start


def _locate(
    shape: list[int], kind: int, start: int, offset: int, alignment: int, file_size: int
) -> Tensor:
    """Return the location of a tensor whose values lie within the file."""
    try:
        known = gguf.GGMLQuantizationType(kind)
        block, block_size = gguf.GGML_QUANT_SIZES[known]
    except (ValueError, KeyError):
        raise ValueError(f"the type {kind}") from None
    if not all(shape) or shape[-1] % block:
        raise ValueError(f"the shape {tuple(shape)} of type {known.name}")
    size = math.prod(shape) // block * block_size
    if offset % alignment:
        raise ValueError(f"the offset {offset}, which is not a multiple of {alignment}")
    if start + offset + size > file_size:
        raise ValueError(f"shape {tuple(shape)} at offset {offset} ends after the end of the file")
    return Tensor(tuple(shape), known, start + offset, size)


def _check_overlap(tensors: dict[str, Tensor]) -> None:
    in_order = sorted(tensors.items(), key=lambda item: item[1].offset)
    for (first, tensor), (second, after) in itertools.pairwise(in_order):
        if tensor.offset + tensor.size > after.offset:
            raise ValueError(f"tensors {shortened(first)} and {shortened(second)} overlap")
