"""Settings of the small models that make_families.py makes for every family."""

DEFAULTS = dict(  # each is used only if the family's config has it
    vocab_size=61,
    hidden_size=16,
    num_hidden_layers=3,
    num_decoder_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=23,
    ffn_dim=23,
    d_ff=23,
    max_position_embeddings=64,
    rms_norm_eps=3e-3,  # large enough to change the results
    layer_norm_eps=3e-3,
    layer_norm_epsilon=3e-3,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def rope(rope_type: str = "default", rope_theta: float = 100.0, **settings) -> dict:
    return dict(rope_type=rope_type, rope_theta=rope_theta, **settings)


YARN = dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=32)
LONGROPE = dict(short_factor=[1.0, 1.3, 1.9], long_factor=[2.0, 5.0, 9.0])
BIASED = dict(attention_bias=True, mlp_bias=True)
FULL, SLIDING = "full_attention", "sliding_attention"
MULTIPLIERS = dict(
    embedding_multiplier=2.5,
    attention_multiplier=0.3,
    residual_multiplier=0.6,
    logits_scaling=1.7,
)
GEMMA3 = dict(intermediate_size=19, head_dim=8, query_pre_attn_scalar=12)
T5 = dict(
    num_attention_heads=3,
    d_kv=6,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=10,
    eos_token_id=1,
    decoder_start_token_id=0,
)
EXPERTS = dict(
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=7,
    head_dim=8,
    vocab_size=67,
)

VARIANTS = {
    "llama-biased": BIASED | dict(num_key_value_heads=4, vocab_size=67),
    "llama-linear": dict(rope_parameters=rope("linear", factor=4.0), num_key_value_heads=1),
    "llama-llama3": dict(
        rope_parameters=rope(
            "llama3",
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,  # puts 1, 2 and 3 frequencies into the three bands
        ),
        head_dim=12,
        tie_word_embeddings=True,
    ),
    "llama-yarn": dict(rope_parameters=rope(**YARN), head_dim=16, tie_word_embeddings=True),
    "llama-yarn-mscale": dict(
        rope_parameters=rope(
            **YARN, mscale=0.7, mscale_all_dim=0.3, beta_fast=4.0, beta_slow=1.0, truncate=False
        ),
        head_dim=16,
        tie_word_embeddings=True,
    ),
    "mistral-window": dict(sliding_window=4),
    "mistral-wide": dict(
        sliding_window=None, head_dim=10, num_key_value_heads=1, tie_word_embeddings=True
    ),
    "qwen2-tied": dict(tie_word_embeddings=True, sliding_window=3),  # unused
    "qwen2-window": dict(use_sliding_window=True, sliding_window=3, max_window_layers=1),
    "qwen3-yarn": dict(
        rope_parameters=rope(**YARN, attention_factor=1.3), head_dim=10, tie_word_embeddings=True
    ),
    "qwen3-window": dict(
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=[SLIDING, FULL, SLIDING],
        head_dim=4,
        num_key_value_heads=4,
    ),
    "gemma-single": dict(head_dim=10, num_key_value_heads=1),
    "gemma-gelu": dict(  # Gemma reads "gelu" as the tanh approximation
        hidden_act="gelu", hidden_size=24, head_dim=6, num_key_value_heads=4
    ),
    "gemma2-capped": dict(
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        query_pre_attn_scalar=10,
        head_dim=8,
        sliding_window=4,
        num_hidden_layers=4,
    ),
    "gemma2-uncapped": dict(
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        query_pre_attn_scalar=5,
        head_dim=6,
        sliding_window=3,
        layer_types=[FULL, SLIDING, FULL],
        num_key_value_heads=1,
        tie_word_embeddings=False,
    ),
    "gemma3_text-linear": GEMMA3
    | dict(
        rope_parameters={SLIDING: rope(), FULL: rope("linear", 1000.0, factor=8.0)},
        sliding_window=4,
        num_hidden_layers=7,
    ),
    "gemma3_text-old": GEMMA3
    | dict(
        rope_parameters={SLIDING: rope(), FULL: rope("linear", 1000.0, factor=8.0)},
        sliding_window=3,
        num_hidden_layers=7,
        num_key_value_heads=1,
    ),
    "gemma3_text-pattern": GEMMA3
    | dict(
        rope_parameters={SLIDING: rope(), FULL: rope(rope_theta=1000.0)},
        sliding_window=4,
        sliding_window_pattern=2,
        final_logit_softcapping=3.0,
    ),
    "phi3-window": dict(sliding_window=4),
    "phi3-longrope": dict(
        rope_parameters=rope("longrope", partial_rotary_factor=0.5, **LONGROPE),
        hidden_size=24,
        num_attention_heads=2,
        num_key_value_heads=1,
        original_max_position_embeddings=32,
    ),
    "phi3-longrope-old": dict(
        rope_parameters=rope("longrope", partial_rotary_factor=0.75, **LONGROPE),
        hidden_size=24,
        num_attention_heads=3,
        num_key_value_heads=3,
        original_max_position_embeddings=32,
        tie_word_embeddings=True,
    ),
    "olmo2-plain": dict(hidden_size=24, num_key_value_heads=4),
    "olmo2-grouped": dict(hidden_size=36, num_attention_heads=6, tie_word_embeddings=True),
    "smollm3-nope": dict(no_rope_layer_interval=2, num_hidden_layers=4),
    "smollm3-window": BIASED
    | dict(
        no_rope_layers=[1, 0, 1],
        use_sliding_window=True,
        sliding_window=4,
        tie_word_embeddings=False,
    ),
    "granite-plain": MULTIPLIERS,
    "granite-biased": MULTIPLIERS | BIASED | dict(num_key_value_heads=4, tie_word_embeddings=True),
    "stablelm-plain": dict(hidden_size=32, num_attention_heads=2, num_key_value_heads=1),
    "stablelm-biased": dict(
        use_qkv_bias=True,
        hidden_size=24,
        num_attention_heads=3,
        num_key_value_heads=3,
        rope_parameters=rope(partial_rotary_factor=0.5),
        tie_word_embeddings=True,
    ),
    "gpt2-plain": dict(hidden_size=20),
    "gpt2-inner": dict(n_inner=37, vocab_size=67),
    "gpt_neox-quarter": dict(
        hidden_size=32,
        num_attention_heads=2,
        rope_parameters=rope(partial_rotary_factor=0.25),
        vocab_size=67,
    ),
    "gpt_neox-serial": dict(
        use_parallel_residual=False,
        rope_parameters=rope(partial_rotary_factor=1.0),
        tie_word_embeddings=True,
    ),
    "gpt_neox-unbiased": dict(
        attention_bias=False,
        hidden_size=24,
        num_attention_heads=3,
        rope_parameters=rope(partial_rotary_factor=0.5),
    ),
    "opt-plain": {},
    "opt-unbiased": dict(enable_bias=False, activation_function="gelu", hidden_size=20),
    "qwen3_moe-plain": EXPERTS | dict(norm_topk_prob=False, num_key_value_heads=1),
    "qwen3_moe-normed": EXPERTS | dict(norm_topk_prob=True, tie_word_embeddings=True),
    "t5-relu": T5,
    "t5-gated": T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
}
