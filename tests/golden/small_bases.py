"""Small base models of 96 tokens: the golden GGUF files, which have no tokenizers, with one each.

The tokenizers of the Llama and Qwen2 models are byte-level BPE with the patterns of Llama 3 and
Qwen2. The one of the Gemma 3 model is a SentencePiece vocabulary without a space at the start.
"""

from pathlib import Path

import numpy as np
from softprompt import Base, SoftPrompt
from softprompt.backbones.formats.gguf import GGUFFile
from softprompt.backbones.formats.gguf_tokenizer import read_tokenizer
from softprompt.backbones.loading import load_backbone
from softprompt.data.task import make_task
from softprompt.experiment.schema import ComputeSettings, GenerationSettings, TemplateSettings
from softprompt.generation import decoding
from softprompt.generation.sampling import Sampling
from softprompt.inference.prompt import TrainedPrompt
from transformers import PreTrainedTokenizerFast

FILES = Path(__file__).parent / "gguf"
PRE = {"llama": "llama-bpe", "qwen2": "qwen2", "gemma3": "default"}
LETTERS = "etaoinshrdlucmfwypvbgkqjxzETAOINSHRDLUCMFWYPVBGKQJXZ0123456789.,:!?'-"
MERGES = ["t h", "th e", "i n", "a n", "e r", "o n", "r e", "in g", "a t", "e s", "s t", "o r"]


def small_tokenizer(
    name: str, letters: str = LETTERS, size: int = 96
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of `size` tokens."""
    sentencepiece = name == "gemma3"
    space, merges = ("▁", MERGES) if sentencepiece else ("Ġ", [*MERGES, "Ġ the", "Ġ a"])
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *letters, space]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens += [f"<unused{i}>" for i in range(size - len(tokens))]
    fields = {
        "model": "llama" if sentencepiece else "gpt2",
        "pre": PRE[name],
        "tokens": tokens,
        "token_type": [3, 3, 3, 2 if sentencepiece else 3, *[1] * (len(tokens) - 4)],
        "scores": [-float(i) for i in range(len(tokens))],
        "merges": merges,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": 0,
        "add_bos_token": sentencepiece,
        "add_space_prefix": False,
    } | ({"unknown_token_id": 3} if sentencepiece else {})
    inner, special = read_tokenizer({f"tokenizer.ggml.{k}": v for k, v in fields.items()}.get)
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def small_base(name: str) -> Base:
    """Return a base model: `llama`, `qwen2` or `gemma3`."""
    file = GGUFFile(FILES / f"{name}.gguf")
    backbone, _ = load_backbone(file)
    return Base(str(file.path), "", file.config, backbone, small_tokenizer(name), ComputeSettings())


def small_prompt(name: str, template: str = "the {text}") -> TrainedPrompt:
    """Return a prompt of four virtual tokens for free text, whose vectors are like embeddings."""
    base = small_base(name)
    table = np.asarray(base.backbone.embedding(np.arange(90)))
    random = np.random.default_rng(0)
    vectors = table[random.integers(4, 90, 4)] + table.std() * random.normal(size=table[:4].shape)
    settings = TemplateSettings(input=template, target="{answer}")
    task = make_task(base, settings, None, virtual_tokens=4)
    return TrainedPrompt.from_method(SoftPrompt(vectors.astype(np.float32)), base, task)


def greedy_tokens(prompt: TrainedPrompt, texts: list[str], count: int) -> list[list[int]]:
    """Return the ids of the greedy continuation of each text, up to and including its end."""
    examples = [prompt.task.example(prompt.record(t, t), with_answer=False).input for t in texts]
    lengths = np.array(list(map(len, examples)))
    rows = np.zeros((len(texts), lengths.max()), np.int32)
    for row, ids in zip(rows, examples, strict=True):
        row[: len(ids)] = ids
    size, end = len(texts), prompt.base.tokenizer.eos_token_id
    state = decoding.start(
        prompt.backbone,
        prompt.prefix,
        rows,
        lengths,
        np.zeros(size, np.uint32),
        None,
        Sampling.from_settings(GenerationSettings(), size),
        np.full((size, 1), end),
        capacity=count,
    )
    state = decoding.continue_decoding(prompt.backbone, prompt.prefix, state, np.full(size, count))
    written = zip(np.asarray(state.tokens), np.asarray(state.lengths), strict=True)
    return [ids[:length].tolist() for ids, length in written]
