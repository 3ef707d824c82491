"""A model as a directory: `config.json`, safetensors and a tokenizer, in the hub's form."""

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerFast

from softprompt.errors import UserError


class ModelFile(Protocol):
    """A model on disk."""

    @property
    def path(self) -> Path:
        """Where it is."""

    @property
    def config(self) -> dict[str, Any]:
        """What its `config.json` says, or would say."""

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""

    def read(self, name: str) -> np.ndarray:
        """A tensor, its axes in PyTorch's order (`[out, in]` for a matrix)."""

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Its tokenizer."""


class ModelDirectory:
    """A `ModelFile` in a directory, its tensors in one or several safetensors files.

    Raises `UserError` if a file is missing or damaged.
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
        """Names of all tensors."""
        return set(self._file_of)

    def read(self, name: str) -> np.ndarray:
        """A tensor in the type it is stored in."""
        return np.asarray(self._file_of[name].get_tensor(name))

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer of `tokenizer.json` and the files beside it."""
        try:
            return PreTrainedTokenizerFast.from_pretrained(self.path, local_files_only=True)
        except Exception as error:  # of every kind, by what is wrong in which file
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"{self.path}: its tokenizer cannot be loaded ({reason})") from error

    def _read_config(self) -> dict[str, Any]:
        path = self.path / "config.json"
        try:
            config = json.loads(path.read_text())
        except FileNotFoundError:
            raise UserError(f"{self.path}: no config.json there") from None
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
                pickled = (
                    ""
                    if not any(self.path.glob("*.bin"))
                    else (
                        "; PyTorch .bin files are not read, for unpickling one can run any code: "
                        "convert them to safetensors"
                    )
                )
                raise UserError(f"{file}: no such file{pickled}")
        return files
