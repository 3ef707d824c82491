"""Configs of public models, so that a plan needs no network.

The values are those of `config.json` of each repository on the Hugging Face Hub, whose name is in
the comment above it. Fields that do not change the plan are left out.
"""

from collections.abc import Mapping
from typing import Any


def _llama(
    hidden: int, inner: int, layers: int, heads: int, head: int, factor: float, tied: bool = False
) -> dict[str, Any]:
    """Return the config of a Llama 3.1 or 3.2 model. All have 8 key-value heads."""
    return {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": head,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }


def _qwen3(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int = 8, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_theta": 1_000_000.0,
        **more,
    }


def _gemma3(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, head: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "gemma3_text",
        "vocab_size": 262_208,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "query_pre_attn_scalar": 256,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        **more,
    }


def _t5(hidden: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    """Return the config of a T5 1.1 model, which the LM-adapted models share."""
    return {
        "model_type": "t5",
        "vocab_size": 32_128,
        "d_model": hidden,
        "d_ff": inner,
        "d_kv": 64,
        "num_heads": heads,
        "num_layers": layers,
        "num_decoder_layers": layers,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    }


PUBLIC_MODELS: Mapping[str, dict[str, Any]] = {
    # meta-llama/Llama-3.2-1B and -3B, meta-llama/Llama-3.1-8B, -70B and -405B
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 64, 32.0, tied=True),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, 128, 32.0, tied=True),
    "llama-3.1-8b": _llama(4096, 14_336, 32, 32, 128, 8.0),
    "llama-3.1-70b": _llama(8192, 28_672, 80, 64, 128, 8.0),
    "llama-3.1-405b": _llama(16_384, 53_248, 126, 128, 128, 8.0),
    # Qwen/Qwen3-8B, Qwen3-32B and Qwen3-30B-A3B
    "qwen3-8b": _qwen3(4096, 12_288, 36, 32),
    "qwen3-32b": _qwen3(5120, 25_600, 64, 64),
    "qwen3-30b-a3b": _qwen3(
        2048,
        6144,
        48,
        32,
        kv_heads=4,
        model_type="qwen3_moe",
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    ),
    # google/gemma-3-1b-pt, and the text models of gemma-3-4b-pt and gemma-3-27b-pt
    "gemma-3-1b": _gemma3(1152, 6912, 26, 4, 1, 256, vocab_size=262_144, sliding_window=512),
    "gemma-3-4b": _gemma3(2560, 10_240, 34, 8, 4, 256),
    "gemma-3-27b": _gemma3(5376, 21_504, 62, 32, 16, 128, query_pre_attn_scalar=168),
    # google/t5-v1_1-base, -large, -xl and -xxl
    "t5-v1.1-base": _t5(768, 2048, 12, 12),
    "t5-v1.1-large": _t5(1024, 2816, 24, 16),
    "t5-v1.1-xl": _t5(2048, 5120, 24, 32),
    "t5-v1.1-xxl": _t5(4096, 10_240, 24, 64),
}
