"""Run the attack from the command line, and print a table of what happened."""

import argparse
import collections
import sys
import tempfile
import time
from pathlib import Path

from compilation import compile_quickly

from attack.cases import KINDS
from attack.judge import Fault, attack
from attack.sandbox import Sandbox, make_good_input
from attack.worker import Worker


def run() -> int:
    """Attack every kind of input, and return the exit status."""
    parser = argparse.ArgumentParser(prog="attack", description=__doc__)
    parser.add_argument("--count", type=int, default=5000, help="number of cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds, separated by commas")
    parser.add_argument("--keep", type=Path, help="folder for the damaged files of faults")
    options = parser.parse_args()
    compile_quickly()
    kinds = options.kinds.split(",")
    faults: list[Fault] = []
    with tempfile.TemporaryDirectory() as folder, Worker() as worker:
        good = Path(folder) / "good"
        good.mkdir()
        make_good_input(good)
        row = "{:22} {:>6} {:>8} {:>7} {:>7} {:>9} {:>9}"
        print(row.format("kind", "cases", "accepted", "refused", "faults", "slowest", "memory"))
        for kind in kinds:
            count, place = -(-options.count // len(kinds)), Path(folder) / "place"
            results = attack(kind, count, options.seed, good, place, worker)
            outcomes = [outcome for outcome, _ in results]
            found = [fault for _, fault in results if fault]
            for number, fault in enumerate(found, len(faults) + 1):
                print(f"\n{fault}\n", file=sys.stderr, flush=True)
                if options.keep:
                    Sandbox(good, options.keep / f"{number}").prepare(fault.case.files)
            counts = collections.Counter(outcome.status for outcome in outcomes)
            slowest = max(outcome.seconds for outcome in outcomes)
            memory = max(outcome.peak for outcome in outcomes) / 2**30
            cells = len(outcomes), counts[0], counts[1], len(found)
            print(row.format(kind, *cells, f"{slowest:.1f} s", f"{memory:.1f} GiB"), flush=True)
            faults += found
    names = collections.Counter(fault.name for fault in faults)
    print(f"{len(faults)} faults", *(f"{count} {name}" for name, count in names.items()), sep=", ")
    return 1 if faults else 0


if __name__ == "__main__":
    start = time.monotonic()
    status = run()
    print(f"{time.monotonic() - start:.0f} s")
    sys.exit(status)
