"""Measure the start of a training run on a million short rows.

    python benchmarks/million.py FOLDER [--rows 1000000] [--formats jsonl,csv,parquet]

The script writes data files of random words from the film reviews, 6 to 18 words a row, with
10,000 rows and with --rows. It then starts `softprompt train` on each, twice, with
`data.validation: 0.1` and two steps of 16 rows. The first start also compiles all programs. For
both starts, the script prints the peak memory and the seconds from the start of the process to the
first step. rows/s is the rate of reading, splitting and tokenizing: the additional rows of the
large file, divided by the additional time of its first start. FOLDER takes about 500 MB.
"""

import argparse
import csv
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

REVIEWS = Path(__file__).parent.parent / "experiments/data/movie_reviews/train.jsonl"
FEW = 10_000
EXPERIMENT = """\
base: smollm2-135m-instruct
data: {{train: {file}, validation: 0.1}}
template: {{input: "Review: {{text}}\\nSentiment:"}}
verbalizer: {{positive: " positive", negative: " negative"}}
training: {{steps: 2, batch_size: 16, log_every: 1}}
evaluation: {{examples: 16}}
"""


def write_rows(path, count):
    """Write a data file of random rows, in the format of its suffix."""
    words = [w for line in REVIEWS.open() for w in json.loads(line)["text"].split()]
    rng = random.Random(0)
    rows = (
        {
            "text": " ".join(rng.choices(words, k=rng.randint(6, 18))),
            "label": rng.choice(["positive", "negative"]),
        }
        for _ in range(count)
    )
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        schema = pyarrow.schema([("text", pyarrow.string()), ("label", pyarrow.string())])
        with parquet.ParquetWriter(path, schema) as writer:
            while batch := [row for row, _ in zip(rows, range(100_000), strict=False)]:
                writer.write_table(pyarrow.Table.from_pylist(batch, schema))
        return
    with path.open("w", newline="") as file:
        if path.suffix == ".csv":
            table = csv.DictWriter(file, ["text", "label"])
            table.writeheader()
            table.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def start(file, cache):
    """Train on a file. Return the seconds until the first step, and the peak memory in bytes."""
    experiment, run = file.with_suffix(".yaml"), file.with_suffix(".run")
    experiment.write_text(EXPERIMENT.format(file=file.name))
    shutil.rmtree(run, ignore_errors=True)
    metrics, log = run / "metrics.jsonl", file.with_suffix(".log")
    began, first = time.monotonic(), None
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "softprompt", "train", experiment, "--run-dir", run],
            env=os.environ | {"XDG_CACHE_HOME": str(cache)},
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        while process.poll() is None:
            if first is None and metrics.exists() and metrics.stat().st_size:
                first = time.monotonic() - began
            time.sleep(0.05)
    if process.returncode:
        sys.exit(log.read_text())
    return first, json.loads((run / "summary.json").read_text())["peak_memory_bytes"]


def stored_bytes(cache):
    return sum(path.stat().st_size for path in (cache / "softprompt/data").rglob("*"))


def measure(folder, kind, count):
    """Return seconds and peak memory of the first and of the second start, and the stored bytes."""
    file, cache = folder / f"{count}.{kind}", folder / "cache"
    if not file.exists():
        write_rows(file, count)
    for path in (cache / "softprompt").iterdir():
        if path.name not in ("weights", "digests", "tokenizers"):  # these belong to the base model
            shutil.rmtree(path)
    return start(file, cache), start(file, cache), stored_bytes(cache)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--formats", default="jsonl,csv,parquet")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    kinds = options.formats.split(",")
    few = options.folder / f"{FEW}.{kinds[0]}"
    write_rows(few, FEW)
    start(few, options.folder / "cache")  # converts the weights and compiles the programs
    print("| file | first start, s | MB | second start, s | MB | rows/s | stored, MB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for kind in kinds:
        for count in (FEW, options.rows):
            (first, most), (second, most_again), stored = measure(options.folder, kind, count)
            if count == FEW:
                few_seconds, rate = first, ""
            else:
                rate = f"{(count - FEW) / (first - few_seconds):,.0f}"
            print(
                f"| {count:,} rows, {kind} | {first:.1f} | {most / 1e6:,.0f} | {second:.1f} | "
                f"{most_again / 1e6:,.0f} | {rate} | {stored / 1e6:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
