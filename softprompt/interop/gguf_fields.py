"""The metadata of a GGUF file that describe the architecture of a model.

llama.cpp's `convert_hf_to_gguf.py` writes the same keys and values.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from softprompt.backbones.architecture import Architecture
from softprompt.backbones.loading import Base
from softprompt.interop.merged_config import merged_config

_ARCHITECTURES = {"gemma3_text": "gemma3"}  # the model types whose GGUF names differ


def architecture_name(base: Base) -> str:
    """Return the name of a model family in GGUF files."""
    return _ARCHITECTURES.get(base.config["model_type"], base.config["model_type"])


def architecture_fields(base: Base) -> dict[str, Any]:
    """Return the metadata of a model. The keys do not include the name of the architecture."""
    arch, config = base.backbone.arch, merged_config(base, 1, untied=False)
    fields: dict[str, Any] = {
        "block_count": len(arch.layers),
        "context_length": config.get("max_position_embeddings") or arch.context_length,
        "embedding_length": arch.hidden_size,
        "feed_forward_length": arch.feed_forward_size,
        "attention.head_count": arch.num_heads,
        "attention.head_count_kv": arch.num_kv_heads,
        "attention.key_length": arch.head_size,
        "attention.value_length": arch.head_size,
        "attention.layer_norm_rms_epsilon": arch.norm_epsilon,
        "rope.dimension_count": 2 * len(arch.layers[0].rope.frequencies),
        "rope.freq_base": _theta(config),
        **_scaling_fields(arch, config),
    }
    if config["model_type"] == "gemma3_text":
        fields["rope.freq_base_swa"] = float(config.get("rope_local_base_freq", 10_000.0))
    windows = [kind.window for kind in arch.layers if kind.window is not None]
    return fields | ({"attention.sliding_window": windows[0]} if windows else {})


def rope_tensors(base: Base) -> dict[str, np.ndarray]:
    """Return the tensors that describe the rotary embedding beside the metadata, if any."""
    config = merged_config(base, 1, untied=False)
    scaling = config.get("rope_scaling") or {}
    kind = _kind(scaling)
    if config["model_type"] == "llama" and kind in ("llama3", "longrope"):
        found = np.array(base.backbone.arch.layers[0].rope.frequencies)
        plain = _theta(config) ** (-np.arange(len(found)) / len(found))
        return {"rope_freqs.weight": (plain / found).astype(np.float32)}
    if config["model_type"] == "phi3" and kind == "longrope":
        return {
            f"rope_factors_{length}.weight": np.array(scaling[f"{length}_factor"], np.float32)
            for length in ("long", "short")
        }
    return {}


def differing_fields(wanted: Any, found: Any) -> list[str]:
    """Return the fields in which two dataclasses differ by more than rounding to float32."""
    names = [field.name for field in dataclasses.fields(wanted)]
    return [name for name in names if not _close(getattr(wanted, name), getattr(found, name))]


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-5)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_close, a, b))
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        return not differing_fields(a, b)
    return bool(a == b)


def _scaling_fields(arch: Architecture, config: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata about the scaling of the rotary embedding."""
    scaling = config.get("rope_scaling") or {}
    kind = _kind(scaling)
    if kind == "longrope" and config["model_type"] == "phi3":
        return {
            "rope.scaling.original_context_length": arch.context_length,
            "rope.scaling.attn_factor": arch.layers[0].rope.factor,  # type: ignore[union-attr]
        }
    if kind not in ("linear", "yarn"):
        return {}
    fields = {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
    original = scaling.get("original_max_position_embeddings")
    return fields | ({"rope.scaling.original_context_length": int(original)} if original else {})


def _theta(config: dict[str, Any]) -> float:
    default = 1_000_000.0 if config["model_type"] == "gemma3_text" else 10_000.0
    return float(config.get("rope_theta") or default)


def _kind(scaling: dict[str, Any]) -> str:
    return str(scaling.get("rope_type", scaling.get("type", "default")))
