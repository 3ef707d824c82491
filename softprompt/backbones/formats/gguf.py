"""A base model as a GGUF file. The `gguf` package dequantizes its tensors."""

import mmap
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedTokenizerFast

from softprompt.backbones.formats.gguf_grid import grid_of
from softprompt.backbones.formats.gguf_header import parse_header
from softprompt.backbones.formats.gguf_tokenizer import read_tokenizer
from softprompt.backbones.formats.tokenizer import GuardedTokenizer, library_errors
from softprompt.backbones.quantization import GROUP
from softprompt.errors import UserError, shortened
from softprompt.files.reading import open_file

_MODEL_TYPES = {"gemma3": "gemma3_text"}  # the model types whose GGUF names differ
_SUPPORTED_TYPES = ["F32", "F16", *(kind.name for kind in gguf.quants._type_traits)]
_MAX_FREQUENCIES = 2**13


class GGUFFile:
    """A base model in a GGUF file.

    Raises:
      UserError: if the file is not a GGUF file, is damaged, or has unsupported content.
    """

    def __init__(self, path: Path):
        self.path = path
        self.weight_files = [path]
        try:
            with open_file(path) as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._fields, self._tensors = parse_header(self._data)
            self.config = self._config()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise UserError(f"{path}: not a readable GGUF file ({error})") from None

    def _get(self, key: str, default: Any = None) -> Any:
        return self._fields.get(key, default)

    def _number(self, key: str, default: float | None = None) -> float | None:
        """Return a number of the metadata that is not negative."""
        value = self._get(key)
        if value is None:
            return default
        if type(value) not in (int, float) or not value >= 0:
            raise ValueError(f"metadata {key}: {shortened(value)} is not a number of at least 0")
        return value

    def _text(self, key: str) -> str | None:
        """Return a text of the metadata."""
        value = self._get(key)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"metadata {key}: {shortened(value)} is not a text")
        return value

    def _config(self) -> dict[str, Any]:
        kind = self._text("general.architecture") or ""

        def get(key: str, default: float | None = None) -> Any:
            return self._number(f"{kind}.{key}", default)

        embedding = self._tensors.get("token_embd.weight")
        hidden_size, num_heads = get("embedding_length"), get("attention.head_count")
        head_size = get("attention.key_length")
        if head_size is None and hidden_size and num_heads:
            head_size = hidden_size // num_heads
        # The rotary embedding is described as in transformers 4, which version 5 reads as well.
        config = {
            "model_type": _MODEL_TYPES.get(kind, kind),
            "vocab_size": embedding.shape[0] if embedding else None,
            "hidden_size": hidden_size,
            "intermediate_size": get("feed_forward_length"),
            "num_hidden_layers": get("block_count"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": get("attention.head_count_kv", num_heads),
            "head_dim": head_size,
            "max_position_embeddings": get("context_length"),
            "rope_theta": get("rope.freq_base", 10_000.0),
            "rope_scaling": self._rope_scaling(kind, get),
            "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            # Also if None: the default ids of transformers can be other tokens here.
            "bos_token_id": self._number("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._number("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self._number("tokenizer.ggml.padding_token_id"),
        }
        if head_size and get("rope.dimension_count"):
            config["partial_rotary_factor"] = get("rope.dimension_count") / head_size
        if kind in ("gemma3", "phi3"):
            config["sliding_window"] = get("attention.sliding_window") or None  # 0 in Phi-4
        if kind == "phi3":  # its class in transformers does not look in `rope_scaling`
            config["original_max_position_embeddings"] = self._original_length(get)
        if kind == "gemma3":
            config["rope_local_base_freq"] = get("rope.freq_base_swa", 10_000.0)
            # The file lacks the scale. Only the largest model differs (Gemma 3 report).
            largest = config["num_hidden_layers"] == 62
            if largest and hidden_size and num_heads:
                config["query_pre_attn_scalar"] = hidden_size // num_heads
            else:
                config["query_pre_attn_scalar"] = head_size
        return config

    def _rope_scaling(self, kind: str, get: Any) -> dict[str, Any] | None:
        """Return the `rope_scaling` that a `config.json` would have."""
        original = {"original_max_position_embeddings": self._original_length(get)}
        for name in ("rope_freqs.weight", "rope_factors_short.weight"):
            if name in self._tensors:  # the divisor of each frequency
                return original | {
                    "rope_type": "longrope",
                    "short_factor": self._divisors(name),
                    "long_factor": self._divisors(name.replace("short", "long")),
                    "attention_factor": get("rope.scaling.attn_factor", 1.0),
                }
        scaling = self._text(f"{kind}.rope.scaling.type")
        if scaling in (None, "none"):
            return None
        return original | {"rope_type": scaling, "factor": get("rope.scaling.factor")}

    def _divisors(self, name: str) -> list[float]:
        """Return the values of a tensor of the rotary embedding."""
        if name not in self._tensors:
            raise ValueError(f"tensor {name} is missing")
        shape = self._tensors[name].shape
        if len(shape) != 1 or shape[0] > _MAX_FREQUENCIES:
            raise ValueError(f"tensor {name} has shape {shape}")
        return self.read(name).tolist()

    def _original_length(self, get: Any) -> int | None:
        """Return the context window before the rotary embedding was scaled."""
        return get("rope.scaling.original_context_length", get("context_length"))

    @property
    def names(self) -> set[str]:
        """The names of all tensors except those of the rotary embedding, which `config` holds."""
        return {name for name in self._tensors if not name.startswith("rope_")}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor that can be read."""
        tensor = self._tensors[name]
        if tensor.kind.name not in _SUPPORTED_TYPES:
            raise UserError(
                f"{self.path}: tensor {name} is stored as {tensor.kind.name}, which is not "
                f"supported (supported: {', '.join(_SUPPORTED_TYPES)})"
            )
        return tensor.shape

    def read(self, name: str, part: tuple[slice, ...] = ()) -> np.ndarray:
        """Read a tensor, or a part of it, in float32, with its axes in PyTorch's order.

        Only the rows of the part are dequantized, and of these only the blocks that it touches.

        Args:
          name: the name of the tensor.
          part: the slice of each axis, without steps. By default, the whole tensor is read.
        """
        tensor, shape = self._tensors[name], self.shape(name)
        data = np.frombuffer(self._data, np.uint8, tensor.size, tensor.offset)
        *rows, columns = part or [slice(None)] * len(shape)
        start, end, _ = columns.indices(shape[-1])
        block, block_size = gguf.GGML_QUANT_SIZES[tensor.kind]
        first, last = start // block, -(-end // block)
        blocks = slice(first * block_size, last * block_size)
        with np.errstate(all="ignore"):  # values that are not finite are found later
            stored = data.reshape(*shape[:-1], -1)[*rows, blocks]
            values = gguf.quants.dequantize(stored, tensor.kind)
        return values[..., start - first * block : end - first * block]

    def grid(self, name: str, part: tuple[slice, ...]) -> np.ndarray | None:
        """Return the scales and offsets of a matrix in 4 bits; see `ModelFile.grid`."""
        tensor, shape = self._tensors[name], self.shape(name)
        rows, inputs = part
        data = np.frombuffer(self._data, np.uint8, tensor.size, tensor.offset)
        grid = grid_of(data.reshape(shape[0], -1)[rows], tensor.kind)
        start, end, _ = inputs.indices(shape[-1])
        return None if grid is None else grid[:, start // GROUP : end // GROUP]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Make the tokenizer that the metadata describe."""
        with library_errors(f"{self.path}: its tokenizer cannot be read"):
            try:
                inner, special = read_tokenizer(self._get)
            except UserError as error:
                raise UserError(f"{self.path}: {error}") from None
            return GuardedTokenizer(inner, name_or_path=str(self.path), **special)
