"""Compare eight trials in one sweep with eight separate runs of `softprompt train`.

    python benchmarks/sweep.py FOLDER [--base MODEL] [key=value ...]

Both use the sentiment experiment with the same number of steps, start with an empty
compilation cache, and are timed as whole commands. `--base small` creates a llama in FOLDER
with 4 layers, D = 128, random weights and the tokenizer of the default base model.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from softprompt.sweep.space import format_parameters

EXPERIMENT = Path(__file__).parent.parent / "experiments" / "sentiment.yaml"
TRIALS = [
    {"prompt.length": 5 * (i + 1), "optimizer.learning_rate": round(1e-2 * 1.2**i, 4)}
    for i in range(8)
]


def small_model(folder):
    """Write a llama of 4 layers with random weights."""
    import numpy as np
    from safetensors.numpy import save_file

    from softprompt import load_base

    base = load_base("smollm2-135m-instruct")
    base.tokenizer.save_pretrained(folder)
    size, wide, layers, heads, vocabulary = 128, 384, 4, 4, base.backbone.arch.vocab_size
    config = {
        "model_type": "llama",
        "hidden_size": size,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": size // heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)

    def matrix(out, into):
        return (random.standard_normal((out, into)) / into**0.5).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": matrix(vocabulary, size),
        "model.norm.weight": np.ones(size, np.float32),
    }
    for i in range(layers):
        layer = f"model.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{layer}self_attn.{name}.weight"] = matrix(size, size)
        for name in ("gate_proj", "up_proj"):
            tensors[f"{layer}mlp.{name}.weight"] = matrix(wide, size)
        tensors[f"{layer}mlp.down_proj.weight"] = matrix(size, wide)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}{name}.weight"] = np.ones(size, np.float32)
    save_file(tensors, folder / "model.safetensors")


def timed(arguments, cache):
    """Run a command, and return its seconds and its peak memory in bytes."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "softprompt", *map(str, arguments)],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"softprompt {arguments[0]} failed")
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - began, usage.ru_maxrss * unit


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options, more = parser.parse_known_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True)
    overrides = [*options.overrides, *more]
    base = options.base
    if base == "small":
        base = folder / "small"
        base.mkdir()
        small_model(base)
    overrides.append(f"base={base}")

    file = folder / "eight.yaml"
    points = json.dumps(TRIALS)
    file.write_text(f"extends: {os.path.relpath(EXPERIMENT, folder)}\nsweep:\n  points: {points}\n")
    alone = [
        timed(
            [
                "train", EXPERIMENT, *overrides, *format_parameters(trial).split(),
                "--run-dir", folder / "alone" / str(number),
            ],
            folder / "compiled-alone",
        )
        for number, trial in enumerate(TRIALS)
    ]  # fmt: skip
    together = timed(
        ["sweep", file, *overrides, "--folder", folder / "together"], folder / "compiled-together"
    )
    seconds, memory = sum(wall for wall, _ in alone), max(bytes_ for _, bytes_ in alone)
    print("| | wall, s | peak memory, GB |")
    print("| --- | ---: | ---: |")
    print(f"| eight runs | {seconds:.0f} | {memory / 1e9:.2f} |")
    print(f"| one sweep | {together[0]:.0f} | {together[1] / 1e9:.2f} |")
    print(f"| ratio | {together[0] / seconds:.2f} | {together[1] / memory:.2f} |")


if __name__ == "__main__":
    main()
