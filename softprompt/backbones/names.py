"""Where the files of each model family keep a backbone's parameters.

A table leads from a module of `Decoder` or `T5` to the tensors' name, `{layer}` and
`{expert}` standing for numbers; `.weight` or `.bias` is added. Of several names the first
that the file has counts. Where a file keeps more or something else than a module's own
matrix, `Stored` says how to take it out.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor that holds a module's parameter in another form.

    Attributes:
      name: the tensor's.
      take: from the tensor as stored, and the architecture, the parameter in PyTorch's axis
        order (`[out, in]` for a matrix, `[out]` for its bias). `ValueError` if it cannot.
    """

    name: str
    take: Callable[[np.ndarray, Any], np.ndarray]


Names = Mapping[str, str | tuple[str, ...] | Stored]


def _query_key_value(number: int) -> Callable[[np.ndarray, Any], np.ndarray]:
    """Queries (0), keys (1) or values (2), one below the other."""

    def take(array: np.ndarray, arch: Any) -> np.ndarray:
        kv = arch.num_kv_heads * arch.head_size
        ends = np.cumsum([arch.num_heads * arch.head_size, kv, kv])
        if len(array) != ends[-1]:
            raise ValueError
        return np.split(array, ends[:-1])[number]

    return take


def _half(number: int) -> Callable[[np.ndarray, Any], np.ndarray]:
    """The upper (0) or the lower (1) half."""
    return lambda array, arch: np.split(array, 2)[number]


def _transposed(array: np.ndarray, arch: Any) -> np.ndarray:
    return array.T


def _transposed_query_key_value(number: int) -> Callable[[np.ndarray, Any], np.ndarray]:
    return lambda array, arch: _query_key_value(number)(array.T, arch)


def _by_head(number: int) -> Callable[[np.ndarray, Any], np.ndarray]:
    """Queries (0), keys (1) or values (2), which alternate from head to head."""

    def take(array: np.ndarray, arch: Any) -> np.ndarray:
        parts = array.reshape(arch.num_heads, 3, arch.head_size, *array.shape[1:])
        return parts[:, number].reshape(-1, *array.shape[1:])

    return take


def _from_zero(array: np.ndarray, arch: Any) -> np.ndarray:
    """A norm's scale, kept as its difference from 1."""
    return array.astype(np.float32) + 1


def _from_third(array: np.ndarray, arch: Any) -> np.ndarray:
    """Learned positions of which the first two belong to padding."""
    return array[2:]


def _halves_from_pairs(heads: str) -> Callable[[np.ndarray, Any], np.ndarray]:
    """Rows of a matrix whose rotary pairs are next to each other, put half by half."""

    def take(array: np.ndarray, arch: Any) -> np.ndarray:
        pairs = array.reshape(getattr(arch, heads), -1, 2, *array.shape[1:])
        return pairs.swapaxes(1, 2).reshape(array.shape)

    return take


_LAYER = "model.layers.{layer}."

LLAMA: Names = {
    "embedding": "model.embed_tokens",
    "layers.attention_norm": _LAYER + "input_layernorm",
    "layers.attention.query": _LAYER + "self_attn.q_proj",
    "layers.attention.key": _LAYER + "self_attn.k_proj",
    "layers.attention.value": _LAYER + "self_attn.v_proj",
    "layers.attention.output": _LAYER + "self_attn.o_proj",
    "layers.query_norm": _LAYER + "self_attn.q_norm",
    "layers.key_norm": _LAYER + "self_attn.k_norm",
    "layers.feed_forward_norm": _LAYER + "post_attention_layernorm",
    "layers.feed_forward.gate": _LAYER + "mlp.gate_proj",
    "layers.feed_forward.up": _LAYER + "mlp.up_proj",
    "layers.feed_forward.down": _LAYER + "mlp.down_proj",
    "layers.feed_forward.router": _LAYER + "mlp.gate",
    "layers.feed_forward.experts.gate": _LAYER + "mlp.experts.{expert}.gate_proj",
    "layers.feed_forward.experts.up": _LAYER + "mlp.experts.{expert}.up_proj",
    "layers.feed_forward.experts.down": _LAYER + "mlp.experts.{expert}.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}

OLMO2: Names = {
    **LLAMA,
    "layers.attention_norm_behind": _LAYER + "post_attention_layernorm",
    "layers.feed_forward_norm_behind": _LAYER + "post_feedforward_layernorm",
}

GEMMA: Names = {
    **LLAMA,
    "layers.attention_norm": Stored(_LAYER + "input_layernorm", _from_zero),
    "layers.feed_forward_norm": Stored(_LAYER + "post_attention_layernorm", _from_zero),
    "norm": Stored("model.norm", _from_zero),
}

GEMMA2: Names = {
    **GEMMA,
    "layers.attention_norm_behind": Stored(_LAYER + "post_attention_layernorm", _from_zero),
    "layers.feed_forward_norm": Stored(_LAYER + "pre_feedforward_layernorm", _from_zero),
    "layers.feed_forward_norm_behind": Stored(_LAYER + "post_feedforward_layernorm", _from_zero),
    "layers.query_norm": Stored(_LAYER + "self_attn.q_norm", _from_zero),
    "layers.key_norm": Stored(_LAYER + "self_attn.k_norm", _from_zero),
}

PHI3: Names = {
    **LLAMA,
    "layers.attention.query": Stored(_LAYER + "self_attn.qkv_proj", _query_key_value(0)),
    "layers.attention.key": Stored(_LAYER + "self_attn.qkv_proj", _query_key_value(1)),
    "layers.attention.value": Stored(_LAYER + "self_attn.qkv_proj", _query_key_value(2)),
    "layers.feed_forward.gate": Stored(_LAYER + "mlp.gate_up_proj", _half(0)),
    "layers.feed_forward.up": Stored(_LAYER + "mlp.gate_up_proj", _half(1)),
}

_NEOX_LAYER = "gpt_neox.layers.{layer}."

GPT_NEOX: Names = {
    "embedding": "gpt_neox.embed_in",
    "layers.attention_norm": _NEOX_LAYER + "input_layernorm",
    "layers.attention.query": Stored(_NEOX_LAYER + "attention.query_key_value", _by_head(0)),
    "layers.attention.key": Stored(_NEOX_LAYER + "attention.query_key_value", _by_head(1)),
    "layers.attention.value": Stored(_NEOX_LAYER + "attention.query_key_value", _by_head(2)),
    "layers.attention.output": _NEOX_LAYER + "attention.dense",
    "layers.feed_forward_norm": _NEOX_LAYER + "post_attention_layernorm",
    "layers.feed_forward.up": _NEOX_LAYER + "mlp.dense_h_to_4h",
    "layers.feed_forward.down": _NEOX_LAYER + "mlp.dense_4h_to_h",
    "norm": "gpt_neox.final_layer_norm",
    "head": "embed_out",
}

_GPT2_LAYER = "transformer.h.{layer}."

GPT2: Names = {
    "embedding": "transformer.wte",
    "positions": "transformer.wpe",
    "layers.attention_norm": _GPT2_LAYER + "ln_1",
    "layers.attention.query": Stored(_GPT2_LAYER + "attn.c_attn", _transposed_query_key_value(0)),
    "layers.attention.key": Stored(_GPT2_LAYER + "attn.c_attn", _transposed_query_key_value(1)),
    "layers.attention.value": Stored(_GPT2_LAYER + "attn.c_attn", _transposed_query_key_value(2)),
    "layers.attention.output": Stored(_GPT2_LAYER + "attn.c_proj", _transposed),
    "layers.feed_forward_norm": _GPT2_LAYER + "ln_2",
    "layers.feed_forward.up": Stored(_GPT2_LAYER + "mlp.c_fc", _transposed),
    "layers.feed_forward.down": Stored(_GPT2_LAYER + "mlp.c_proj", _transposed),
    "norm": "transformer.ln_f",
    "head": "lm_head",
}

_OPT_LAYER = "model.decoder.layers.{layer}."

OPT: Names = {
    "embedding": "model.decoder.embed_tokens",
    "positions": Stored("model.decoder.embed_positions", _from_third),
    "layers.attention_norm": _OPT_LAYER + "self_attn_layer_norm",
    "layers.attention.query": _OPT_LAYER + "self_attn.q_proj",
    "layers.attention.key": _OPT_LAYER + "self_attn.k_proj",
    "layers.attention.value": _OPT_LAYER + "self_attn.v_proj",
    "layers.attention.output": _OPT_LAYER + "self_attn.out_proj",
    "layers.feed_forward_norm": _OPT_LAYER + "final_layer_norm",
    "layers.feed_forward.up": _OPT_LAYER + "fc1",
    "layers.feed_forward.down": _OPT_LAYER + "fc2",
    "norm": "model.decoder.final_layer_norm",
    "head": "lm_head",
}


def _t5_side(side: str, feed_forward: int) -> dict[str, str | tuple[str, ...]]:
    """The half of T5's table that its encoder and its decoder have alike."""
    layer = f"{side}.block.{{layer}}.layer."
    attention, last = layer + "0.", f"{layer}{feed_forward}."
    return {
        f"{side}_bias": f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias",
        f"{side}.attention_norm": attention + "layer_norm",
        f"{side}.attention.query": attention + "SelfAttention.q",
        f"{side}.attention.key": attention + "SelfAttention.k",
        f"{side}.attention.value": attention + "SelfAttention.v",
        f"{side}.attention.output": attention + "SelfAttention.o",
        f"{side}.feed_forward_norm": last + "layer_norm",
        f"{side}.feed_forward.gate": last + "DenseReluDense.wi_0",
        f"{side}.feed_forward.up": (last + "DenseReluDense.wi_1", last + "DenseReluDense.wi"),
        f"{side}.feed_forward.down": last + "DenseReluDense.wo",
        f"{side}_norm": f"{side}.final_layer_norm",
    }


_CROSS = "decoder.block.{layer}.layer.1."

T5: Names = {
    "embedding": "shared",
    **_t5_side("encoder", 1),
    **_t5_side("decoder", 2),
    "decoder.cross_norm": _CROSS + "layer_norm",
    "decoder.cross.query": _CROSS + "EncDecAttention.q",
    "decoder.cross.key": _CROSS + "EncDecAttention.k",
    "decoder.cross.value": _CROSS + "EncDecAttention.v",
    "decoder.cross.output": _CROSS + "EncDecAttention.o",
    "head": "lm_head",
}

_BLOCK = "blk.{layer}."

GGUF: Names = {
    "embedding": "token_embd",
    "layers.attention_norm": _BLOCK + "attn_norm",
    "layers.attention.query": _BLOCK + "attn_q",
    "layers.attention.key": _BLOCK + "attn_k",
    "layers.attention.value": _BLOCK + "attn_v",
    "layers.attention.output": _BLOCK + "attn_output",
    "layers.query_norm": _BLOCK + "attn_q_norm",
    "layers.key_norm": _BLOCK + "attn_k_norm",
    "layers.attention_norm_behind": _BLOCK + "post_attention_norm",
    "layers.feed_forward_norm": _BLOCK + "ffn_norm",
    "layers.feed_forward_norm_behind": _BLOCK + "post_ffw_norm",
    "layers.feed_forward.gate": _BLOCK + "ffn_gate",
    "layers.feed_forward.up": _BLOCK + "ffn_up",
    "layers.feed_forward.down": _BLOCK + "ffn_down",
    "norm": "output_norm",
    "head": "output",
}

GGUF_LLAMA: Names = {
    **GGUF,
    "layers.attention.query": Stored(_BLOCK + "attn_q", _halves_from_pairs("num_heads")),
    "layers.attention.key": Stored(_BLOCK + "attn_k", _halves_from_pairs("num_kv_heads")),
}

GGUF_PHI3: Names = {
    **GGUF,
    "layers.attention.query": Stored(_BLOCK + "attn_qkv", _query_key_value(0)),
    "layers.attention.key": Stored(_BLOCK + "attn_qkv", _query_key_value(1)),
    "layers.attention.value": Stored(_BLOCK + "attn_qkv", _query_key_value(2)),
    "layers.feed_forward.gate": Stored(_BLOCK + "ffn_up", _half(0)),
    "layers.feed_forward.up": Stored(_BLOCK + "ffn_up", _half(1)),
}
