"""Config, tensors and tokenizer out of a GGUF file, without torch.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf`
package parses the file and dequantises its tensors.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from softprompt.errors import UserError

_MODEL_TYPES = {"gemma3": "gemma3_text"}  # where `general.architecture` has another name

_CONTROL, _USER_DEFINED = 3, 4  # token types that are matched whole, before any splitting

# Pre-tokenizers of byte-level BPE, by the name the file gives.
_PRE_TOKENIZERS = {
    "smollm": lambda: [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ],
}


class GGUFFile:
    """A GGUF file: `config` as a `config.json` would say it, tensors, and the tokenizer.

    Raises `UserError` if the file is no GGUF file or holds something unsupported.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
        except Exception as error:  # of every kind, by where the file is damaged
            raise UserError(f"{path}: not a readable GGUF file ({error})") from error
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.config = self._config()

    def _get(self, key: str, default: Any = None) -> Any:
        return self._fields[key].contents() if key in self._fields else default

    def _config(self) -> dict[str, Any]:
        kind = self._get("general.architecture")

        def get(key: str, default: Any = None) -> Any:
            return self._get(f"{kind}.{key}", default)

        embedding = self._tensors.get("token_embd.weight")
        config = {
            "model_type": _MODEL_TYPES.get(kind, kind),
            "vocab_size": int(embedding.shape[1]) if embedding else None,
            "hidden_size": get("embedding_length"),
            "intermediate_size": get("feed_forward_length"),
            "num_hidden_layers": get("block_count"),
            "num_attention_heads": get("attention.head_count"),
            "num_key_value_heads": get("attention.head_count_kv"),
            "head_dim": get("attention.key_length"),
            "max_position_embeddings": get("context_length"),
            "rope_parameters": self._rope(get),
            "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
            "tie_word_embeddings": "output.weight" not in self._tensors,
        }
        if kind in ("gemma3", "phi3"):
            config["sliding_window"] = get("attention.sliding_window")
        if kind == "gemma3":
            full = config.pop("rope_parameters")
            near = {"rope_theta": get("rope.freq_base_swa", 10_000.0)}
            config["rope_parameters"] = {"full_attention": full, "sliding_attention": near}
            # The file does not say; only the largest model scales otherwise (Gemma 3 report).
            largest = config["num_hidden_layers"] == 62
            across = config["hidden_size"] // config["num_attention_heads"]
            config["query_pre_attn_scalar"] = across if largest else config["head_dim"]
        return config

    def _rope(self, get: Any) -> dict[str, Any]:
        """Rotary embedding as a `config.json` would say it."""
        rope = {"rope_theta": get("rope.freq_base", 10_000.0)}
        head_size = get("attention.key_length")
        if head_size is None and get("embedding_length") and get("attention.head_count"):
            head_size = get("embedding_length") // get("attention.head_count")
        if head_size and get("rope.dimension_count"):
            rope["partial_rotary_factor"] = get("rope.dimension_count") / head_size
        for name in ("rope_freqs.weight", "rope_factors_short.weight"):
            if name in self._tensors:  # what a scaling divides each frequency by
                return rope | {
                    "rope_type": "longrope",
                    "short_factor": self.read(name).tolist(),
                    "attention_factor": get("rope.scaling.attn_factor", 1.0),
                    "original_max_position_embeddings": get(
                        "rope.scaling.original_context_length", get("context_length")
                    ),
                }
        scaling = get("rope.scaling.type")
        if scaling in (None, "none"):
            return rope
        return rope | {"rope_type": scaling, "factor": get("rope.scaling.factor")}

    @property
    def names(self) -> set[str]:
        """Names of all tensors but those of the rotary embedding, which `config` has."""
        return {name for name in self._tensors if not name.startswith("rope_")}

    def read(self, name: str) -> np.ndarray:
        """A tensor in float32, its axes in PyTorch's order (`[out, in]` for a matrix)."""
        tensor = self._tensors[name]
        try:
            return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UserError(
                f"{self.path}: tensor {name} is stored as {tensor.tensor_type.name}, "
                "which is not supported"
            ) from error

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that the file's metadata describe."""
        try:
            inner, special = self._tokenizer()
            return PreTrainedTokenizerFast(tokenizer_object=inner, **special)
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise UserError(f"{self.path}: its tokenizer cannot be read ({error})") from error

    def _tokenizer(self) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
        kind, pre = self._get("tokenizer.ggml.model"), self._get("tokenizer.ggml.pre")
        if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
            raise UserError(
                f"{self.path}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported "
                f"(supported: 'gpt2' with {', '.join(map(repr, _PRE_TOKENIZERS))})"
            )
        tokens = self._get("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ")) for merge in self._get("tokenizer.ggml.merges")]
        bpe = models.BPE({token: i for i, token in enumerate(tokens)}, merges)
        tokenizer = tokenizers.Tokenizer(bpe)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_PRE_TOKENIZERS[pre]())
        tokenizer.decoder = decoders.ByteLevel()
        if self._get("tokenizer.ggml.add_bos_token"):
            bos = self._get("tokenizer.ggml.bos_token_id")
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
            )
        types = self._get("tokenizer.ggml.token_type")
        tokenizer.add_tokens(
            [
                tokenizers.AddedToken(token, special=kind == _CONTROL, normalized=False)
                for token, kind in zip(tokens, types, strict=True)
                if kind in (_CONTROL, _USER_DEFINED)
            ]
        )
        special = {
            name: tokens[self._get(f"tokenizer.ggml.{key}_token_id")]
            for name, key in [
                ("bos_token", "bos"),
                ("eos_token", "eos"),
                ("unk_token", "unknown"),
                ("pad_token", "padding"),
            ]
            if f"tokenizer.ggml.{key}_token_id" in self._fields
        }
        return tokenizer, special | {"chat_template": self._get("tokenizer.chat_template")}
