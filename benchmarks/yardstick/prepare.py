"""Write what both workers read: base model, adapters, token ids, and which rows share a batch.

    python prepare.py FOLDER MODEL ADAPTERS

MODEL is `sentiment` for SmolLM2 and the sentiment experiment, or `llama-3.2-1b` and the like for
random weights and random rows. ADAPTERS is a JSON list of method, virtual tokens and rank.

Both sides load the same safetensors file. `peft` cannot read GGUF files, and for a base model
with random weights there is no other file.
"""

import json
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from softprompt import (
    LoRA,
    PrefixTuning,
    Record,
    SoftPrompt,
    TrainedPrompt,
    TrainingBatches,
    load_base,
    load_experiment,
    make_examples,
    make_task,
)
from softprompt.backbones.families import FAMILIES
from softprompt.backbones.formats.storing import save_tensors, stored_tensors
from softprompt.data.examples import Dataset, Example, Examples
from softprompt.data.records import read_records
from softprompt.interop.export import export
from softprompt.interop.merged_config import merged_config
from softprompt.interop.merged_tokenizer import save_tokenizer
from softprompt.methods.lora import find_targets, initial_matrices
from softprompt.plan.models import read_config

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "sentiment.yaml"
TINY = {  # to try the part for accelerators without one
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "num_key_value_heads": 2,
    "vocab_size": 49152,
}
TOKENS = 210  # of a row in the published comparison of peft
_TARGETS = ["attention.query", "attention.value"]


def initial_method(base, method, length, rank, opening):
    """Return the method that both sides start from.

    The second matrices of LoRA are not zero, so that the first loss depends on them.
    """
    key = jax.random.key(0)
    if method == "lora":
        paths = find_targets(base.backbone, _TARGETS)
        pairs = initial_matrices(base.backbone, paths, rank, key)
        pairs = {p: (a, 0.01 * jax.random.normal(key, b.shape)) for p, (a, b) in pairs.items()}
        return LoRA(pairs, dict.fromkeys(paths, 2.0), opening=opening)
    prompt = SoftPrompt.from_vocabulary(base, length, key)
    if method == "prompt":
        return SoftPrompt(prompt.vectors[...], opening)
    # Keys and values are kept in float32, as in training.
    keys, values = base.backbone.initial_prefix(prompt.vectors[...], key)
    return PrefixTuning(keys.astype("float32"), values.astype("float32"), opening)


def export_adapter(base, folder, method, length, rank):
    """Write the same start for peft."""
    virtual = [~i for i in range(length)] if method == "prompt" else []
    start = initial_method(base, method, length, rank, virtual)
    export(TrainedPrompt.from_method(start, base), folder, "peft")


class _Recorded(Dataset):
    """A dataset that records which examples are read."""

    def __init__(self, examples):
        self._examples, self.read = examples, []
        self.lengths, self.digest = examples.lengths, examples.digest
        self.truncated = examples.truncated

    def __len__(self):
        return len(self._examples)

    def example(self, number):
        self.read.append(number)
        return self._examples[number]


def batch_rows(examples, batch_size, count):
    """Return the examples in the first training batches, as lists of their numbers."""
    recorded = _Recorded(examples)
    batches, rows = TrainingBatches(recorded, batch_size, seed=0), []
    for number in range(count):
        recorded.read.clear()
        batch = batches[number]
        rows.append(list(recorded.read))
        assert len(rows[-1]) == batch_size
        assert sum(_length(examples[i]) for i in rows[-1]) == batch.lengths.sum()
    return rows


def _length(example):
    answer = example.candidates[example.answer]
    return len(example.input) + len(answer) - 1


def write_rows(folder, examples, opening, batch_sizes, count, more):
    """Write token ids, and for each batch size the rows of batches in three orders."""
    order = np.random.default_rng(0).permutation(len(examples)).tolist()

    def batches_of(order, size):
        return [order[i : i + size] for i in range(0, len(order) - size + 1, size)][:count]

    def grouped(size):
        """Sort 50 batches at a time by length, as transformers' `group_by_length` does."""
        parts = [order[i : i + 50 * size] for i in range(0, len(order), 50 * size)]
        by_length = [sorted(part, key=lambda i: _length(examples[i])) for part in parts]
        return [number for part in by_length for number in part]

    batches = {
        size: {
            "ours": batch_rows(examples, size, min(count, len(examples) // size)),
            "sorted": batches_of(grouped(size), size),
            "random": batches_of(order, size),
        }
        for size in batch_sizes
    }
    rows = [(list(e.input), list(e.candidates[e.answer])) for e in examples]
    content = {"opening": list(opening), "rows": rows, "batches": batches, **more}
    (folder / "data.json").write_text(json.dumps(content))


def _settings(experiment):
    """Return how both sides train. The experiment has no learning rates for other methods."""
    rates = {kind.name: kind.default_learning_rate for kind in (PrefixTuning, LoRA)}
    return {
        "optimizer": experiment.optimizer.model_dump(),
        "steps": experiment.training.steps,
        "rates": {"prompt": experiment.optimizer.learning_rate, **rates},
    }


def write_sentiment(folder):
    """Write SmolLM2 and the rows of the sentiment experiment."""
    experiment = load_experiment(EXPERIMENT)
    base = load_base(experiment.base)
    target = folder / "base"
    names = FAMILIES[base.config["model_type"]].names
    save_tensors(dict(stored_tensors(base.backbone, names)), target / "model.safetensors")
    config = merged_config(base, base.backbone.arch.vocab_size, untied=False)
    (target / "config.json").write_text(json.dumps(config))
    save_tokenizer(base.tokenizer, target)

    task = make_task(base, experiment.template, experiment.verbalizer)
    splits = {
        split: make_examples(task, read_records(getattr(experiment.data, split)), split)
        for split in ("train", "validation", "test")
    }

    def inputs(split):
        return {
            "texts": [e.record.fields["text"] for e in splits[split]],
            "inputs": [list(e.input) for e in splits[split]],
            "answers": [e.answer for e in splits[split]],
        }

    candidates = splits["test"][0].candidates
    assert all(len(candidate) == 1 for candidate in candidates)
    more = {
        "validation": inputs("validation"),
        "test": inputs("test"),
        "labels": [candidate[0] for candidate in candidates],
        **_settings(experiment),
    }
    write_rows(folder, splits["train"], task.opening, (4, 16), experiment.training.steps, more)


def write_random(folder, name):
    """Write a Llama with random bfloat16 weights, and random rows whose tokens are all targets."""
    experiment = load_experiment(EXPERIMENT)
    config = {**read_config("llama-3.2-1b" if name == "tiny" else name)}
    config |= {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}
    if name == "tiny":
        config |= TINY
    target = folder / "base"
    (target / "config.json").write_text(json.dumps(config))
    # Rows are random ids, so any tokenizer does that is not larger than the vocabulary.
    save_tokenizer(load_base(experiment.base).tokenizer, target)
    save_tensors(dict(_random_tensors(config)), target / "model.safetensors")

    random = np.random.default_rng(0)
    rows = 64
    lengths = random.integers(TOKENS - 20, TOKENS + 21, rows)
    ids = [random.integers(1000, 40_000, n).tolist() for n in lengths]
    record = Record({}, "random")
    examples = [Example(row[:1], [row[1:]], 0, record, False) for row in ids]
    more = _settings(experiment)
    write_rows(folder, Examples(examples), [], (4, 16), rows, more)


def _random_tensors(config):
    """Yield the tensors of a Llama, with values of the usual size."""
    random = np.random.default_rng(0)

    def matrix(out, into):
        values = random.standard_normal((out, into), np.float32) / np.float32(into**0.5)
        return values.astype(ml_dtypes.bfloat16)

    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    values = config["num_key_value_heads"] * config["head_dim"]
    norm = np.ones(hidden, ml_dtypes.bfloat16)
    yield "model.embed_tokens.weight", matrix(config["vocab_size"], hidden)
    yield "model.norm.weight", norm
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        yield f"{layer}.self_attn.q_proj.weight", matrix(queries, hidden)
        yield f"{layer}.self_attn.k_proj.weight", matrix(values, hidden)
        yield f"{layer}.self_attn.v_proj.weight", matrix(values, hidden)
        yield f"{layer}.self_attn.o_proj.weight", matrix(hidden, queries)
        yield f"{layer}.mlp.gate_proj.weight", matrix(inner, hidden)
        yield f"{layer}.mlp.up_proj.weight", matrix(inner, hidden)
        yield f"{layer}.mlp.down_proj.weight", matrix(hidden, inner)
        yield f"{layer}.input_layernorm.weight", norm
        yield f"{layer}.post_attention_layernorm.weight", norm


def main():
    """Write a folder."""
    folder, name, adapters = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    folder.mkdir()
    (folder / "base").mkdir()
    device = jax.devices()[0]
    if name == "sentiment":
        write_sentiment(folder)
        dtype = "float32" if device.platform == "cpu" else "bfloat16"
    else:
        write_random(folder, name)
        dtype = "bfloat16"
    base = load_base(str(folder / "base"), dtype=dtype)
    for method, length, rank in adapters:
        export_adapter(base, folder / f"{method}-{length}-{rank}", method, length, rank)
    setting = {"platform": device.platform, "device": device.device_kind, "dtype": dtype}
    (folder / "setting.json").write_text(json.dumps(setting))


if __name__ == "__main__":
    main()
