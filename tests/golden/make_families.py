"""Small random models of every supported family, with the results of transformers and peft.

Needs torch, transformers and peft, in an environment of its own; the tests need only what
this writes. Run from anywhere, for all variants or for those named:

    python tests/golden/make_families.py [VARIANT ...]

Every variant becomes a folder of families/: config.json and model.safetensors, which are read
back for the results, and golden.npz with those. Decoders' batches are right-padded `tokens` of
`lengths`. T5's have `targets` of `target_lengths` too, which are what its logits are of.

    logits           of the batch
    prompt           peft's virtual tokens, at the embeddings' spread
    prompted_logits  of the batch after the prompt; of the batch's positions alone
    generated        greedily after the prompt and each row, without cache or padding
    loss             by peft: of T5's targets, or of all real tokens but each row's first
    prompt_gradient  of that loss

Made with torch 2.13.0, transformers 5.23.0, peft 0.21.2.
"""

import copy
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

FAMILIES = Path(__file__).parent / "families"
LENGTHS = (9, 6, 1)  # of the rows of a right-padded batch
TARGET_LENGTHS = (4, 2, 1)  # of what T5 is to answer
VIRTUAL_TOKENS = 5
NEW_TOKENS = 8
EAGER = dict(attn_implementation="eager", experts_implementation="eager")
MARGIN = 1e-3  # of a generated token over any other, at least
DISTINCT = 3  # tokens among those generated for a row, at least

DEFAULTS = dict(  # where the family knows them
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
    rms_norm_eps=3e-3,  # so large that it shows
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
            original_max_position_embeddings=32,  # 1, 2 and 3 frequencies in its three bands
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
    "qwen2-tied": dict(tie_word_embeddings=True, sliding_window=3),  # that stays unused
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
    "gemma-gelu": dict(  # which is read as the activation by tanh
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
DTYPES = {"qwen2-tied": torch.bfloat16, "gpt_neox-quarter": torch.float16}  # else float32
# Whose config.json is as transformers 4 wrote it, and the key of the type in rope_scaling there
OLD_FORM = {
    "llama-linear": "type",
    "llama-llama3": "rope_type",
    "qwen2-window": "type",
    "gemma-gelu": "type",
    "gemma2-capped": "type",
    "gemma3_text-old": "rope_type",
    "gemma3_text-pattern": "rope_type",
    "phi3-longrope-old": "type",
    "smollm3-nope": "type",
    "stablelm-biased": "type",
    "gpt_neox-quarter": "type",
    "qwen3_moe-plain": "type",
}
BARE = {"gpt2-plain"}  # whose tensors' names lack "transformer.", as those of the hub's gpt2


def random_model(name: str, settings: dict) -> torch.nn.Module:
    family = name.split("-")[0]
    kind = type(transformers.AutoConfig.for_model(family))
    known = {*kind.__dataclass_fields__, *kind.attribute_map}
    values = {key: value for key, value in DEFAULTS.items() if key in known} | settings
    config = kind(**copy.deepcopy(values))  # it changes what it is given
    model = auto_class(family).from_config(config, **EAGER)
    if family == "t5" and not settings.get("tie_word_embeddings", True):
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1:  # of a norm, or a bias
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:  # T5's residual stream starts at the embeddings' own spread
                parameter.normal_(std=1.0 if key == "shared.weight" else 0.3)
            parameter.copy_(parameter.to(dtype_of(name)))
    return model.eval()


def dtype_of(name: str) -> torch.dtype:
    return DTYPES.get(name, torch.float32)


def auto_class(family: str) -> type:
    if family == "t5":
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForCausalLM


def write(name: str, settings: dict, model: torch.nn.Module) -> None:
    folder = FAMILIES / name
    (model.base_model if name in BARE else model).to(dtype_of(name)).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    written = json.loads((folder / "config.json").read_text())
    for key in ("scale_decoder_outputs", "dense_act_fn", "is_gated_act"):
        written.pop(key, None)  # which T5's checkpoints on the hub do not have
    written["architectures"] = [type(model).__name__]
    written |= {key: copy.deepcopy(settings[key]) for key in settings if key in written}
    if name in OLD_FORM:
        to_old_form(written, OLD_FORM[name])
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")


def to_old_form(config: dict, type_key: str) -> None:
    """Rewrite a config as transformers 4 would have written it."""
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    parameters = config.pop("rope_parameters")
    if FULL in parameters:
        config["rope_local_base_freq"] = parameters[SLIDING]["rope_theta"]
        config["sliding_window_pattern"] = config.pop("_sliding_window_pattern")
        parameters = parameters[FULL]
    if "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    neox = config["model_type"] == "gpt_neox"
    config["rotary_emb_base" if neox else "rope_theta"] = parameters.pop("rope_theta")
    if "partial_rotary_factor" in parameters:
        factor = parameters.pop("partial_rotary_factor")
        config["rotary_pct" if neox else "partial_rotary_factor"] = factor
    rope_type = parameters.pop("rope_type")
    scaling = {type_key: rope_type} | parameters
    config["rope_scaling"] = None if rope_type == "default" else scaling


def read(folder: Path) -> torch.nn.Module:
    kind = auto_class(transformers.AutoConfig.from_pretrained(folder).model_type)
    return kind.from_pretrained(folder, dtype=torch.float32, **EAGER).eval()


def random_rows(vocabulary: int, lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded rows of tokens, and which of those are real."""
    tokens = torch.randint(3, vocabulary, (len(lengths), max(lengths)))
    real = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return tokens * real, real


@torch.no_grad()
def generate(model, prompt: torch.Tensor, row: torch.Tensor) -> tuple[list[int], float]:
    """Greedy continuation of a row after the prompt, and its smallest margin."""
    generated, margin = [], torch.inf
    for _ in range(NEW_TOKENS):
        if model.config.is_encoder_decoder:
            inputs, kwargs = row, dict(decoder_input_ids=torch.tensor([[0, *generated]]))
        else:
            inputs, kwargs = torch.cat([row, torch.tensor(generated, dtype=int)]), {}
        embeddings = torch.cat([prompt, model.get_input_embeddings()(inputs)])[None]
        logits = model(inputs_embeds=embeddings, use_cache=False, **kwargs).logits[0, -1]
        best = logits.topk(2)
        generated.append(best.indices[0].item())
        margin = min(margin, (best.values[0] - best.values[1]).item())
    return generated, margin


def reference(model) -> tuple[dict, float]:
    """All that golden.npz has, and the smallest margin of the generated tokens."""
    vocabulary = model.config.vocab_size
    tokens, real = random_rows(vocabulary, LENGTHS)
    results = dict(tokens=tokens, lengths=LENGTHS)
    if model.config.is_encoder_decoder:
        kind, before = "SEQ_2_SEQ_LM", 0
        targets, scored = random_rows(vocabulary, TARGET_LENGTHS)
        results |= dict(targets=targets, target_lengths=TARGET_LENGTHS)
    else:
        kind, before = "CAUSAL_LM", VIRTUAL_TOKENS
        targets, scored = tokens, real.clone()
        scored[:, 0] = False  # every real token but the first is a target
    batch = dict(
        input_ids=tokens,
        attention_mask=real.long(),
        labels=torch.where(scored, targets, -100),
    )
    with torch.no_grad():
        logits = model(**batch).logits
        spread = model.get_input_embeddings()(torch.arange(vocabulary)).std()

    tuned = peft.get_peft_model(
        model,
        peft.PromptTuningConfig(
            task_type=kind,
            num_virtual_tokens=VIRTUAL_TOKENS,
            prompt_tuning_init="RANDOM",
            num_transformer_submodules=1,  # in T5, of the encoder alone
        ),
    ).eval()
    prompt = tuned.prompt_encoder.default.embedding.weight
    prompt.data *= spread
    output = tuned(**batch)
    output.loss.backward()

    rows = [tokens[row, :length] for row, length in enumerate(LENGTHS)]
    generated, margins = zip(*(generate(model, prompt, row) for row in rows), strict=True)
    results |= dict(
        logits=logits,
        prompt=prompt.detach(),
        prompted_logits=output.logits.detach()[:, before:],
        generated=generated,
        loss=output.loss.item(),
        prompt_gradient=prompt.grad,
        by="peft",
    )
    return {key: np.asarray(value) for key, value in results.items()}, min(margins)


@torch.no_grad()
def some_logits(model) -> torch.Tensor:
    inputs = dict(input_ids=torch.arange(12)[None])
    if model.config.is_encoder_decoder:
        inputs |= dict(decoder_input_ids=torch.arange(9)[None])
    return model(**inputs).logits


def make(name: str) -> None:
    for attempt in itertools.count():
        torch.manual_seed(sum(map(ord, name)) + 10_000 * attempt)
        made = random_model(name, VARIANTS[name])
        expected = some_logits(made)
        write(name, VARIANTS[name], made)
        model = read(FAMILIES / name)
        torch.testing.assert_close(some_logits(model), expected)  # the files are what was made
        results, margin = reference(model)
        distinct = min(len(set(row)) for row in results["generated"])
        if margin > MARGIN and distinct >= DISTINCT:
            np.savez_compressed(FAMILIES / name / "golden.npz", **results)
            print(f"{name}: attempt {attempt}, margin {margin:.1e}, {results['logits'].std():.2f}")
            return


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for variant in sys.argv[1:] or VARIANTS:
        make(variant)
