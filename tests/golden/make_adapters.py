"""Make adapters with peft for the small models in families/, and compute their logits.

Needs torch, transformers and peft, in a separate environment. The tests need only the files that
this script writes. Without VARIANT, it makes the adapters of all variants:

    python tests/golden/make_adapters.py [VARIANT ...]
    python tests/golden/make_adapters.py DIR/smollm2 ADAPTERS    # for `check_imports.py`

The script writes the folder adapters/VARIANT for one variant of every family, or ADAPTERS/smollm2
for the directory of a Llama model. It contains a folder for every kind of adapter, as
save_pretrained writes it. golden.npz contains the results of the adapters after loading:

    tokens, lengths             a right-padded batch
    targets, target_lengths     only for T5
    KIND_logits                 at the positions of the batch, for T5 at the targets

The kinds of adapters:

    prompt          vectors with the standard deviation of the embeddings
    p_tuning        the same from an encoder; the file contains the encoder's output
    prefix          standard normal keys and values; for a trained model the keys and values of
                    random tokens, because with normal ones the errors of float32 reach 1e-3
    prefix-two      a prefix for T5's two submodules, which is peft's default for T5; see below
    prefix-wrapped  the same with fewer layers, so that some are used twice
    lora            all matrices of attention and feed-forward; for Qwen3-MoE only attention
    lora-rslora     the same, scaled by alpha / sqrt(r)
    lora-few        a few matrices, one with another rank, some with another alpha

In adapter_config.json, base_model_name_or_path is replaced, and target_modules is sorted, because
peft writes it in an arbitrary order.

The vectors of a prompt replace outputs of the embedding module. In Gemma, Gemma 2 and Gemma 3, this
module scales the embeddings itself, so the prompt is not scaled. Granite scales the output of the
module, so the prompt is scaled too.

T5's prefix is used only by the self-attention of the decoder, not by the encoder or
cross-attention. With n virtual tokens, virtual token j has position j, and token t of the decoder
has position n + t. The relative bias of t for j is the bias of the distance n + t - j. The bias
between tokens of the decoder is unchanged. Every token attends to the whole prefix.

- With two submodules, layer i of the decoder gets layer 2i mod L of the file, where L is
  num_layers, which peft sets to the number of encoder layers. The reason is that peft repeats the
  L pairs of keys and values in the file and gives every layer two pairs. It drops the second pair,
  which is for cross-attention.
- With one submodule, layer i gets layer i, but peft cannot run it: peft gives T5 a DynamicCache, so
  cross-attention reads the prefix and all tokens of the decoder, including later ones, before the
  tokens of the encoder. This fails if the batch has padding, and leaks later tokens otherwise. The
  results here use the same DynamicCache as the self-attention cache of an EncoderDecoderCache.
- peft uses the hidden size as the default of token_dim. The right value is d_kv times the number of
  heads, so this script sets it.

Made with torch 2.13.0, transformers 5.23.0, peft 0.21.2.
"""

import json
import sys
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from make_families import FAMILIES, LENGTHS, TARGET_LENGTHS, random_rows, read

ADAPTERS = Path(__file__).parent / "adapters"
VIRTUAL_TOKENS = 4
DISTINCT = 0.2  # an adapter must change the logits by this share of their standard deviation

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LLAMA = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
TARGETS = {
    "llama-llama3": LLAMA,
    "mistral-window": LLAMA,
    "qwen2-window": LLAMA,
    "qwen3-window": LLAMA,
    "qwen3_moe-normed": ATTENTION,
    "gemma-single": LLAMA,
    "gemma2-capped": LLAMA,
    "gemma3_text-pattern": LLAMA,
    "phi3-longrope": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "olmo2-grouped": LLAMA,
    "smollm3-nope": LLAMA,
    "granite-biased": LLAMA,
    "stablelm-biased": LLAMA,
    "gpt2-inner": ["c_attn", "c_proj", "c_fc"],
    "gpt_neox-quarter": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "opt-plain": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "t5-gated": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
}


def configs(name: str, model: torch.nn.Module) -> dict[str, peft.PeftConfig]:
    """Return the configurations of a variant's adapters, by kind."""
    family, encoder_decoder = model.config.model_type, model.config.is_encoder_decoder
    common = dict(task_type="SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM")
    virtual = common | dict(num_virtual_tokens=VIRTUAL_TOKENS, num_transformer_submodules=1)
    lora = common | dict(r=3, lora_alpha=5, target_modules=TARGETS.get(name, LLAMA))
    made = dict(
        prompt=peft.PromptTuningConfig(**virtual, prompt_tuning_init="RANDOM"),
        lora=peft.LoraConfig(**lora),
    )
    if encoder_decoder:
        single = virtual | dict(token_dim=18, num_layers=2)
        double = single | dict(num_transformer_submodules=2)
        made["prefix"] = peft.PrefixTuningConfig(**single)
        made["prefix-two"] = peft.PrefixTuningConfig(**double | dict(num_layers=3))
        made["prefix-wrapped"] = peft.PrefixTuningConfig(**double)
    else:
        made["prefix"] = peft.PrefixTuningConfig(**virtual)
    if family == "llama":
        made["p_tuning"] = peft.PromptEncoderConfig(**virtual, encoder_hidden_size=10)
        few = dict(
            target_modules=["q_proj", "v_proj"],
            rank_pattern={"layers.1.self_attn.q_proj": 2},
            alpha_pattern={"v_proj": 7},
        )
    if family == "gpt2":
        few = dict(
            target_modules=["c_attn"],
            rank_pattern={"h.1.attn.c_attn": 2},
            alpha_pattern={"h.2.attn.c_attn": 7},
        )
    if family in ("llama", "gpt2"):
        made["lora-rslora"] = peft.LoraConfig(**lora, use_rslora=True)
        made["lora-few"] = peft.LoraConfig(**lora | few)
    return made


@torch.no_grad()
def randomize(tuned: peft.PeftModel, trained: bool) -> None:
    """Replace initial values of peft that would hardly change the logits."""
    spread = tuned.get_input_embeddings()(torch.arange(tuned.config.vocab_size)).std()
    match tuned.active_peft_config.peft_type:
        case peft.PeftType.PROMPT_TUNING:
            tuned.prompt_encoder.default.embedding.weight.mul_(spread)
        case peft.PeftType.P_TUNING:
            encoder = tuned.prompt_encoder.default
            factor = spread / encoder(torch.arange(VIRTUAL_TOKENS)).std()
            for parameter in encoder.mlp_head[-1].parameters():
                parameter.mul_(factor)
        case peft.PeftType.PREFIX_TUNING if trained:
            model = tuned.get_base_model()
            tokens = torch.randint(model.config.vocab_size, (1, VIRTUAL_TOKENS))
            peft.initialize_kv_prefix_from_past_key_values(
                tuned, past_key_values=model(tokens).past_key_values
            )
        case peft.PeftType.LORA:
            for name, parameter in tuned.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)


def write(folder: Path, name: str, tuned: peft.PeftModel) -> None:
    tuned.save_pretrained(folder)
    (folder / "README.md").unlink()
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | dict(base_model_name_or_path=f"families/{name}")
    if "target_modules" in config:
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True))


def real(lengths: np.ndarray, width: int) -> torch.Tensor:
    """Return which positions of right-padded rows are not padding, `[B, T]`."""
    return torch.arange(width)[None] < torch.as_tensor(lengths)[:, None]


@torch.no_grad()
def logits(model: torch.nn.Module, golden: dict, **cache) -> torch.Tensor:
    """Return the logits of a model for the batch of a golden.npz, at the positions of the batch."""
    tokens = torch.as_tensor(golden["tokens"]).long()
    batch = dict(input_ids=tokens, attention_mask=real(golden["lengths"], tokens.shape[1]).long())
    answer = tokens
    if "targets" in golden:
        answer = torch.as_tensor(golden["targets"]).long()
        scored = real(golden["target_lengths"], answer.shape[1])
        batch["labels"] = torch.where(scored, answer, -100)
    return model(**batch, **cache).logits[:, -answer.shape[1] :]


def self_attention_logits(tuned: peft.PeftModel, golden: dict) -> torch.Tensor:
    """Return T5's logits with a prefix for one submodule, which peft itself cannot run."""
    prefix = tuned.get_prompt(len(golden["tokens"]))
    cache = transformers.EncoderDecoderCache(prefix, transformers.DynamicCache())
    return logits(tuned.get_base_model(), golden, past_key_values=cache)


def make(name: str, model_folder: Path, adapters: Path) -> None:
    torch.manual_seed(sum(map(ord, name)))
    model = read(model_folder)
    golden = dict(tokens=random_rows(model.config.vocab_size, LENGTHS)[0], lengths=LENGTHS)
    if model.config.is_encoder_decoder:
        targets, _ = random_rows(model.config.vocab_size, TARGET_LENGTHS)
        golden |= dict(targets=targets, target_lengths=TARGET_LENGTHS)
    plain, results = logits(model, golden), {}
    for kind, config in configs(name, model).items():
        tuned = peft.get_peft_model(read(model_folder), config)
        randomize(tuned, trained=name not in TARGETS)
        write(adapters / kind, name, tuned)
        written = peft.PeftModel.from_pretrained(read(model_folder), adapters / kind)
        by_hand = model.config.is_encoder_decoder and kind == "prefix"
        changed = (self_attention_logits if by_hand else logits)(written, golden)
        results[f"{kind}_logits"] = changed
        difference = (changed - plain).std() / plain.std()
        assert difference > DISTINCT, (name, kind, difference)
        print(f"{name} {kind}: changes the logits by {difference:.2f} standard deviations")
    arrays = {key: np.asarray(value) for key, value in (golden | results).items()}
    np.savez_compressed(adapters / "golden.npz", **arrays)


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    match [Path(word) for word in sys.argv[1:]]:
        case [directory, adapters] if directory.is_dir():
            make(directory.name, directory, adapters / directory.name)
        case variants:
            for variant in variants or map(Path, TARGETS):
                make(variant.name, FAMILIES / variant, ADAPTERS / variant)
