"""Tables of tensor names: where the files of each model family store the parameters.

A table maps the path of a module in `Decoder` or `T5` to a tensor name without its suffix
`.weight` or `.bias`. `{layer}` and `{expert}` stand for numbers. If an entry has several names,
the first one that the file contains is read; writing uses the first name for gated feed-forward
layers and the second one for others. If a tensor is not simply the module's matrix, the entry is
a `Stored`, which describes the conversion.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Parts = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Form:
    """A conversion between a tensor in a file and the parameters of one or more modules.

    Both functions work along the first axis only. They therefore apply to matrices `[out, in]`,
    biases `[out]` and the `[out, R]` matrices of LoRA.

    Attributes:
      split: takes a tensor and the architecture and returns the parts, one per module. It raises
        `ValueError` if the tensor has the wrong size.
      join: takes the parts and the architecture and returns the tensor.
    """

    split: Callable[[np.ndarray, Any], Parts]
    join: Callable[[Parts, Any], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor that must be converted to obtain a module's parameter.

    Attributes:
      name: the tensor's name.
      form: the conversion.
      part: the index of the module's part.
      transposed: whether the file stores matrices as `[in, out]`.
    """

    name: str
    form: Form
    part: int = 0
    transposed: bool = False


Names = Mapping[str, str | tuple[str, ...] | Stored]


def module_and_suffix(path: tuple[Any, ...]) -> tuple[str, str]:
    """Return the module of a parameter and the suffix of its tensor name.

    Args:
      path: the path of the parameter in the backbone.
    """
    *module, last = map(str, path)
    if last not in ("table", "kernel", "scale", "bias"):  # the parameter has an entry of its own
        module.append(last)
    return ".".join(module), ".bias" if last == "bias" else ".weight"


def _split_query_key_value(array: np.ndarray, arch: Any) -> Parts:
    kv = arch.num_kv_heads * arch.head_size
    ends = np.cumsum([arch.num_heads * arch.head_size, kv, kv])
    if len(array) != ends[-1]:
        raise ValueError
    return tuple(np.split(array, ends[:-1]))


def _split_heads(array: np.ndarray, arch: Any) -> Parts:
    parts = array.reshape(arch.num_heads, 3, arch.head_size, *array.shape[1:])
    return tuple(parts[:, part].reshape(-1, *array.shape[1:]) for part in range(3))


def _join_heads(parts: Parts, arch: Any) -> np.ndarray:
    shape = arch.num_heads, arch.head_size, *parts[0].shape[1:]
    stacked = np.stack([part.reshape(shape) for part in parts], axis=1)
    return stacked.reshape(-1, *parts[0].shape[1:])


def _interleaved(heads: str) -> Form:
    """Return the conversion for rows in which the two members of each rotary pair are adjacent.

    In the backbone, the members of pair i are i and i + h/2.

    Args:
      heads: the field of the architecture with the number of heads.
    """

    def split(array: np.ndarray, arch: Any) -> Parts:
        pairs = array.reshape(getattr(arch, heads), -1, 2, *array.shape[1:])
        return (pairs.swapaxes(1, 2).reshape(array.shape),)

    def join(parts: Parts, arch: Any) -> np.ndarray:
        (array,) = parts
        halves = array.reshape(getattr(arch, heads), 2, -1, *array.shape[1:])
        return halves.swapaxes(1, 2).reshape(array.shape)

    return Form(split, join)


def _concatenate(parts: Parts, arch: Any) -> np.ndarray:
    return np.concatenate(parts)


WHOLE = Form(lambda array, arch: (array,), lambda parts, arch: parts[0])
QUERY_KEY_VALUE = Form(_split_query_key_value, _concatenate)
BY_HEAD = Form(_split_heads, _join_heads)  # query, key and value of each head in turn
HALVES = Form(lambda array, arch: tuple(np.split(array, 2)), _concatenate)
ZERO_CENTERED = Form(  # the scale of a norm, stored minus 1
    lambda array, arch: (array.astype(np.float32) + 1,), lambda parts, arch: parts[0] - 1
)
OFFSET_BY_TWO = Form(  # learned positions that start with two rows for padding
    lambda array, arch: (array[2:],), lambda parts, arch: np.pad(parts[0], [(2, 0), (0, 0)])
)

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
    "layers.attention_norm": Stored(_LAYER + "input_layernorm", ZERO_CENTERED),
    "layers.feed_forward_norm": Stored(_LAYER + "post_attention_layernorm", ZERO_CENTERED),
    "norm": Stored("model.norm", ZERO_CENTERED),
}

GEMMA2: Names = {
    **GEMMA,
    "layers.attention_norm_behind": Stored(_LAYER + "post_attention_layernorm", ZERO_CENTERED),
    "layers.feed_forward_norm": Stored(_LAYER + "pre_feedforward_layernorm", ZERO_CENTERED),
    "layers.feed_forward_norm_behind": Stored(_LAYER + "post_feedforward_layernorm", ZERO_CENTERED),
    "layers.query_norm": Stored(_LAYER + "self_attn.q_norm", ZERO_CENTERED),
    "layers.key_norm": Stored(_LAYER + "self_attn.k_norm", ZERO_CENTERED),
}

PHI3: Names = {
    **LLAMA,
    "layers.attention.query": Stored(_LAYER + "self_attn.qkv_proj", QUERY_KEY_VALUE, 0),
    "layers.attention.key": Stored(_LAYER + "self_attn.qkv_proj", QUERY_KEY_VALUE, 1),
    "layers.attention.value": Stored(_LAYER + "self_attn.qkv_proj", QUERY_KEY_VALUE, 2),
    "layers.feed_forward.gate": Stored(_LAYER + "mlp.gate_up_proj", HALVES, 0),
    "layers.feed_forward.up": Stored(_LAYER + "mlp.gate_up_proj", HALVES, 1),
}

_NEOX_LAYER = "gpt_neox.layers.{layer}."

GPT_NEOX: Names = {
    "embedding": "gpt_neox.embed_in",
    "layers.attention_norm": _NEOX_LAYER + "input_layernorm",
    "layers.attention.query": Stored(_NEOX_LAYER + "attention.query_key_value", BY_HEAD, 0),
    "layers.attention.key": Stored(_NEOX_LAYER + "attention.query_key_value", BY_HEAD, 1),
    "layers.attention.value": Stored(_NEOX_LAYER + "attention.query_key_value", BY_HEAD, 2),
    "layers.attention.output": _NEOX_LAYER + "attention.dense",
    "layers.feed_forward_norm": _NEOX_LAYER + "post_attention_layernorm",
    "layers.feed_forward.up": _NEOX_LAYER + "mlp.dense_h_to_4h",
    "layers.feed_forward.down": _NEOX_LAYER + "mlp.dense_4h_to_h",
    "norm": "gpt_neox.final_layer_norm",
    "head": "embed_out",
}

_GPT2_LAYER = "transformer.h.{layer}."
_GPT2_ATTENTION = _GPT2_LAYER + "attn.c_attn"

GPT2: Names = {
    "embedding": "transformer.wte",
    "positions": "transformer.wpe",
    "layers.attention_norm": _GPT2_LAYER + "ln_1",
    "layers.attention.query": Stored(_GPT2_ATTENTION, QUERY_KEY_VALUE, 0, transposed=True),
    "layers.attention.key": Stored(_GPT2_ATTENTION, QUERY_KEY_VALUE, 1, transposed=True),
    "layers.attention.value": Stored(_GPT2_ATTENTION, QUERY_KEY_VALUE, 2, transposed=True),
    "layers.attention.output": Stored(_GPT2_LAYER + "attn.c_proj", WHOLE, transposed=True),
    "layers.feed_forward_norm": _GPT2_LAYER + "ln_2",
    "layers.feed_forward.up": Stored(_GPT2_LAYER + "mlp.c_fc", WHOLE, transposed=True),
    "layers.feed_forward.down": Stored(_GPT2_LAYER + "mlp.c_proj", WHOLE, transposed=True),
    "norm": "transformer.ln_f",
    "head": "lm_head",
}

_OPT_LAYER = "model.decoder.layers.{layer}."

OPT: Names = {
    "embedding": "model.decoder.embed_tokens",
    "positions": Stored("model.decoder.embed_positions", OFFSET_BY_TWO),
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
    """Return the entries that exist in both the encoder and the decoder of T5."""
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
    "layers.attention.query": Stored(_BLOCK + "attn_q", _interleaved("num_heads")),
    "layers.attention.key": Stored(_BLOCK + "attn_k", _interleaved("num_kv_heads")),
}

GGUF_PHI3: Names = {
    **GGUF,
    "layers.attention.query": Stored(_BLOCK + "attn_qkv", QUERY_KEY_VALUE, 0),
    "layers.attention.key": Stored(_BLOCK + "attn_qkv", QUERY_KEY_VALUE, 1),
    "layers.attention.value": Stored(_BLOCK + "attn_qkv", QUERY_KEY_VALUE, 2),
    "layers.feed_forward.gate": Stored(_BLOCK + "ffn_up", HALVES, 0),
    "layers.feed_forward.up": Stored(_BLOCK + "ffn_up", HALVES, 1),
}
