"""Where the files of each model family keep a backbone's parameters.

A table leads from a module of `Decoder` or `T5` to the tensors' name, `{layer}` and
`{expert}` standing for numbers; `.weight` or `.bias` is added. Of several names the first
that the file has counts; what is written has the first if its layers have a gate. Where a
file keeps more or something else than a module's own matrix, `Stored` says in which form.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Parts = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Form:
    """How a tensor holds one or several modules' matrices, or something else than a matrix.

    All that these functions do is along the first axis, so that they serve matrices
    `[out, in]`, biases `[out]` and the `[out, R]` of LoRA alike.

    Attributes:
      apart: from the tensor, and the architecture, to its parts. `ValueError` if it cannot.
      together: from the parts to the tensor.
    """

    apart: Callable[[np.ndarray, Any], Parts]
    together: Callable[[Parts, Any], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor that holds a module's parameter in another form.

    Attributes:
      name: the tensor's.
      form: which.
      part: the module's.
      transposed: whether a matrix is `[in, out]`.
    """

    name: str
    form: Form
    part: int = 0
    transposed: bool = False


Names = Mapping[str, str | tuple[str, ...] | Stored]


def place_of(path: tuple[Any, ...]) -> tuple[str, str]:
    """The module that a backbone's parameter belongs to, and what its tensor's name ends with."""
    *module, last = map(str, path)
    if last not in ("table", "kernel", "scale", "bias"):  # a parameter that is its own module
        module.append(last)
    return ".".join(module), ".bias" if last == "bias" else ".weight"


def _query_key_value_apart(array: np.ndarray, arch: Any) -> Parts:
    kv = arch.num_kv_heads * arch.head_size
    ends = np.cumsum([arch.num_heads * arch.head_size, kv, kv])
    if len(array) != ends[-1]:
        raise ValueError
    return tuple(np.split(array, ends[:-1]))


def _by_head_apart(array: np.ndarray, arch: Any) -> Parts:
    parts = array.reshape(arch.num_heads, 3, arch.head_size, *array.shape[1:])
    return tuple(parts[:, part].reshape(-1, *array.shape[1:]) for part in range(3))


def _by_head_together(parts: Parts, arch: Any) -> np.ndarray:
    shape = arch.num_heads, arch.head_size, *parts[0].shape[1:]
    stacked = np.stack([part.reshape(shape) for part in parts], axis=1)
    return stacked.reshape(-1, *parts[0].shape[1:])


def _pairs(heads: str) -> Form:
    """Rows whose rotary pairs are next to each other, put half by half."""

    def apart(array: np.ndarray, arch: Any) -> Parts:
        pairs = array.reshape(getattr(arch, heads), -1, 2, *array.shape[1:])
        return (pairs.swapaxes(1, 2).reshape(array.shape),)

    def together(parts: Parts, arch: Any) -> np.ndarray:
        (array,) = parts
        halves = array.reshape(getattr(arch, heads), 2, -1, *array.shape[1:])
        return halves.swapaxes(1, 2).reshape(array.shape)

    return Form(apart, together)


def _joined(parts: Parts, arch: Any) -> np.ndarray:
    return np.concatenate(parts)


WHOLE = Form(lambda array, arch: (array,), lambda parts, arch: parts[0])
QUERY_KEY_VALUE = Form(_query_key_value_apart, _joined)
BY_HEAD = Form(_by_head_apart, _by_head_together)  # queries, keys, values, from head to head
HALVES = Form(lambda array, arch: tuple(np.split(array, 2)), _joined)
FROM_ZERO = Form(  # a norm's scale, kept as its difference from 1
    lambda array, arch: (array.astype(np.float32) + 1,), lambda parts, arch: parts[0] - 1
)
FROM_THIRD = Form(  # learned positions, the first two of which belong to padding
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
    "layers.attention_norm": Stored(_LAYER + "input_layernorm", FROM_ZERO),
    "layers.feed_forward_norm": Stored(_LAYER + "post_attention_layernorm", FROM_ZERO),
    "norm": Stored("model.norm", FROM_ZERO),
}

GEMMA2: Names = {
    **GEMMA,
    "layers.attention_norm_behind": Stored(_LAYER + "post_attention_layernorm", FROM_ZERO),
    "layers.feed_forward_norm": Stored(_LAYER + "pre_feedforward_layernorm", FROM_ZERO),
    "layers.feed_forward_norm_behind": Stored(_LAYER + "post_feedforward_layernorm", FROM_ZERO),
    "layers.query_norm": Stored(_LAYER + "self_attn.q_norm", FROM_ZERO),
    "layers.key_norm": Stored(_LAYER + "self_attn.k_norm", FROM_ZERO),
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
_GPT2_MIXED = _GPT2_LAYER + "attn.c_attn"

GPT2: Names = {
    "embedding": "transformer.wte",
    "positions": "transformer.wpe",
    "layers.attention_norm": _GPT2_LAYER + "ln_1",
    "layers.attention.query": Stored(_GPT2_MIXED, QUERY_KEY_VALUE, 0, transposed=True),
    "layers.attention.key": Stored(_GPT2_MIXED, QUERY_KEY_VALUE, 1, transposed=True),
    "layers.attention.value": Stored(_GPT2_MIXED, QUERY_KEY_VALUE, 2, transposed=True),
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
    "positions": Stored("model.decoder.embed_positions", FROM_THIRD),
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
    "layers.attention.query": Stored(_BLOCK + "attn_q", _pairs("num_heads")),
    "layers.attention.key": Stored(_BLOCK + "attn_k", _pairs("num_kv_heads")),
}

GGUF_PHI3: Names = {
    **GGUF,
    "layers.attention.query": Stored(_BLOCK + "attn_qkv", QUERY_KEY_VALUE, 0),
    "layers.attention.key": Stored(_BLOCK + "attn_qkv", QUERY_KEY_VALUE, 1),
    "layers.attention.value": Stored(_BLOCK + "attn_qkv", QUERY_KEY_VALUE, 2),
    "layers.feed_forward.gate": Stored(_BLOCK + "ffn_up", HALVES, 0),
    "layers.feed_forward.up": Stored(_BLOCK + "ffn_up", HALVES, 1),
}
