"""Compress a document into prefixes in several ways, and compare them with its full text.

    python benchmarks/prompt_compression.py runs/compression

The runs use experiments/compress-document.yaml, some with another length, other initial values or
another objective. A finished run is not trained again, and an interrupted one continues. Attention
Matching needs no training. The table is about the test questions, whose answers the base model
wrote with the whole document in its context. The column "tokens" counts the tokens before every
row, including the chat template.
"""

import argparse
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from attention_matching import attention_matching

from softprompt import load_experiment, load_prompt, make_task, train
from softprompt.cli.progress import Bar, printed_log
from softprompt.data.teacher import opening_with
from softprompt.evaluation.forgetting import forgetting
from softprompt.evaluation.objective import measure_objective
from softprompt.evaluation.scoring import prepare_model, score
from softprompt.experiment.schema import GenerationSettings
from softprompt.generation.engine import Engine, Request
from softprompt.methods.method import Method
from softprompt.methods.prefix_tuning import PrefixTuning
from softprompt.methods.zero_shot import ZeroShot
from softprompt.metrics.scores import Scores, paired_test, weighted_mean
from softprompt.objectives.distillation import Distillation
from softprompt.objectives.model import Model
from softprompt.objectives.teacher import read
from softprompt.training.preparation import Preparation

EXPERIMENT = Path("experiments/compress-document.yaml")
DOCUMENT = Path("experiments/data/pep_811/pep-0811.txt")
ROWS, NEW_TOKENS = 16, 32  # to measure the speed of generation
MATCHED = 64  # training questions whose queries Attention Matching uses

COLUMNS = (
    "tokens",
    "KL to the full text",
    "perplexity of answers",
    "agreement",
    "forgetting",
    "prefix, MB",
    "tokens/s",
)
RANDOM = ["prefix.init=random"]
NEXT_TOKEN = [
    "objective=cross_entropy",
    "template={text: text, max_tokens: 128}",
    f"data={{train: {DOCUMENT.resolve()}, validation: {DOCUMENT.resolve()}}}",
    f"prefix.init_text={json.dumps(DOCUMENT.read_text())}",
    "prefix.init=text",
]
RUNS = {  # overrides of the experiment, and the share of the document's tokens
    "distilled, 1/8": ([], 8),
    "distilled, 1/16": ([], 16),
    "distilled, 1/32": ([], 32),
    "distilled from random vectors, 1/16": (RANDOM, 16),
    "next-token training, 1/16": (NEXT_TOKEN, 16),
}


class Comparison:
    """Measures methods on the test questions of the experiment."""

    def __init__(self, overrides: Sequence[str]):
        experiment = load_experiment(EXPERIMENT, overrides)
        self.prepared = Preparation().prepare(experiment)
        self.base, self.examples = self.prepared.base, self.prepared.examples["test"]
        self.batch_size = experiment.evaluation.batch_size
        text = DOCUMENT.read_text()
        self.document = self.base.tokenizer(text, add_special_tokens=False).input_ids
        self.marked = make_task(self.base, experiment.template, None, virtual_tokens=1)

    def reading(self, tokens: Sequence[int]) -> PrefixTuning:
        """Return a method that reads these tokens instead of the document."""
        prefix = read(self.base.backbone, opening_with(tokens, self.marked))
        return PrefixTuning(prefix.keys, prefix.values)

    def matched(self, count: int) -> PrefixTuning:
        """Compress the document by Attention Matching, as `reading` does with its first tokens."""
        whole, cut = (opening_with(t, self.marked) for t in (self.document, self.document[:count]))
        prefix = read(self.base.backbone, whole)
        training = self.prepared.examples["train"][:MATCHED]
        rows = [[*each.input, *each.candidates[0]] for each in training]
        compressed = attention_matching(self.base.backbone, prefix, rows, len(cut))
        return PrefixTuning(compressed.keys, compressed.values)

    def trained(self, folder: Path) -> PrefixTuning:
        """Return the prefix of a run, followed by the opening of the questions."""
        method = load_prompt(folder, self.base).method
        return PrefixTuning(method.keys[...], method.values[...], self.prepared.task.opening)

    def measure(self, name: str, method: Method) -> dict[str, Scores]:
        """Print a row of the table, and return the loss of the answers and the divergence."""
        backbone, prefix = prepare_model(method, self.base.backbone)
        model = Model(method, self.base.backbone, self.prepared.teacher)
        found = measure_objective(Distillation(), model, self.examples, self.batch_size, name)
        statistics = np.zeros((len(self.examples), 2))
        for numbers, scores in score(backbone, prefix, self.examples, self.batch_size):
            lengths = [len(self.examples[number].candidates[0]) for number in numbers]
            statistics[numbers] = np.stack([-scores[:, 0], lengths], axis=1)
        found["loss"] = Scores(statistics, weighted_mean("loss"))
        forgotten = forgetting(method, self.base.backbone, self.base)
        loss, divergence = found["loss"], found["objective_loss"]
        low, high = np.exp(loss.intervals()["loss"])
        cells = [
            name,
            f"{prefix.length}",
            interval(divergence),
            f"{np.exp(loss.values()['loss']):.2f} ({low:.2f} to {high:.2f})",
            f"{found['agreement'].values()['agreement']:.3f}",
            f"{forgotten.values()['forgetting']:+.2f}",
            f"{2 * prefix.keys.nbytes / 1e6:.1f}",
            f"{self.speed(prefix):.0f}",
        ]
        print("| " + " | ".join(cells) + " |", flush=True)
        return found

    def speed(self, prefix) -> float:
        """Return how many tokens per second a batch of questions generates."""
        settings = GenerationSettings(max_new_tokens=NEW_TOKENS)
        engine = Engine(self.base.backbone, self.base.tokenizer, settings)
        inputs = [self.examples[number].input for number in range(ROWS)]
        seconds = []
        for _ in range(2):  # the first time compiles
            began = time.perf_counter()
            generated = engine.generate([Request(each, prefix) for each in inputs], ROWS)
            seconds.append(time.perf_counter() - began)
        tokens = sum(len(self.base.tokenizer(each.text).input_ids) for each in generated)
        return tokens / seconds[1]


def interval(scores: Scores) -> str:
    """Return a value and its 95% interval."""
    ((name, value),), pairs = scores.values().items(), scores.intervals()
    return f"{value:.3f} ({pairs[name][0]:.3f} to {pairs[name][1]:.3f})"


def gap_closed(found: dict[str, dict[str, Scores]], name: str) -> str:
    """Return the share of the perplexity gap that a method closes, with a 95% interval."""
    nothing, whole, this = (found[n]["loss"].statistics for n in ("no context", "full text", name))
    random, count = np.random.default_rng(0), len(this)
    shares = []
    draws = [random.integers(0, count, count) for _ in range(1000)]
    for rows in (np.arange(count), *draws):
        n, w, t = (np.exp(np.divide(*each[rows].sum(axis=0))) for each in (nothing, whole, this))
        shares.append((n - t) / (n - w))
    low, high = np.quantile(shares[1:], [0.025, 0.975])
    return f"{name}: closes {shares[0]:.0%} of the perplexity gap ({low:.0%} to {high:.0%})"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of the runs")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    comparison = Comparison(options.overrides)
    length = len(comparison.document)
    folders = {}
    with printed_log():
        for name, (own, share) in RUNS.items():
            overrides = [f"prefix.length={length // share}", *own, *options.overrides]
            folders[name] = options.folder / re.sub(r"\W+", "-", name)
            train(load_experiment(EXPERIMENT, overrides), folders[name], progress=Bar)
    print(f"| {' | '.join(('', *COLUMNS))} |")
    print(f"| --- | {' | '.join('---:' for _ in COLUMNS)} |")
    found = {
        "full text": comparison.measure("full text", comparison.reading(comparison.document)),
        "no context": comparison.measure("no context", ZeroShot(comparison.prepared.task.opening)),
    }
    for share in (8, 16, 32):
        name = f"first tokens, 1/{share}"
        cut = comparison.document[: length // share]
        found[name] = comparison.measure(name, comparison.reading(cut))
    name = "Attention Matching, 1/16"
    found[name] = comparison.measure(name, comparison.matched(length // 16))
    for name, folder in folders.items():
        found[name] = comparison.measure(name, comparison.trained(folder))
    print()
    for name in list(found)[2:]:
        print(gap_closed(found, name))
    best = found["distilled, 1/16"]["loss"]
    for name in ("first tokens, 1/16", "Attention Matching, 1/16", *list(RUNS)[3:]):
        difference = paired_test(best, found[name]["loss"])["loss"]
        low, high = difference.interval
        value = f"{difference.difference:+.3f} ({low:+.3f} to {high:+.3f})"
        print(f"loss of distilled, 1/16, minus loss of {name}: {value}")


if __name__ == "__main__":
    main()
