"""The `config.json` of a merged model, in a form that transformers 4 and 5 read alike."""

import math
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from softprompt.backbones.loading import Base

# Class names in transformers that do not follow from the name of the config class.
_CLASSES = {
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "t5": "T5ForConditionalGeneration",
}


def merged_config(base: Base, size: int, *, untied: bool) -> dict[str, Any]:
    """Return the config of a base model with a larger vocabulary.

    Args:
      base: the base model.
      size: number of tokens.
      untied: whether the head no longer shares the table of embeddings.
    """
    kind = base.config["model_type"]
    name = CONFIG_MAPPING_NAMES[kind].removesuffix("Config") + "ForCausalLM"
    # Keep nulls: without the keys, Mistral's window is 4096, and Gemma 2's soft-caps are 50 and 30.
    config = {key: value for key, value in base.config.items() if key != "auto_map"}
    config |= {
        "architectures": [_CLASSES.get(kind, name)],
        "vocab_size": size,
        "dtype": base.compute.dtype,
        "torch_dtype": base.compute.dtype,  # the name before transformers 4.56
    }
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        config.setdefault(key, getattr(base.tokenizer, key))
    if untied:
        config["tie_word_embeddings"] = False
        config.pop("scale_decoder_outputs", None)  # T5's name for it
    if "num_local_experts" in config:  # version 4 ignores this name of Qwen3 MoE
        config["num_experts"] = config.pop("num_local_experts")
    _use_old_rope_names(config)
    return config


def _use_old_rope_names(config: dict[str, Any]) -> None:
    """Describe the rotary embedding as in transformers 4, which version 5 reads as well.

    Version 4 ignores `rope_parameters` without a message.
    """
    parameters = config.pop("rope_parameters", None)
    if parameters:
        if "full_attention" in parameters:  # Gemma 3
            config["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
            parameters = parameters["full_attention"]
        scaling, neox = dict(parameters), config["model_type"] == "gpt_neox"
        for key, old in (
            ("rope_theta", "rotary_emb_base" if neox else "rope_theta"),
            ("partial_rotary_factor", "rotary_pct" if neox else "partial_rotary_factor"),
        ):
            if key in scaling:
                config[old] = scaling.pop(key)
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        config["rope_scaling"] = None if kind == "default" else scaling
    if config["model_type"] == "phi3" and config.get("rope_scaling"):
        config["rope_scaling"] = _phi3_scaling(config)


def _phi3_scaling(config: dict[str, Any]) -> dict[str, Any]:
    """Return the scaling with the three keys that Phi-3's class in transformers 4 allows."""
    scaling = config["rope_scaling"]
    factor = scaling.get("attention_factor")
    original = config["original_max_position_embeddings"]
    scale = config["max_position_embeddings"] / original
    default = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    if factor is not None and not math.isclose(factor, default, rel_tol=1e-5):
        return scaling  # only transformers 5 can express another factor
    return {
        "type": "longrope",
        "short_factor": scaling["short_factor"],
        "long_factor": scaling["long_factor"],
    }
