"""Measure tokens per second and time to first token, next to peft and stock transformers.

Greedy decoding in float32, with a prompt of 100 virtual tokens and inputs of 32 random tokens.
Programs are compiled before the measurement, and the contestants take turns. peft and
transformers run in a Python environment of their own, which needs torch, gguf, peft and
transformers in versions that fit together (peft 0.21.2 generates wrong tokens with
transformers 5.24 and the right ones with 4.57):

    python benchmarks/generation.py --reference other/bin/python
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from softprompt import load_base
from softprompt.backbones.loading import find_model
from softprompt.experiment.schema import GenerationSettings
from softprompt.generation import decoding
from softprompt.generation.sampling import Sampling

BATCHES = (1, 8, 32)
NEW_TOKENS = 64


def generate(base, prefix, tokens, new):
    """Generate `new` tokens for each row without stopping at the end-of-text token; `[B, N]`."""
    rows = len(tokens)
    packed = prefix.packed([prefix], [0] * rows)
    lengths, seeds = np.full(rows, tokens.shape[1]), np.zeros(rows, np.uint32)
    sampling, ends = Sampling.from_settings(GenerationSettings(), rows), np.full((rows, 1), -1)
    state = decoding.start(
        base.backbone, packed, tokens, lengths, seeds, None, sampling, ends, capacity=NEW_TOKENS
    )
    state = decoding.continue_decoding(base.backbone, packed, state, np.full(rows, new))
    return np.asarray(state.tokens)[:, :new]


def timed(function, *arguments):
    began = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - began, result


class Reference:
    """A process that runs `peft_generation.py`."""

    def __init__(self, python, model, vectors):
        script = Path(__file__).with_name("peft_generation.py")
        folder = tempfile.mkdtemp()
        np.save(f"{folder}/prompt.npy", vectors)
        self.process = subprocess.Popen(
            [python, script, model, f"{folder}/prompt.npy"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.versions = json.loads(self.process.stdout.readline())

    def __call__(self, name, tokens, new):
        """Return the seconds it took and the generated ids."""
        command = {"name": name, "tokens": tokens.tolist(), "new": new}
        print(json.dumps(command), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        return answer["seconds"], np.array(answer["tokens"])


def first_token(base, repeats):
    """Print the milliseconds to the first token of one input, with 10 and with 100 vectors."""
    tokens = np.random.default_rng(1).integers(20, 40000, (1, 32))
    prefixes = [prefill(base, length) for length in (10, 100)]
    for prefix in prefixes:
        generate(base, prefix, tokens, 1)
    seconds = [[], []]
    for _ in range(repeats):
        for prefix, times in zip(prefixes, seconds, strict=True):
            times.append(timed(generate, base, prefix, tokens, 1)[0])
    ten, hundred = (1000 * statistics.median(times) for times in seconds)
    print(
        f"\nfirst token at batch 1: {ten:.0f} ms with 10 virtual tokens, {hundred:.0f} ms with 100"
    )
    print(f"ratio {hundred / ten:.2f}")


def prefill(base, length):
    embed = jax.jit(lambda backbone, ids: backbone.prefill(backbone.embedding(ids)))
    return embed(base.backbone, jnp.arange(100, 100 + length))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--base", default="smollm2-135m-instruct", help="a base model in a GGUF file"
    )
    parser.add_argument("--reference", metavar="PYTHON")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    base = load_base(options.base)
    prefix = prefill(base, 100)
    vectors = np.asarray(base.backbone.embedding(jnp.arange(100, 200)))
    reference = None
    if options.reference:
        reference = Reference(options.reference, find_model(options.base), vectors)
        print(", ".join(f"{name} {version}" for name, version in reference.versions.items()))
    print("| batch | softprompt | transformers | peft | against transformers | against peft |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for rows in BATCHES:
        tokens = np.random.default_rng(rows).integers(20, 40000, (rows, 32))
        generate(base, prefix, tokens, NEW_TOKENS)
        rates = {"softprompt": [], "transformers": [], "peft": []}
        same = {}
        for _ in range(options.repeats):
            seconds, own_tokens = timed(generate, base, prefix, tokens, NEW_TOKENS)
            rates["softprompt"].append(rows * NEW_TOKENS / seconds)
            for name in ("transformers", "peft") if reference else ():
                seconds, others = reference(name, tokens, NEW_TOKENS)
                rates[name].append(rows * NEW_TOKENS / seconds)
                same[name] = (others == own_tokens).mean()
        ours, *theirs = (statistics.median(each) if each else None for each in rates.values())
        cells = [f"{ours:.1f}", *(f"{rate:.1f}" if rate else "-" for rate in theirs)]
        cells += [f"{ours / rate:.2f}" if rate else "-" for rate in theirs]
        print(f"| {rows} | {' | '.join(cells)} |", flush=True)
        for name, share in same.items():
            print(f"{share:.1%} of the tokens of {name} are equal", file=sys.stderr)
    first_token(base, 5 * options.repeats)


if __name__ == "__main__":
    main()
