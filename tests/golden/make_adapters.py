"""Adapters made by peft for the small models of families/, with what they make of the logits.

Needs torch, transformers and peft, in an environment of its own; the tests need only what
this writes. Run from anywhere, for all variants or for those named:

    python tests/golden/make_adapters.py [VARIANT ...]

One variant of every family becomes a folder of adapters/. It has a folder of every kind of
adapter, as save_pretrained writes it and read back for the results, and golden.npz with those:
a right-padded batch of `tokens` of `lengths`, T5's `targets` of `target_lengths` too, and
KIND_logits of the batch's own positions, T5's of the targets.

    prompt          at the embeddings' spread
    p_tuning        the same by an encoder, of which the file has the output
    prefix          of standard normal values
    prefix-two      T5's as peft makes it by default, for two submodules; see below
    prefix-wrapped  the same of as many layers as the decoder has
    lora            of every matrix of attention and feed-forward; of Qwen3-MoE's attention alone
    lora-rslora     the same, scaled by alpha / sqrt(r)
    lora-few        of few matrices, with a rank and an alpha that differ

In adapter_config.json only base_model_name_or_path is changed, and lists that peft keeps as sets
are sorted.

A prompt lives where the embedding module's output does, before all else: behind the scaling of
embeddings in Gemma, Gemma 2 and Gemma 3, whose embedding module does it, and before that in
Granite, which multiplies inputs_embeds too.

T5's prefix takes some care. A prefix of one submodule becomes a DynamicCache, which T5 uses for
self-attention and cross-attention alike: the latter gets the prefix and the decoder's own tokens,
later ones included, before the encoder's, which fails with an attention mask and leaks without.
So peft itself cannot run `prefix`; its logits are of the same cache as the self-attention's part
of an EncoderDecoderCache, whose cross-attention's part is empty. That is also what peft makes of a
prefix of two submodules, except for the layers: of L = num_layers in the file, which peft sets to
the encoder's, layer i of the decoder gets layer 2i mod L. (It repeats the L pairs of keys and
values and deals them out by four, keys and values of self-attention and of cross-attention, and
drops the latter.) With even L, half of the file is without use. Either way:

- Only the decoder's self-attention sees the prefix: not the encoder, nor cross-attention.
- Positions go on behind it. Of n virtual tokens, j stands at position j and the decoder's token t
  at n + t, so the relative bias of t for j is that of a distance of n + t - j, and the same as
  ever among the decoder's tokens. Every token sees all of the prefix.
- peft takes token_dim for d_model, which is wrong where d_kv is not d_model / num_heads; it is
  given here.

Made with torch 2.13.0, transformers 5.23.0, peft 0.21.2.
"""

import json
import sys
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from make_families import LENGTHS, TARGET_LENGTHS, random_rows, read

ADAPTERS = Path(__file__).parent / "adapters"
VIRTUAL_TOKENS = 4
DISTINCT = 0.2  # of the plain logits' spread, what an adapter changes at least

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


def configs(name: str) -> dict[str, peft.PeftConfig]:
    """The adapters of a variant, by their kind."""
    encoder_decoder = name.startswith("t5")
    common = dict(task_type="SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM")
    virtual = common | dict(num_virtual_tokens=VIRTUAL_TOKENS, num_transformer_submodules=1)
    prefix = virtual | (dict(token_dim=18) if encoder_decoder else {})
    lora = common | dict(r=3, lora_alpha=5, target_modules=TARGETS[name])
    made = dict(
        prompt=peft.PromptTuningConfig(**virtual, prompt_tuning_init="RANDOM"),
        prefix=peft.PrefixTuningConfig(**prefix),
        lora=peft.LoraConfig(**lora),
    )
    if encoder_decoder:
        two = prefix | dict(num_transformer_submodules=2)
        made["prefix-two"] = peft.PrefixTuningConfig(**two)
        made["prefix-wrapped"] = peft.PrefixTuningConfig(**two, num_layers=2)
    if name.startswith("llama"):
        made["p_tuning"] = peft.PromptEncoderConfig(**virtual, encoder_hidden_size=10)
        few = dict(
            target_modules=["q_proj", "v_proj"],
            rank_pattern={"layers.1.self_attn.q_proj": 2},
            alpha_pattern={"v_proj": 7},
        )
    if name.startswith("gpt2"):
        few = dict(
            target_modules=["c_attn"],
            rank_pattern={"h.1.attn.c_attn": 2},
            alpha_pattern={"h.2.attn.c_attn": 7},
        )
    if name.startswith(("llama", "gpt2")):
        made["lora-rslora"] = peft.LoraConfig(**lora, use_rslora=True)
        made["lora-few"] = peft.LoraConfig(**lora | few)
    return made


@torch.no_grad()
def randomise(tuned: peft.PeftModel) -> None:
    """Give an adapter values that matter, where those that peft starts from do not."""
    spread = tuned.get_input_embeddings()(torch.arange(tuned.config.vocab_size)).std()
    match tuned.active_peft_config.peft_type:
        case peft.PeftType.PROMPT_TUNING:
            tuned.prompt_encoder.default.embedding.weight.mul_(spread)
        case peft.PeftType.P_TUNING:
            encoder = tuned.prompt_encoder.default
            factor = spread / encoder(torch.arange(VIRTUAL_TOKENS)).std()
            for parameter in encoder.mlp_head[-1].parameters():
                parameter.mul_(factor)
        case peft.PeftType.LORA:
            for name, parameter in tuned.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)


def write(name: str, kind: str, tuned: peft.PeftModel) -> Path:
    folder = ADAPTERS / name / kind
    tuned.save_pretrained(folder)
    (folder / "README.md").unlink()
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | dict(base_model_name_or_path=f"families/{name}")
    if "target_modules" in config:
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True))
    return folder


def real(lengths: np.ndarray, width: int) -> torch.Tensor:
    """Which positions of right-padded rows are not padding, `[B, T]`."""
    return torch.arange(width)[None] < torch.as_tensor(lengths)[:, None]


@torch.no_grad()
def logits(model: torch.nn.Module, golden: dict, **cache) -> torch.Tensor:
    """What a model makes of the batch of a golden.npz, at the batch's own positions."""
    tokens = torch.as_tensor(golden["tokens"]).long()
    batch = dict(input_ids=tokens, attention_mask=real(golden["lengths"], tokens.shape[1]).long())
    answer = tokens
    if "targets" in golden:
        answer = torch.as_tensor(golden["targets"]).long()
        scored = real(golden["target_lengths"], answer.shape[1])
        batch["labels"] = torch.where(scored, answer, -100)
    return model(**batch, **cache).logits[:, -answer.shape[1] :]


def self_attention_logits(tuned: peft.PeftModel, golden: dict) -> torch.Tensor:
    """T5's with a prefix of one submodule, which peft itself cannot run."""
    prefix = tuned.get_prompt(len(golden["tokens"]))
    cache = transformers.EncoderDecoderCache(prefix, transformers.DynamicCache())
    return logits(tuned.get_base_model(), golden, past_key_values=cache)


def make(name: str) -> None:
    torch.manual_seed(sum(map(ord, name)))
    model = read(name)
    golden = dict(tokens=random_rows(model.config.vocab_size, LENGTHS)[0], lengths=LENGTHS)
    if model.config.is_encoder_decoder:
        targets, _ = random_rows(model.config.vocab_size, TARGET_LENGTHS)
        golden |= dict(targets=targets, target_lengths=TARGET_LENGTHS)
    plain, results = logits(model, golden), {}
    for kind, config in configs(name).items():
        tuned = peft.get_peft_model(read(name), config)
        randomise(tuned)
        folder = write(name, kind, tuned)
        written = peft.PeftModel.from_pretrained(read(name), folder)
        by_hand = model.config.is_encoder_decoder and kind == "prefix"
        changed = (self_attention_logits if by_hand else logits)(written, golden)
        results[f"{kind}_logits"] = changed
        difference = (changed - plain).std() / plain.std()
        assert difference > DISTINCT, (name, kind, difference)
        print(f"{name} {kind}: changes the logits by {difference:.2f} of their spread")
    arrays = {key: np.asarray(value) for key, value in (golden | results).items()}
    np.savez_compressed(ADAPTERS / name / "golden.npz", **arrays)


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for variant in sys.argv[1:] or TARGETS:
        make(variant)
