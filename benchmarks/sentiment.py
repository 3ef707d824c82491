"""Run the default sentiment experiment with three seeds, and the base model without a prompt.

    python benchmarks/sentiment.py runs/benchmark

Each run is a separate `softprompt train` process. The first one starts with an empty
compilation cache, and the others find its programs. A last run measures the time from the
command to the end of the first training step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

EXPERIMENT = "experiments/sentiment.yaml"
SOFTPROMPT = str(Path(sys.executable).parent / "softprompt")


def zero_shot():
    """Evaluate the base model without a prompt on the test split."""
    from softprompt import load_base, load_experiment, make_examples, make_task
    from softprompt.data.records import read_records
    from softprompt.evaluation.evaluate import evaluate

    experiment = load_experiment(Path(EXPERIMENT))
    base = load_base(experiment.base)
    task = make_task(base, experiment.template, experiment.verbalizer)
    examples = make_examples(task, read_records(experiment.data.test), "test")
    return evaluate(base.backbone, None, task, examples, experiment, "zero-shot").values()


def seconds_to_first_step(folder, environment):
    """Time a command from its start to the checkpoint after its first step."""
    command = [SOFTPROMPT, "train", EXPERIMENT, "checkpoints.every=1", "--run-dir", str(folder)]
    began = time.perf_counter()
    process = subprocess.Popen(command, env=environment)
    while not (folder / "checkpoints" / "1").exists():
        if process.poll() is not None:
            raise SystemExit("the run ended before its first step")
        time.sleep(0.02)
    seconds = time.perf_counter() - began
    process.kill()
    process.wait()
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a new folder for the runs")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(options.folder / "compiled")}

    rows = []
    for seed in range(3):
        folder = options.folder / f"seed-{seed}"
        command = [SOFTPROMPT, "train", EXPERIMENT, f"seed={seed}", *options.overrides]
        began = time.perf_counter()
        subprocess.run(
            [*command, "--run-dir", str(folder)],
            check=True,
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        summary = json.loads((folder / "summary.json").read_text())
        rows.append((seed, time.perf_counter() - began, summary))
    first_step = seconds_to_first_step(options.folder / "start", environment)
    alone = zero_shot()

    print("| seed | wall, s | examples/s | peak memory, GB | validation accuracy | test accuracy |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for seed, seconds, s in rows:
        memory, rate = s["peak_memory_bytes"] / 1e9, s["examples_per_second"]
        accuracies = f"{s['validation']['accuracy']:.3f} | {s['test']['accuracy']:.3f}"
        print(f"| {seed} | {seconds:.0f} | {rate:.1f} | {memory:.2f} | {accuracies} |")
    mean = statistics.mean(s["test"]["accuracy"] for *_, s in rows)
    print(
        f"\nmean test accuracy {mean:.4f}; the base model without a prompt {alone['accuracy']:.3f}"
    )
    print(f"time to the first step with a warm compilation cache: {first_step:.1f} s")


if __name__ == "__main__":
    main()
