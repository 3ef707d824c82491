"""The check of a config, and the architecture that it describes.

A config comes from outside. The types and ranges of its fields are checked before anything is
computed from them or allocated. No existing model comes near the largest sizes. They are small
enough that the number of elements of every parameter fits in 63 bits.
"""

from collections.abc import Collection
from typing import Annotated, Any

import pydantic
from pydantic import Field

from softprompt.backbones.architecture import Architecture
from softprompt.backbones.families import family_of
from softprompt.backbones.t5_block import T5Architecture
from softprompt.errors import UserError
from softprompt.files.json_files import checked

Layers = Annotated[int, Field(ge=1, le=2**12)]
Experts = Annotated[int, Field(ge=0, le=2**12)]
Heads = Annotated[int, Field(ge=1, le=2**12)]
HeadSize = Annotated[int, Field(ge=1, le=2**14)]
Width = Annotated[int, Field(ge=1, le=2**17)]
InnerWidth = Annotated[int, Field(ge=1, le=2**20)]
Vocabulary = Annotated[int, Field(ge=1, le=2**24)]
Positions = Annotated[int, Field(ge=1, le=2**30)]
Length = Annotated[float, Field(ge=1, le=2**30)]  # some files have 8192.0
Epsilon = Annotated[float, Field(ge=1e-12, le=1)]
Theta = Annotated[float, Field(gt=1, le=1e15)]
Share = Annotated[float, Field(gt=0, le=1)]
Factor = Annotated[float, Field(ge=1e-6, le=1e6)]
Factors = Annotated[list[Factor], Field(max_length=2**13)]
NonNegative = Annotated[float, Field(ge=0, le=1e6)]
Name = Annotated[str, Field(max_length=100)]

# Fields for which null differs from a missing field.
_NULL_HAS_A_MEANING = (
    "head_dim",
    "sliding_window",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)


class _Fields(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class RopeFields(_Fields):
    """The parameters of a rotary embedding."""

    rope_type: Name | None = None
    type: Name | None = None
    rope_theta: Theta | None = None
    partial_rotary_factor: Share | None = None
    original_max_position_embeddings: Length | None = None
    factor: Factor | None = None
    attention_factor: Factor | None = None
    low_freq_factor: Factor | None = None
    high_freq_factor: Factor | None = None
    beta_fast: NonNegative | None = None
    beta_slow: NonNegative | None = None
    mscale: NonNegative | None = None
    mscale_all_dim: NonNegative | None = None
    truncate: bool | None = None
    short_factor: Factors | None = None


class RopesFields(RopeFields):
    """The parameters of one rotary embedding for all layers, or of one for each type of layer."""

    full_attention: RopeFields | None = None
    sliding_attention: RopeFields | None = None


class ConfigFields(_Fields):
    """The fields of all families. Each family reads some of them; see `families.py`."""

    tie_word_embeddings: bool | None = None
    scale_decoder_outputs: bool | None = None
    vocab_size: Vocabulary | None = None
    # Widths.
    hidden_size: Width | None = None
    n_embd: Width | None = None
    d_model: Width | None = None
    intermediate_size: InnerWidth | None = None
    moe_intermediate_size: InnerWidth | None = None
    n_inner: InnerWidth | None = None
    ffn_dim: InnerWidth | None = None
    d_ff: InnerWidth | None = None
    # Heads, layers and experts.
    num_attention_heads: Heads | None = None
    num_key_value_heads: Heads | None = None
    n_head: Heads | None = None
    num_heads: Heads | None = None
    head_dim: HeadSize | None = None
    d_kv: HeadSize | None = None
    num_hidden_layers: Layers | None = None
    n_layer: Layers | None = None
    num_layers: Layers | None = None
    num_decoder_layers: Layers | None = None
    num_experts: Experts | None = None
    num_local_experts: Experts | None = None
    num_experts_per_tok: Experts | None = None
    norm_topk_prob: bool | None = None
    # Positions and attention.
    max_position_embeddings: Positions | None = None
    n_positions: Positions | None = None
    original_max_position_embeddings: Positions | None = None
    sliding_window: Positions | None = None
    use_sliding_window: bool | None = None
    max_window_layers: Annotated[int, Field(ge=0, le=2**30)] | None = None
    sliding_window_pattern: Layers | None = None
    no_rope_layer_interval: Layers | None = None
    layer_types: Annotated[list[Name], Field(max_length=2**12)] | None = None
    no_rope_layers: (
        Annotated[list[Annotated[int, Field(ge=0, le=1)]], Field(max_length=2**12)] | None
    ) = None
    rope_theta: Theta | None = None
    rope_local_base_freq: Theta | None = None
    rotary_emb_base: Theta | None = None
    rotary_pct: Share | None = None
    partial_rotary_factor: Share | None = None
    rope_parameters: RopesFields | None = None
    rope_scaling: RopesFields | None = None
    relative_attention_num_buckets: Annotated[int, Field(ge=4, le=2**16)] | None = None
    relative_attention_max_distance: Positions | None = None
    query_pre_attn_scalar: Factor | None = None
    attn_logit_softcapping: Factor | None = None
    attention_multiplier: Factor | None = None
    attention_bias: bool | None = None
    use_qkv_bias: bool | None = None
    # The rest of each layer, and the output.
    hidden_act: Name | None = None
    hidden_activation: Name | None = None
    activation_function: Name | None = None
    feed_forward_proj: Name | None = None
    mlp_bias: bool | None = None
    enable_bias: bool | None = None
    use_parallel_residual: bool | None = None
    rms_norm_eps: Epsilon | None = None
    layer_norm_eps: Epsilon | None = None
    layer_norm_epsilon: Epsilon | None = None
    embedding_multiplier: Factor | None = None
    residual_multiplier: Factor | None = None
    logits_scaling: Factor | None = None
    final_logit_softcapping: Factor | None = None
    decoder_start_token_id: Annotated[int, Field(ge=0, lt=2**24)] | None = None


def architecture_of(
    config: dict[str, Any], tensors: Collection[str]
) -> Architecture | T5Architecture:
    """Return the architecture that a config from outside describes.

    Args:
      config: the content of `config.json`.
      tensors: the names of the tensors in the model's file.

    Raises:
      UserError: if the config is not supported, or names the fields that are wrong.
    """
    family = family_of(config)
    fields = _checked_fields(config)
    unscaled = fields.get("scale_decoder_outputs") is False
    if config["model_type"] == "t5" and unscaled and "lm_head.weight" in tensors:
        # transformers 5 writes that the head is tied even if it is not.
        fields["tie_word_embeddings"] = False
    try:
        return family.architecture(fields)
    except KeyError as error:
        raise UserError(f"its config lacks {error}") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"its config has an invalid value ({error})") from error


def _checked_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Check a config, and leave out fields that are null like missing ones.

    Args:
      config: the content of `config.json`.

    Returns:
      A config in which every field that a family reads has the expected type and range.

    Raises:
      UserError: names the fields that are wrong.
    """
    checked(ConfigFields, config, "its config")
    fields = {
        key: value
        for key, value in config.items()
        if value is not None or key in _NULL_HAS_A_MEANING
    }
    for key in ("rope_parameters", "rope_scaling"):
        if key in fields:
            fields[key] = _without_nulls(fields[key])
    return fields


def _without_nulls(rope: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_nulls(value) if isinstance(value, dict) else value
        for key, value in rope.items()
        if value is not None
    }
