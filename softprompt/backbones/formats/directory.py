"""A base model as a directory with `config.json`, safetensors and a tokenizer, as on the hub."""

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pydantic
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerFast

from softprompt.backbones.formats.tokenizer_files import read_tokenizer_files
from softprompt.errors import UserError
from softprompt.files.json_files import checked, read_json, shortened
from softprompt.files.reading import MEBIBYTE, open_file

_SUPPORTED_TYPES = ("F64", "F32", "F16", "BF16")
_MAX_HEADER = 16 * MEBIBYTE


class _Index(pydantic.BaseModel):
    """The content of `model.safetensors.index.json`: the file of each tensor."""

    weight_map: dict[str, str]


class ModelFile(Protocol):
    """A base model on disk."""

    @property
    def path(self) -> Path:
        """The file or directory."""

    @property
    def config(self) -> dict[str, Any]:
        """The content of `config.json`, or what it would be."""

    @property
    def names(self) -> set[str]:
        """The names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that `read` will return, without reading the tensor.

        Raises:
          UserError: if the tensor is stored in an unsupported type.
        """

    def read(self, name: str) -> np.ndarray:
        """Read a tensor, with its axes in PyTorch's order (`[out, in]` for a matrix)."""

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Make the tokenizer."""


class ModelDirectory:
    """A base model in a directory, with its tensors in one or more safetensors files.

    Raises:
      UserError: if a file is missing or damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        config = path / "config.json"
        if not os.path.exists(config):
            raise UserError(f"{path}: contains no config.json")
        self.config = read_json(config)
        self._file_of: dict[str, Any] = {}
        for file in self._files():
            opened = _open_safetensors(file)
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                if name in self._file_of:
                    raise UserError(f"{file}: tensor {shortened(name)} is in another file as well")
                self._file_of[name] = opened

    @property
    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor that can be read."""
        tensor = self._file_of[name].get_slice(name)
        if tensor.get_dtype() not in _SUPPORTED_TYPES:
            raise UserError(
                f"{self.path}: tensor {name} is stored as {tensor.get_dtype()}, which is not "
                f"supported (supported: {', '.join(_SUPPORTED_TYPES)})"
            )
        return tuple(tensor.get_shape())

    def read(self, name: str) -> np.ndarray:
        """Read a tensor in its stored dtype, but float64 as float32."""
        return np.asarray(self._file_of[name].get_tensor(name))

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Make the tokenizer from `tokenizer.json` and the files next to it."""
        return read_tokenizer_files(self.path)

    def _files(self) -> list[Path]:
        index = self.path / "model.safetensors.index.json"
        shards = {"model.safetensors"}
        if os.path.lexists(index):
            shards = set(checked(_Index, read_json(index), str(index)).weight_map.values())
        for shard in shards:
            if Path(shard).name != shard or not shard.isprintable():
                raise UserError(f"{index}: {shortened(shard)} is not the name of a file")
            if not os.path.exists(self.path / shard) and any(self.path.glob("*.bin")):
                raise UserError(
                    f"{self.path / shard}: no such file; PyTorch .bin files are not supported "
                    "because unpickling can run any code: convert them to safetensors"
                )
        return sorted(self.path / shard for shard in shards)


def _open_safetensors(file: Path) -> Any:
    """Open a safetensors file after a check of the size of its header."""
    with open_file(file) as content:
        header = int.from_bytes(content.read(8), "little")
    if header > _MAX_HEADER:
        raise UserError(f"{file}: not a readable safetensors file (a header of {header} bytes)")
    try:
        return safe_open(file, framework="flax")
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:200]  # it can contain the name of a tensor
        raise UserError(f"{file}: not a readable safetensors file ({reason})") from None
