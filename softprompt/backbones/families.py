"""The supported model families: how each describes its architecture in `config.json`.

A family is a function from a config, checked by `config.py`, to an architecture, and tables of
tensor names (`formats/names.py`). `docs/adding-a-family.md` shows how to add one.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from softprompt.backbones.architecture import Architecture, LayerKind
from softprompt.backbones.formats import names as named
from softprompt.backbones.rope import make_rope
from softprompt.backbones.t5_block import T5Architecture
from softprompt.errors import UserError, shortened

Config = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
      architecture: makes an architecture from the content of `config.json`.
      names: the tensor names in safetensors files.
      gguf_names: the tensor names in GGUF files; None if GGUF files are not supported.
    """

    architecture: Callable[[Config], Architecture | T5Architecture]
    names: named.Names
    gguf_names: named.Names | None = None


_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def _activation(name: Any) -> str:
    if name not in _ACTIVATIONS:
        raise UserError(
            f"activation {name!r} is not supported (supported: {', '.join(_ACTIVATIONS)})"
        )
    return _ACTIVATIONS[name]


def _with_defaults(config: Config, **defaults: Any) -> Config:
    """Return the config with these values for keys that it lacks."""
    return defaults | config


def _require(config: Config, key: str, supported: Any) -> None:
    """Reject a config whose `key` has a value other than the supported one or null."""
    if config.get(key) not in (None, supported):
        raise UserError(
            f"{key} {shortened(config[key])} of a {config['model_type']} model is not supported "
            f"(supported: {supported!r})"
        )


def _rope_parameters(config: Config, theta: float = 10_000.0, partial: float = 1.0) -> Config:
    """Return rope parameters in the form of transformers 5, also for configs of version 4."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = {
        "rope_theta": config.get("rope_theta") or theta,
        "partial_rotary_factor": config.get("partial_rotary_factor", partial),
    } | given
    if "original_max_position_embeddings" in config:
        original = config["original_max_position_embeddings"]
        found["original_max_position_embeddings"] = original
    return found


def _windows(config: Config, default_types: Sequence[str], window: Any) -> list[int | None]:
    """Return the window of each layer, by the `layer_types` of the config if it has them."""
    windows = {"full_attention": None, "sliding_attention": window}
    types = config.get("layer_types") or default_types
    if unknown := set(types) - set(windows):
        kind = shortened(min(unknown))
        raise UserError(f"layer type {kind} is not supported (supported: {', '.join(windows)})")
    if len(types) != config["num_hidden_layers"]:
        raise ValueError(f"{len(types)} layer_types")
    return [windows[kind] for kind in types]


def _like_llama(config: Config, **changes: Any) -> Architecture:
    """Return an architecture like Llama's, with `changes` to its fields."""
    num_heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // num_heads
    context_length = config.get("max_position_embeddings", 2048)
    if "layers" not in changes:
        rope = make_rope(_rope_parameters(config), head_size, context_length)
        changes["layers"] = (LayerKind(rope),) * config["num_hidden_layers"]
    fields = {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "feed_forward_size": config["intermediate_size"],
        "num_heads": num_heads,
        "num_kv_heads": config.get("num_key_value_heads") or num_heads,
        "head_size": head_size,
        "context_length": context_length,
        "norm_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "tied_head": config.get("tie_word_embeddings", False),
        "activation": _activation(config.get("hidden_act", "silu")),
        "attention_bias": config.get("attention_bias", False),
        "output_bias": config.get("attention_bias", False),
        "feed_forward_bias": config.get("mlp_bias", False),
    }
    return Architecture(**(fields | changes))


def _layers(
    config: Config, parameters: Config, windows: Sequence[int | None]
) -> tuple[LayerKind, ...]:
    """Return layers with the same rotary embedding and individual windows."""
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = make_rope(parameters, size, config.get("max_position_embeddings", 2048))
    return tuple(LayerKind(rope, window) for window in windows)


def _mistral(config: Config) -> Architecture:
    windows = [config.get("sliding_window", 4096)] * config["num_hidden_layers"]
    return _like_llama(config, layers=_layers(config, _rope_parameters(config), windows))


def _qwen(config: Config, **changes: Any) -> Architecture:
    full = config.get("max_window_layers", 28)
    types = [
        "sliding_attention" if i >= full else "full_attention"
        for i in range(config["num_hidden_layers"])
    ]
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    windows = _windows(config, types, window)
    return _like_llama(config, layers=_layers(config, _rope_parameters(config), windows), **changes)


def _qwen2(config: Config) -> Architecture:
    return _qwen(config, attention_bias=True, output_bias=False)


def _qwen3(config: Config) -> Architecture:
    return _qwen(_with_defaults(config, head_dim=128), query_key_norm="head")


def _qwen3_moe(config: Config) -> Architecture:
    _require(config, "decoder_sparse_step", 1)
    _require(config, "mlp_only_layers", [])
    return _qwen(
        config | {"max_window_layers": 0, "layer_types": None},
        query_key_norm="head",
        feed_forward_size=config["moe_intermediate_size"],
        num_experts=config.get("num_experts") or config["num_local_experts"],
        experts_per_token=config["num_experts_per_tok"],
        normalized_experts=config.get("norm_topk_prob", False),
    )


def _gemma(config: Config, **changes: Any) -> Architecture:
    _require(config, "use_bidirectional_attention", False)
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation in (None, "gelu"):  # early configs; the models were trained with tanh
        activation = "gelu_pytorch_tanh"
    config = _with_defaults(config, tie_word_embeddings=True, head_dim=256)
    return _like_llama(
        config | {"hidden_act": activation}, embedding_scale=config["hidden_size"] ** 0.5, **changes
    )


def _gemma_with_post_norms(
    config: Config, layers: tuple[LayerKind, ...], **changes: Any
) -> Architecture:
    return _gemma(
        config,
        layers=layers,
        norm_behind=True,
        attention_scale=config.get("query_pre_attn_scalar", 256) ** -0.5,
        logit_softcap=config.get("final_logit_softcapping"),
        **changes,
    )


def _gemma2(config: Config) -> Architecture:
    config = _with_defaults(
        config, attn_logit_softcapping=50.0, final_logit_softcapping=30.0, head_dim=256
    )
    types = [
        "full_attention" if i % 2 else "sliding_attention"
        for i in range(config["num_hidden_layers"])
    ]
    windows = _windows(config, types, config.get("sliding_window", 4096))
    layers = _layers(config, _rope_parameters(config), windows)
    return _gemma_with_post_norms(
        config, layers, attention_softcap=config["attn_logit_softcapping"]
    )


def _gemma3(config: Config) -> Architecture:
    config = _with_defaults(config, head_dim=256)
    every = config.get("sliding_window_pattern", 6)
    types = [
        "full_attention" if (i + 1) % every == 0 else "sliding_attention"
        for i in range(config["num_hidden_layers"])
    ]
    windows = _windows(config, types, config.get("sliding_window", 4096))
    ropes = config.get("rope_parameters") or {}
    if "full_attention" not in ropes:  # a config of transformers 4
        ropes = {
            "full_attention": _rope_parameters(config, 1_000_000.0),
            "sliding_attention": {"rope_theta": config.get("rope_local_base_freq", 10_000.0)},
        }
    full = _layers(config, ropes["full_attention"], windows)
    sliding = _layers(config, ropes["sliding_attention"], windows)
    layers = tuple(a if a.window is None else b for a, b in zip(full, sliding, strict=True))
    return _gemma_with_post_norms(config, layers, query_key_norm="head")


def _phi3(config: Config) -> Architecture:
    parameters = dict(_rope_parameters(config))
    context_length = config.get("max_position_embeddings", 4096)
    if parameters.get("rope_type", parameters.get("type", "default")) != "default":
        parameters["rope_type"] = "longrope"  # earlier names were "su" and "yarn"
        parameters.setdefault("original_max_position_embeddings", 4096)
        context_length = parameters["original_max_position_embeddings"]
    windows = [config.get("sliding_window")] * config["num_hidden_layers"]
    layers = _layers(config, parameters, windows)
    return _like_llama(config, layers=layers, context_length=context_length)


def _olmo2(config: Config) -> Architecture:
    return _like_llama(config, norm_before=False, norm_behind=True, query_key_norm="width")


def _smollm3(config: Config) -> Architecture:
    config = _with_defaults(config, tie_word_embeddings=True)
    count, every = config["num_hidden_layers"], config.get("no_rope_layer_interval", 4)
    rotated = config.get("no_rope_layers") or [(i + 1) % every for i in range(count)]
    windowed = config.get("use_sliding_window") or config.get("layer_types")
    window = config.get("sliding_window") if windowed else None
    types = ["full_attention" if rotates else "sliding_attention" for rotates in rotated]
    windows = _windows(config, types, window)
    rotating = _layers(config, _rope_parameters(config, 2_000_000.0), windows)
    layers = tuple(
        layer if rotates else LayerKind(layer.rope.identity, layer.window)  # type: ignore[union-attr]
        for layer, rotates in zip(rotating, rotated, strict=True)
    )
    return _like_llama(config, layers=layers)


def _granite(config: Config) -> Architecture:
    return _like_llama(
        config,
        attention_scale=float(config.get("attention_multiplier", 1.0)),
        embedding_scale=float(config.get("embedding_multiplier", 1.0)),
        residual_scale=float(config.get("residual_multiplier", 1.0)),
        logit_scale=1 / config.get("logits_scaling", 1.0),
    )


def _stablelm(config: Config) -> Architecture:
    _require(config, "qk_layernorm", False)
    _require(config, "use_parallel_residual", False)
    windows = [None] * config["num_hidden_layers"]
    return _like_llama(
        config,
        layers=_layers(config, _rope_parameters(config, partial=0.25), windows),
        norm="layer",
        norm_epsilon=float(config.get("layer_norm_eps", 1e-5)),
        attention_bias=config.get("use_qkv_bias", False),
        output_bias=False,
    )


def _gpt_neox(config: Config) -> Architecture:
    parameters = _rope_parameters(
        config, config.get("rotary_emb_base", 10_000.0), config.get("rotary_pct", 0.25)
    )
    bias = config.get("attention_bias", True)
    return _like_llama(
        _with_defaults(config, hidden_act="gelu"),
        layers=_layers(config, parameters, [None] * config["num_hidden_layers"]),
        norm="layer",
        norm_epsilon=float(config.get("layer_norm_eps", 1e-5)),
        attention_bias=bias,
        output_bias=bias,
        gated=False,
        feed_forward_bias=True,
        parallel=config.get("use_parallel_residual", True),
    )


_BEFORE_ROPE = {  # options shared by models from before rotary embedding
    "norm": "layer",
    "gated": False,
    "feed_forward_bias": True,
    "learned_positions": True,
}


def _gpt2(config: Config) -> Architecture:
    _require(config, "scale_attn_weights", True)
    _require(config, "scale_attn_by_inverse_layer_idx", False)
    _require(config, "add_cross_attention", False)
    llama = {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["n_embd"],
        "intermediate_size": config.get("n_inner") or 4 * config["n_embd"],
        "num_attention_heads": config["n_head"],
        "max_position_embeddings": config.get("n_positions", 1024),
        "rms_norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "hidden_act": config.get("activation_function", "gelu_new"),
        "tie_word_embeddings": config.get("tie_word_embeddings", True),
        "attention_bias": True,
    }
    return _like_llama(llama, layers=(LayerKind(None),) * config["n_layer"], **_BEFORE_ROPE)


def _opt(config: Config) -> Architecture:
    _require(config, "do_layer_norm_before", True)
    _require(config, "_remove_final_layer_norm", False)
    _require(config, "layer_norm_elementwise_affine", True)
    _require(config, "word_embed_proj_dim", config["hidden_size"])
    llama = {
        "tie_word_embeddings": True,
        "intermediate_size": config["ffn_dim"],
        "rms_norm_eps": 1e-5,
        "hidden_act": config.get("activation_function", "relu"),
        "attention_bias": config.get("enable_bias", True),
    }
    bias = {"feed_forward_bias": config.get("enable_bias", True)}
    layers = (LayerKind(None),) * config["num_hidden_layers"]
    return _like_llama(_with_defaults(config, **llama), layers=layers, **(_BEFORE_ROPE | bias))


def _t5(config: Config) -> T5Architecture:
    *gate, activation = config.get("feed_forward_proj", "relu").split("-")
    if gate not in ([], ["gated"]):
        raise UserError(f"feed_forward_proj {config['feed_forward_proj']!r} is not supported")
    # v1.0 ties and scales its head, v1.1 does neither. transformers 5 names the scale separately.
    tied: Any = config.get("tie_word_embeddings", True)
    scaled = config.get("scale_decoder_outputs", tied)
    return T5Architecture(
        vocab_size=config["vocab_size"],
        hidden_size=config["d_model"],
        feed_forward_size=config["d_ff"],
        num_heads=config["num_heads"],
        head_size=config["d_kv"],
        num_encoder_layers=config["num_layers"],
        num_decoder_layers=config.get("num_decoder_layers") or config["num_layers"],
        context_length=config.get("n_positions", 512),
        num_buckets=config.get("relative_attention_num_buckets", 32),
        max_distance=config.get("relative_attention_max_distance", 128),
        norm_epsilon=float(config.get("layer_norm_epsilon", 1e-6)),
        start_token=config.get("decoder_start_token_id", 0),
        tied_head=tied,
        activation=_activation("gelu_new" if gate and activation == "gelu" else activation),
        gated=gate == ["gated"],
        scaled_head=None if scaled == tied else scaled,
    )


FAMILIES: Mapping[str, Family] = {
    "llama": Family(_like_llama, named.LLAMA, named.GGUF_LLAMA),
    "mistral": Family(_mistral, named.LLAMA),
    "qwen2": Family(_qwen2, named.LLAMA, named.GGUF),
    "qwen3": Family(_qwen3, named.LLAMA, named.GGUF),
    "qwen3_moe": Family(_qwen3_moe, named.LLAMA),
    "gemma": Family(_gemma, named.GEMMA),
    "gemma2": Family(_gemma2, named.GEMMA2),
    "gemma3_text": Family(_gemma3, named.GEMMA2, named.GGUF),
    "phi3": Family(_phi3, named.PHI3, named.GGUF_PHI3),
    "olmo2": Family(_olmo2, named.OLMO2),
    "smollm3": Family(_smollm3, named.LLAMA),
    "granite": Family(_granite, named.LLAMA),
    "stablelm": Family(_stablelm, named.LLAMA),
    "gpt2": Family(_gpt2, named.GPT2),
    "gpt_neox": Family(_gpt_neox, named.GPT_NEOX),
    "opt": Family(_opt, named.OPT),
    "t5": Family(_t5, named.T5),
}


def family_of(config: Config) -> Family:
    """Return the family of a config.

    Raises:
      UserError: if the family is not supported.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"model type {shortened(model_type)} is not supported (supported: {known})")
    return FAMILIES[model_type]
