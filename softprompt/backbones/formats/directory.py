"""A base model as a directory with `config.json`, safetensors and a tokenizer, as on the hub."""

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pydantic
from transformers import PreTrainedTokenizerFast

from softprompt.backbones.formats.tokenizer_files import read_tokenizer_files
from softprompt.errors import UserError, shortened
from softprompt.files.json_files import checked, read_json
from softprompt.files.tensors import SafetensorsFile


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
    def weight_files(self) -> list[Path]:
        """The files that hold the tensors."""

    @property
    def names(self) -> set[str]:
        """The names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that `read` will return, without reading the tensor.

        Raises:
          UserError: if the tensor is stored in an unsupported type.
        """

    def read(self, name: str, part: tuple[slice, ...] = ()) -> np.ndarray:
        """Read a tensor, with its axes in PyTorch's order (`[out, in]` for a matrix).

        Args:
          name: the name of the tensor.
          part: the slice of each axis, without steps. By default, the whole tensor is read.
        """

    def grid(self, name: str, part: tuple[slice, ...]) -> np.ndarray | None:
        """Return the scales and offsets of a matrix `[out, in]` that is stored in 4 bits.

        Args:
          name: the name of the tensor.
          part: the slice of each axis. The inputs are whole groups.

        Returns:
          The scale and the offset of each group of 32 inputs, `[out, G, 2]`, or None if the matrix
          is stored in another form. Its values are `code * scale + offset`, with codes from 0 to
          15.
        """

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
        self.weight_files = self._files()
        self._file_of: dict[str, SafetensorsFile] = {}
        for file in map(SafetensorsFile, self.weight_files):
            for name in file.names:
                if name in self._file_of:
                    raise UserError(
                        f"{file.path}: tensor {shortened(name)} is in another file as well"
                    )
                self._file_of[name] = file

    @property
    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor that can be read."""
        return self._file_of[name].shape(name)

    def read(self, name: str, part: tuple[slice, ...] = ()) -> np.ndarray:
        """Read a tensor, or a part of it, in its stored dtype, but float64 as float32."""
        return self._file_of[name].read(name, part)

    def grid(self, name: str, part: tuple[slice, ...]) -> np.ndarray | None:
        """Return None: no tensor is stored in 4 bits."""
        return None

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
