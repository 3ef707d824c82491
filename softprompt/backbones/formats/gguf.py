"""A base model as a GGUF file.

The format is described at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. This module
parses the metadata itself, because the `gguf` package takes twenty seconds for a large
vocabulary. It uses the package to dequantize tensors.
"""

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedTokenizerFast

from softprompt.backbones.formats.gguf_tokenizer import read_tokenizer
from softprompt.backbones.formats.tokenizer import GuardedTokenizer, library_errors
from softprompt.errors import UserError

_MODEL_TYPES = {"gemma3": "gemma3_text"}  # the model types whose GGUF names differ
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_SUPPORTED_TYPES = ["F32", "F16", *(kind.name for kind in gguf.quants._type_traits)]
# Errors that parsing a damaged file can raise.
_DAMAGE = (ValueError, TypeError, KeyError, ArithmeticError, RecursionError, struct.error)


class GGUFFile:
    """A base model in a GGUF file.

    Raises:
      UserError: if the file is not a GGUF file, is damaged, or has unsupported content.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._fields, self._tensors = _parse(self._data)
            self.config = self._config()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except _DAMAGE as error:
            raise UserError(f"{path}: not a readable GGUF file ({error})") from error

    def _get(self, key: str, default: Any = None) -> Any:
        return self._fields.get(key, default)

    def _config(self) -> dict[str, Any]:
        kind = self._get("general.architecture")

        def get(key: str, default: Any = None) -> Any:
            return self._get(f"{kind}.{key}", default)

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
            "rope_scaling": self._rope_scaling(get),
            "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            # Also if None: the default ids of transformers can be other tokens here.
            "bos_token_id": self._get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self._get("tokenizer.ggml.padding_token_id"),
        }
        if head_size and get("rope.dimension_count"):
            config["partial_rotary_factor"] = get("rope.dimension_count") / head_size
        if kind in ("gemma3", "phi3"):
            config["sliding_window"] = get("attention.sliding_window")
        if kind == "phi3":  # its class in transformers does not look in `rope_scaling`
            config["original_max_position_embeddings"] = self._original_length(get)
        if kind == "gemma3":
            config["rope_local_base_freq"] = get("rope.freq_base_swa", 10_000.0)
            # The file lacks the scale. Only the largest model differs (Gemma 3 report).
            largest = config["num_hidden_layers"] == 62
            config["query_pre_attn_scalar"] = hidden_size // num_heads if largest else head_size
        return config

    def _rope_scaling(self, get: Any) -> dict[str, Any] | None:
        """Return the `rope_scaling` that a `config.json` would have."""
        original = {"original_max_position_embeddings": self._original_length(get)}
        for name in ("rope_freqs.weight", "rope_factors_short.weight"):
            if name in self._tensors:  # the divisor of each frequency
                return original | {
                    "rope_type": "longrope",
                    "short_factor": self.read(name).tolist(),
                    "long_factor": self.read(name.replace("short", "long")).tolist(),
                    "attention_factor": get("rope.scaling.attn_factor", 1.0),
                }
        scaling = get("rope.scaling.type")
        if scaling in (None, "none"):
            return None
        return original | {"rope_type": scaling, "factor": get("rope.scaling.factor")}

    def _original_length(self, get: Any) -> int | None:
        """Return the context window before the rotary embedding was scaled."""
        return get("rope.scaling.original_context_length", get("context_length"))

    @property
    def names(self) -> set[str]:
        """The names of all tensors except those of the rotary embedding, which `config` holds."""
        return {name for name in self._tensors if not name.startswith("rope_")}

    def read(self, name: str) -> np.ndarray:
        """Read a tensor in float32, with its axes in PyTorch's order (`[out, in]` for a matrix)."""
        tensor = self._tensors[name]
        try:
            kind = gguf.GGMLQuantizationType(tensor.kind)
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
            data = np.frombuffer(self._data, np.uint8, math.prod(shape), tensor.offset)
            return gguf.quants.dequantize(data.reshape(shape), kind)
        except NotImplementedError as error:
            raise UserError(
                f"{self.path}: tensor {name} is stored as {kind.name}, which is not supported "
                f"(supported: {', '.join(_SUPPORTED_TYPES)})"
            ) from error
        except ValueError as error:
            raise UserError(f"{self.path}: tensor {name} is damaged ({error})") from error

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Make the tokenizer that the metadata describe."""
        with library_errors(f"{self.path}: its tokenizer cannot be read"):
            try:
                inner, special = read_tokenizer(self._get)
            except UserError as error:
                raise UserError(f"{self.path}: {error}") from None
            return GuardedTokenizer(inner, **special)


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """The location of a tensor.

    Attributes:
      shape: in PyTorch's axis order.
      kind: the number of its type.
      offset: in the file, in bytes.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int


def _parse(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    """Return the metadata and tensors of a GGUF file.

    Raises:
      One of `_DAMAGE` if the file is damaged.
    """
    position = 0

    def take(form: str) -> Any:
        nonlocal position
        values = struct.unpack_from("<" + form, data, position)
        position += struct.calcsize("<" + form)
        return values[0] if len(values) == 1 else values

    def text() -> str:
        nonlocal position
        length = take("Q")
        if length > len(data) - position:
            raise ValueError("it ends too early")
        position += length
        return data[position - length : position].decode()

    def value(kind: int) -> Any:
        nonlocal position
        if kind == _STRING:
            return text()
        if kind != _ARRAY:
            return take(_SCALARS[kind])
        item_kind, count = take("IQ")
        if count > len(data) - position:
            raise ValueError("it ends too early")
        if item_kind in (_STRING, _ARRAY):
            return [value(item_kind) for _ in range(count)]
        values = np.frombuffer(data, np.dtype("<" + _SCALARS[item_kind]), count, position)
        position += values.nbytes
        return values.tolist()

    magic, version, tensor_count, field_count = take("4sIQQ")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError("not a little-endian GGUF file of version 2 or 3")
    fields = {text(): value(take("I")) for _ in range(field_count)}
    found = {}
    for _ in range(tensor_count):
        name, dimensions = text(), take("I")
        shape = tuple(take("Q") for _ in range(dimensions))[::-1]
        found[name] = _Tensor(shape, *take("IQ"))
    alignment = fields.get("general.alignment", 32)
    start = -(-position // alignment) * alignment
    tensors = {
        name: dataclasses.replace(tensor, offset=start + tensor.offset)
        for name, tensor in found.items()
    }
    return fields, tensors
