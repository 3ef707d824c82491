"""Compare softprompt with peft on this machine, and print tables of medians and ratios.

    make bench                 everything, about two hours on two cores
    make bench ARGS=--quick    a part of it, five minutes

Both sides run in processes of their own, one at a time, and take turns. They read the same
weights, start from the same prompt, and must compute the same first loss, the same log-odds of
labels and the same generated tokens. A ratio above 1 means that softprompt is better.

On an accelerator, everything is in bfloat16, and a second part trains models with random weights
in the shapes of Llama 3.2. `--shapes tiny` tries this part on a CPU with a small model.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure
from table import HEADER, OPERATIONS_HEADER

from softprompt.plan.hardware import parse_hardware

HERE = Path(__file__).parent
RANK = 8
QUICK = [("prompt", 20, 16), ("prompt", 100, 16), ("lora", 0, 16)]
FULL = [
    *(("prompt", virtual, batch) for batch in (16, 4) for virtual in (20, 100, 200)),
    *(("prefix", virtual, 16) for virtual in (20, 100, 200)),
    *(("lora", 0, batch) for batch in (16, 4)),
]
# On an accelerator: model, method, virtual tokens, rank of LoRA, batch.
SHAPES = [
    *(("llama-3.2-1b", "prompt", virtual, RANK, 16) for virtual in (20, 100, 200)),
    ("llama-3.2-1b", "prefix", 100, RANK, 16),
    ("llama-3.2-1b", "lora", 0, RANK, 16),
    ("llama-3.2-3b", "prompt", 200, 32, 4),
    ("llama-3.2-3b", "lora", 0, 32, 4),
]
TINY = [
    ("tiny", "prompt", 20, RANK, 4),
    ("tiny", "prefix", 20, RANK, 4),
    ("tiny", "lora", 0, 32, 4),
]
# The names in `plan.hardware` of devices whose kind contains a text. An H200 multiplies as fast
# as an H100.
PEAKS = {"H100": "h100-1", "H200": "h100-1", "A100": "a100-1"}
PUBLISHED = """
peft's own comparison, Llama-3.2-3B in bfloat16, batch 4, rows of about 210 tokens, one L40S:
4,462 tokens/s and 24.4 GB with 200 virtual tokens; 7,174 tokens/s and 22.3 GB with LoRA of rank
32. The rows of llama-3.2-3b have the same sizes."""


def prepare(folder, name, cases, clock):
    """Run `prepare.py`, and return the setting that all cases share."""
    adapters = sorted({(method, virtual, rank) for method, virtual, rank, _ in cases})
    words = [sys.executable, HERE / "prepare.py", folder, name, json.dumps(adapters)]
    subprocess.run(list(map(str, words)), check=True)
    setting = json.loads((folder / "setting.json").read_text())
    return setting | {"model": name, "clock": clock}


def as_case(setting, method, virtual, rank, batch):
    """Return a case as workers read it. Without a batch size, nothing is trained."""
    return setting | {"method": method, "virtual": virtual, "rank": rank, "batch": batch}


def train_all(folder, pythons, setting, cases, batches, rounds, unit):
    """Print rows for each case of training, and return the operations of all."""
    operations = []
    for case in cases:
        with measure.Pair(folder, pythons, as_case(setting, *case)) as pair:
            rows, counted = measure.training(pair, batches, rounds, unit)
        print(*rows, sep="\n", flush=True)
        operations.append(counted)
    return operations


def sentiment(folder, pythons, clock, quick):
    """Measure everything with SmolLM2, and return the operations and the setting."""
    cases = [(m, virtual, RANK, batch) for m, virtual, batch in (QUICK if quick else FULL)]
    setting = prepare(folder, "sentiment", cases, clock)
    batches, rounds = (1, 1) if quick else (4, 2)
    operations = train_all(folder, pythons, setting, cases, batches, rounds, "examples/s")
    if not quick:
        with measure.Pair(folder, pythons, as_case(setting, "prompt", 20, RANK, 16)) as pair:
            print(*measure.time_to_accuracy(pair, goal=0.86, every=20), sep="\n", flush=True)
    with measure.Pair(folder, pythons, as_case(setting, "prompt", 20, RANK, None)) as pair:
        texts, single, rounds = (64, 3, 2) if quick else (256, 9, 3)
        print(*measure.classification(pair, texts, single, rounds), sep="\n", flush=True)
    with measure.Pair(folder, pythons, as_case(setting, "prompt", 100, RANK, None)) as pair:
        for batch in (8,) if quick else (1, 8, 32):
            print(measure.generation(pair, batch, rounds=1 if quick else 3), flush=True)
    return operations, setting


def random_shapes(folder, pythons, clock, cases, rounds=5):
    """Train models with random weights, and return the operations."""
    operations = []
    for name in dict.fromkeys(model for model, *_ in cases):
        own = [case for model, *case in cases if model == name]
        setting = prepare(folder / name, name, own, clock)
        operations += train_all(folder / name, pythons, setting, own, 2, rounds, "tokens/s")
    return operations


def peak_rate(setting):
    """Return the published operations per second of the device, or None if it is not known."""
    names = [name for text, name in PEAKS.items() if text in setting["device"]]
    return parse_hardware(names[0])[0].flops if names else None


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peft-python", default=".venv/bench/bin/python", metavar="PYTHON")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="what to measure: wall time, or CPU seconds on a machine that does other work",
    )
    parser.add_argument("--shapes", choices=["tiny"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    pythons = sys.executable, options.peft_python
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="softprompt-bench-") as name:
        folder = Path(name)
        print(HEADER, flush=True)
        if options.shapes:
            operations = random_shapes(folder, pythons, options.clock, TINY, rounds=1)
            setting = {"platform": "cpu", "device": "cpu"}
        else:
            operations, setting = sentiment(
                folder / "sentiment", pythons, options.clock, options.quick
            )
            if setting["platform"] != "cpu":
                operations += random_shapes(folder, pythons, options.clock, SHAPES)
    print(f"\n{OPERATIONS_HEADER}")
    for each in operations:
        print(each.row(peak_rate(setting)))
    if options.shapes or setting["platform"] != "cpu":
        print(PUBLISHED)
    else:
        print("\nOn a CPU, the models in the shapes of Llama 3.2 are left out.")
    if options.clock == "cpu":
        print("\nAll times are CPU seconds of all threads together.")
    print(f"\nThis took {time.perf_counter() - began:.0f} s on {setting['device']}.")


if __name__ == "__main__":
    main()
