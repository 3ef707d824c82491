"""Make small Llama models with reference logits, loss and prompt gradient, and SmolLM2's logits.

Needs torch, transformers, peft and gguf, in a separate environment. The tests need only the files
that this script writes. Run it with SmolLM2's GGUF file:

    python tests/golden/make_models.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf

Made with torch 2.13.0, transformers 5.23.0, peft 0.21.2.
"""

import json
import sys
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HERE = Path(__file__).parent
LENGTHS = (9, 6, 1)  # of the rows of a right-padded batch
VIRTUAL_TOKENS = 5

VARIANTS = {
    "llama-grouped": dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True),
    "llama-untied": dict(
        num_attention_heads=4, num_key_value_heads=4, head_dim=10, tie_word_embeddings=False
    ),
    "llama-sharded": dict(
        num_attention_heads=4, num_key_value_heads=1, tie_word_embeddings=False, rope_theta=5e5
    ),
}


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, "<|start|>": 1, "<|pad|>": 2}
    vocabulary |= {character: i + 3 for i, character in enumerate(alphabet)}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|start|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
    )


def make_small(name: str, settings: dict) -> None:
    torch.manual_seed(sum(map(ord, name)))
    config = transformers.LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=50,
        num_hidden_layers=3,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=2,
        initializer_range=0.3,
        **settings,
    )
    model = transformers.LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    folder = HERE / name
    model.save_pretrained(folder, max_shard_size="40KB" if name == "llama-sharded" else "5GB")
    byte_tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if name == "llama-untied":  # the form of transformers 4
        written = json.loads((folder / "config.json").read_text())
        rope = written.pop("rope_parameters")
        written |= {"rope_theta": rope["rope_theta"], "rope_scaling": None}
        (folder / "config.json").write_text(json.dumps(written, indent=2))

    tokens = torch.randint(3, 259, (len(LENGTHS), max(LENGTHS)))
    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    tokens[~mask] = 2
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask.long()).logits

    tuned = peft.get_peft_model(
        model,
        peft.PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL_TOKENS, prompt_tuning_init="RANDOM"
        ),
    )
    tuned.eval()
    prompt = tuned.prompt_encoder.default.embedding.weight
    targets = mask.clone()
    targets[:, 0] = False  # every real token but the first is a target
    labels = torch.where(targets, tokens, -100)
    output = tuned(input_ids=tokens, attention_mask=mask.long(), labels=labels)
    output.loss.backward()
    np.savez_compressed(
        folder / "golden.npz",
        tokens=tokens.numpy(),
        lengths=np.array(LENGTHS),
        logits=logits.numpy(),
        prompt=prompt.detach().numpy(),
        prompted_logits=output.logits.detach().numpy()[:, VIRTUAL_TOKENS:],
        loss=output.loss.item(),
        prompt_gradient=prompt.grad.numpy(),
    )


def make_smollm2(path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    model = model.double().eval()  # so that only our rounding errors count
    # "The quick brown fox jumps over the lazy dog, and 12 more." in SmolLM2's tokens
    tokens = [504, 2365, 6354, 16438, 27003, 690, 260, 23790, 2767, 28, 284, 216, 33, 34, 540, 30]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].numpy()
    np.savez_compressed(
        HERE / "smollm2.npz",
        tokens=np.array(tokens),
        logits=logits[:, ::61].astype(np.float32),  # every 61st token, to keep the file small
        spread=logits.std(),
        log_normaliser=torch.logsumexp(torch.tensor(logits), -1).numpy(),
    )


if __name__ == "__main__":
    for variant, changes in VARIANTS.items():
        make_small(variant, changes)
    make_smollm2(Path(sys.argv[1]))
