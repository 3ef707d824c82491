"""A base model as a directory with `config.json`, safetensors and a tokenizer, as on the hub."""

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerFast

from softprompt.backbones.formats.tokenizer_files import read_tokenizer_files
from softprompt.errors import UserError


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
        self.config = self._read_config()
        self._file_of: dict[str, Any] = {}
        for file in self._files():
            try:
                opened = safe_open(file, framework="flax")
            except SafetensorError as error:
                raise UserError(f"{file}: not a readable safetensors file ({error})") from error
            self._file_of |= dict.fromkeys(opened.keys(), opened)

    @property
    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._file_of)

    def read(self, name: str) -> np.ndarray:
        """Read a tensor in its stored dtype."""
        return np.asarray(self._file_of[name].get_tensor(name))

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Make the tokenizer from `tokenizer.json` and the files next to it."""
        return read_tokenizer_files(self.path)

    def _read_config(self) -> dict[str, Any]:
        path = self.path / "config.json"
        try:
            config = json.loads(path.read_text())
        except FileNotFoundError:
            raise UserError(f"{self.path}: contains no config.json") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error})") from error
        if not isinstance(config, dict):
            raise UserError(f"{path}: not a JSON object")
        return config

    def _files(self) -> list[Path]:
        index = self.path / "model.safetensors.index.json"
        files = [self.path / "model.safetensors"]
        if index.is_file():
            try:
                shards = set(json.loads(index.read_text())["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{index}: not a safetensors index ({error})") from error
            files = sorted(self.path / str(shard) for shard in shards)
        for file in files:
            if file.parent != self.path or not file.is_file():
                advice = ""
                if any(self.path.glob("*.bin")):
                    advice = (
                        "; PyTorch .bin files are not supported because unpickling can run any "
                        "code: convert them to safetensors"
                    )
                raise UserError(f"{file}: no such file{advice}")
        return files
