"""Arrays in files from outside: safetensors and `.npy`. Nothing in them is executed or unpickled.

Sizes are checked against the file's length before memory is allocated.
"""

import math
import os
import tokenize
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from softprompt.errors import UserError, reason_of, shortened, shown
from softprompt.files.reading import MEBIBYTE, open_file

_TYPES = ("F64", "F32", "F16", "BF16")
_MAX_HEADER = 16 * MEBIBYTE

# NumPy reads the header of a `.npy` file as a Python literal, which raises many types of errors.
_LITERAL_ERRORS = (
    ValueError,
    TypeError,
    SyntaxError,
    RecursionError,
    MemoryError,
    tokenize.TokenError,
)


class SafetensorsFile:
    """The floating-point tensors of a safetensors file.

    Args:
      path: the file.

    Attributes:
      path: the file.
      names: the names of all tensors.

    Raises:
      UserError: if it is not a readable safetensors file.
    """

    def __init__(self, path: Path):
        with open_file(path) as content:
            header = int.from_bytes(content.read(8), "little")
        if header > _MAX_HEADER:
            raise UserError(f"{path}: not a readable safetensors file (a header of {header} bytes)")
        try:
            self._file: Any = safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            reason = shown(str(error), 200)  # it can contain the name of a tensor
            raise UserError(f"{path}: not a readable safetensors file ({reason})") from None
        self.path = path
        self.names: list[str] = list(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it.

        Raises:
          UserError: if it is stored in an unsupported type, such as integers or float8.
        """
        tensor = self._file.get_slice(name)
        if (kind := tensor.get_dtype()) not in _TYPES:
            raise UserError(
                f"{self.path}: tensor {shortened(name)} is stored as {kind}, which is not "
                f"supported (supported: {', '.join(_TYPES)})"
            )
        return tuple(tensor.get_shape())

    def read(self, name: str, part: tuple[slice, ...] = ()) -> np.ndarray:
        """Read a tensor, or a part of it, in its stored dtype, but float64 as float32.

        Args:
          name: the name of the tensor.
          part: the slice of each axis, without steps. By default, the whole tensor is read.

        Raises:
          UserError: as `shape`.
        """
        self.shape(name)
        file = self._file
        array = file.get_slice(name)[part] if part else file.get_tensor(name)
        with np.errstate(over="ignore"):  # infinite values are found later
            return array.astype(np.float32) if array.dtype == np.float64 else array


def read_npy(path: Path) -> np.ndarray:
    """Read an array of floating-point numbers from a `.npy` file.

    Raises:
      UserError: if it is not such a file, or is shorter than its header says.
    """
    with open_file(path) as file:
        shape, fortran, dtype = _npy_header(file, path)
        if dtype.kind != "f":
            raise UserError(f"{path}: not an array of floating-point numbers ({dtype})")
        if not all(type(size) is int and size >= 0 for size in shape):
            raise UserError(f"{path}: not an array of numbers (shape {shortened(shape)})")
        needed = math.prod(shape) * dtype.itemsize
        present = os.fstat(file.fileno()).st_size - file.tell()
        if needed > present:
            raise UserError(
                f"{path}: its header promises {shortened(shape)} numbers of {dtype.itemsize} "
                f"bytes, but {present} bytes follow"
            )
        values = np.frombuffer(file.read(needed), dtype)
        return values.reshape(shape, order="F" if fortran else "C")


def _npy_header(file: Any, path: Path) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the header: the shape, whether the order is Fortran's, and the dtype."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about headers that Python 2 wrote
            version = np.lib.format.read_magic(file)
            if version == (1, 0):
                return np.lib.format.read_array_header_1_0(file)
            return np.lib.format.read_array_header_2_0(file)
    except _LITERAL_ERRORS as error:
        raise UserError(f"{path}: not an array of numbers ({reason_of(error)})") from None
