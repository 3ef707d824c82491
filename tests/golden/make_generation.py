"""Generate reference texts with stock transformers, for the tests of generation.

    python make_generation.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf

Made with torch 2.13.0, transformers 5.24.0.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.generation import logits_process

HERE = Path(__file__).parent
TEXTS = [
    "The capital of France is",
    "Once upon a time there was a",
    "def fibonacci(n):\n",
    "Water boils at",
    "The three primary colours are",
    "A letter to my landlord:",
    "In 1969,",
    "Q: What is 7 times 8?\nA:",
    "To make an omelette, first",
    "The quick brown fox",
    "Dear Sir or Madam,",
    "The most important thing about sleep is that",
    "import numpy as np\n\nx =",
    "Gravity is",
    "Roses are red,",
    "She opened the door and",
    "The difference between a virus and a bacterium",
    "List of the planets:",
    "Hello",
    "My favourite book is one that I read when I was a child, about",
    "In a hole in the ground there lived",
    "SELECT name FROM",
    "The mitochondria",
    "Yesterday it rained. Today",
]
SETTINGS = [  # sampling
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 0.8, "min_p": 0.1},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3},
    {"temperature": 1.0, "repetition_penalty": 0.8},
]
SEARCHES = [  # beam search
    {"num_beams": 2, "length_penalty": 1.0},
    {"num_beams": 3, "length_penalty": 0.0},
    {"num_beams": 4, "length_penalty": 2.0},
    {"num_beams": 4, "length_penalty": -1.0},
    {"num_beams": 3, "length_penalty": 1.0, "repetition_penalty": 1.5},
]
NEW_TOKENS = 12


def make_smollm2(path: Path) -> None:
    """Generate 64 greedy tokens after the vectors and each text, without an end token."""
    load = {"gguf_file": path.name, "dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, **load).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    table = model.get_input_embeddings().weight.detach()
    noise = np.random.default_rng(0).normal(size=(20, table.shape[1])).astype(np.float32)
    vectors = table[1000:1020] + 0.05 * torch.from_numpy(noise)
    model.generation_config.eos_token_id = None
    inputs, outputs = [], []
    for text in TEXTS:
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        embeddings = torch.cat([vectors, table[tokens]])[None]
        written = model.generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long),
            do_sample=False,
            max_new_tokens=64,
        )
        inputs.append(tokens)
        outputs.append(written[0].tolist())
    np.savez_compressed(
        HERE / "smollm2_generation.npz",
        vectors=vectors.numpy(),
        texts=np.array(TEXTS),
        lengths=np.array([len(tokens) for tokens in inputs]),
        inputs=np.array([token for tokens in inputs for token in tokens]),
        outputs=np.array(outputs),
    )


def make_choices() -> None:
    """Save logits before and after the stock processors, and the tokens seen before."""
    torch.manual_seed(0)
    logits, seen = torch.randn(4, 50) * 3, torch.randint(0, 50, (4, 6))
    arrays = {"logits": logits.numpy(), "seen": seen.numpy()}
    for number, settings in enumerate(SETTINGS):
        steps = []
        if "repetition_penalty" in settings:
            penalty = settings["repetition_penalty"]
            steps.append(logits_process.RepetitionPenaltyLogitsProcessor(penalty))
        steps.append(logits_process.TemperatureLogitsWarper(float(settings["temperature"])))
        if "top_k" in settings:
            steps.append(logits_process.TopKLogitsWarper(settings["top_k"]))
        if "top_p" in settings:
            steps.append(logits_process.TopPLogitsWarper(settings["top_p"]))
        if "min_p" in settings:
            steps.append(logits_process.MinPLogitsWarper(settings["min_p"]))
        scores = logits.clone()
        for step in steps:
            scores = step(seen, scores)
        arrays[str(number)] = scores.numpy()
    np.savez_compressed(HERE / "choices.npz", **arrays)


def make_searches(name: str, folder: Path) -> None:
    """Run beam search on a small model after vectors. The end token is one that it often writes."""
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = (
        transformers.AutoModelForSeq2SeqLM
        if config.is_encoder_decoder
        else transformers.AutoModelForCausalLM
    )
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    random = np.random.default_rng(1)
    width = model.get_input_embeddings().weight.shape[1]
    vectors = torch.from_numpy(random.normal(size=(4, width)).astype(np.float32)) * 0.3
    tokens = torch.from_numpy(random.integers(3, config.vocab_size, (5, 6)))
    rows = vectors[None].expand(5, -1, -1)
    embeddings = torch.cat([rows, model.get_input_embeddings()(tokens)], dim=1)
    mask = torch.ones(embeddings.shape[:2], dtype=torch.long)
    common = {"inputs_embeds": embeddings, "attention_mask": mask, "do_sample": False}
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    free = model.generate(**common, max_new_tokens=NEW_TOKENS, num_beams=4, num_return_sequences=4)
    skipped = 1 if config.is_encoder_decoder else 0  # the decoder's start token
    values, counts = np.unique(free[:, skipped:].numpy(), return_counts=True)
    end = int(values[counts.argsort()[-3]])
    model.generation_config.eos_token_id = end
    arrays = {"vectors": vectors.numpy(), "tokens": tokens.numpy(), "end": end}
    for number, settings in enumerate(SEARCHES):
        found = model.generate(
            **common,
            **settings,
            max_new_tokens=NEW_TOKENS,
            num_return_sequences=settings["num_beams"],
            output_scores=True,
            return_dict_in_generate=True,
        )
        sequences = found.sequences[:, skipped:]
        padded = torch.nn.functional.pad(sequences, (0, NEW_TOKENS - sequences.shape[1]))
        arrays[f"{number} written"] = padded.reshape(5, settings["num_beams"], -1).numpy()
        arrays[f"{number} scores"] = found.sequences_scores.reshape(5, -1).numpy()
    np.savez_compressed(HERE / f"beams-{name}.npz", **arrays)


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    make_choices()
    make_searches("llama", HERE / "llama-grouped")
    make_searches("t5", HERE / "families" / "t5-gated")
    make_smollm2(Path(sys.argv[1]))
