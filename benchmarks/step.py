"""Time a training step for several prompt lengths: shared prefix against prepending.

Both forms compute the same gradient. The rows hold random tokens with one target each. The
forms alternate, so that changes in the machine's speed affect both.

    python benchmarks/step.py [--base smollm2-135m-instruct] [--rows 16] [--tokens 40]
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from softprompt import SoftPrompt, cross_entropy, load_base, split, train_step
from softprompt.data.batches import Layout
from softprompt.data.examples import Example
from softprompt.data.records import Record
from softprompt.experiment.schema import OptimizerSettings
from softprompt.training.optimizers import UpdateRule, hyperparameters

LENGTHS = (1, 10, 20, 50, 100)


class Prepended(SoftPrompt):
    """A soft prompt that is prepended to every row, as in `peft`."""

    def apply(self, backbone, key=None):
        return _PrependingBackbone(backbone, self), None


class _PrependingBackbone(nnx.Module):
    def __init__(self, backbone, prompt):
        self.backbone, self.prompt = backbone, prompt
        self.logits = backbone.logits

    def target_states(self, batch, prefix):
        hidden = self.backbone(self.prompt(self.backbone.embedding(batch.tokens)))
        indices = batch.target_indices + self.prompt.vectors.shape[0]
        return jnp.take_along_axis(hidden, indices[..., None], axis=1)


def stepper(base, method, batch):
    """Return a function that runs one training step and waits for it."""
    optimizer = UpdateRule.of(OptimizerSettings())
    graphdef, trainable, frozen = split(method, base.backbone)
    opt_state = optimizer.init(trainable, hyperparameters(OptimizerSettings(), 1000))
    key = jax.random.key(0)
    program = {"graphdef": graphdef, "optimizer": optimizer, "objective": cross_entropy}

    def step():
        nonlocal trainable, opt_state
        trainable, opt_state, measured = train_step(
            trainable, opt_state, frozen, batch, key, **program
        )
        return float(measured["loss"])

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()

    began = time.perf_counter()
    base = load_base(options.base)
    print(f"base model loaded in {time.perf_counter() - began:.1f} s, on {jax.devices()[0]}")
    random = np.random.default_rng(0)
    tokens = random.integers(20, base.backbone.arch.vocab_size, (options.rows, options.tokens + 1))
    record = Record({}, "random")
    rows = [Example(row[:-1].tolist(), [[int(row[-1])]], 0, record, False) for row in tokens]
    batch = Layout.of(rows).lay_out(rows, options.rows, options.tokens, 1)

    print(f"{options.rows} rows of {options.tokens} tokens; median of {options.repeats} steps\n")
    print("| virtual tokens | shared prefix, s | prepended, s | ratio |")
    print("| ---: | ---: | ---: | ---: |")
    medians = {}
    for length in LENGTHS:
        vectors = base.backbone.embedding(jnp.arange(100, 100 + length))
        forms = [stepper(base, form(jnp.array(vectors)), batch) for form in (SoftPrompt, Prepended)]
        losses = [form() for form in forms]
        np.testing.assert_allclose(*losses, rtol=1e-4)
        seconds = ([], [])
        for _ in range(options.repeats):
            for form, times in zip(forms, seconds, strict=True):
                began = time.perf_counter()
                form()
                times.append(time.perf_counter() - began)
        shared, prepended = map(statistics.median, seconds)
        medians[length] = shared
        print(
            f"| {length} | {shared:.3f} | {prepended:.3f} | {prepended / shared:.2f} |", flush=True
        )
    print(f"\nshared prefix, 100 virtual tokens against 10: {medians[100] / medians[10]:.2f}")


if __name__ == "__main__":
    main()
