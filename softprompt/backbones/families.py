"""What tells model families apart: how each writes its architecture and names its tensors.

A family is data: a function from a `config.json` to an `Architecture`, and a table from
the decoder's parameters to the names used in safetensors files. GGUF files use one set
of names for all families; `GGUF_NAMES` maps to those.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from softprompt.backbones.decoder import Architecture
from softprompt.errors import UserError

Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
      architecture: reads a `config.json`.
      names: parameter path in `Decoder` -> tensor name, `{layer}` standing for its number.
    """

    architecture: Callable[[Config], Architecture]
    names: Mapping[str, str]


def _require(config: Config, key: str, default: Any, supported: Any) -> None:
    value = config.get(key, default)
    if value != supported:
        raise UserError(
            f"{key} {value!r} of a {config['model_type']} model is not supported "
            f"(supported: {supported!r})"
        )


def _rope_theta(config: Config) -> float:
    """The rotary base, from the forms that transformers 4 and 5 write."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"rope type {kind!r} is not supported (supported: 'default')")
    return float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0)


def _llama(config: Config) -> Architecture:
    _require(config, "hidden_act", "silu", "silu")
    _require(config, "attention_bias", False, False)
    _require(config, "mlp_bias", False, False)
    heads = config["num_attention_heads"]
    return Architecture(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        feed_forward_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or config["hidden_size"] // heads,
        context_length=config.get("max_position_embeddings", 2048),
        rope_theta=_rope_theta(config),
        norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
        tied_head=config.get("tie_word_embeddings", False),
    )


_LAYER = "model.layers.{layer}."

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        _llama,
        {
            "embedding": "model.embed_tokens.weight",
            "layers.attention_norm.scale": _LAYER + "input_layernorm.weight",
            "layers.query.kernel": _LAYER + "self_attn.q_proj.weight",
            "layers.key.kernel": _LAYER + "self_attn.k_proj.weight",
            "layers.value.kernel": _LAYER + "self_attn.v_proj.weight",
            "layers.output.kernel": _LAYER + "self_attn.o_proj.weight",
            "layers.feed_forward_norm.scale": _LAYER + "post_attention_layernorm.weight",
            "layers.gate.kernel": _LAYER + "mlp.gate_proj.weight",
            "layers.up.kernel": _LAYER + "mlp.up_proj.weight",
            "layers.down.kernel": _LAYER + "mlp.down_proj.weight",
            "norm.scale": "model.norm.weight",
            "head.kernel": "lm_head.weight",
        },
    ),
}

GGUF_NAMES: Mapping[str, str] = {
    "embedding": "token_embd.weight",
    "layers.attention_norm.scale": "blk.{layer}.attn_norm.weight",
    "layers.query.kernel": "blk.{layer}.attn_q.weight",
    "layers.key.kernel": "blk.{layer}.attn_k.weight",
    "layers.value.kernel": "blk.{layer}.attn_v.weight",
    "layers.output.kernel": "blk.{layer}.attn_output.weight",
    "layers.feed_forward_norm.scale": "blk.{layer}.ffn_norm.weight",
    "layers.gate.kernel": "blk.{layer}.ffn_gate.weight",
    "layers.up.kernel": "blk.{layer}.ffn_up.weight",
    "layers.down.kernel": "blk.{layer}.ffn_down.weight",
    "norm.scale": "output_norm.weight",
    "head.kernel": "output.weight",
}


def family_of(config: Config) -> Family:
    """The family of a `config.json`; `UserError` with the list if there is none."""
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise UserError(
            f"model type {model_type!r} is not supported (supported: {', '.join(sorted(FAMILIES))})"
        )
    return FAMILIES[model_type]
