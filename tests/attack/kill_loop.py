"""Stop runs at random moments, damage their files, fill the disk: the result must not change.

    python tests/attack/kill_loop.py --kills 100 --doubled 100 --flips 200 --full-disk 5

Every run trains a tiny experiment in a process of its own that saves a checkpoint after each
step. A signal stops it at a random moment, and the same command resumes it, until it finishes.
Then its prompt and its metrics must equal those of an undisturbed run, bit for bit.
"""

import argparse
import contextlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from conftest import write_experiment
from processes import ForkedProcess

from softprompt import load_experiment, load_prompt, train
from softprompt.cli.main import main as run_command
from softprompt.cli.progress import printed_log
from softprompt.storage.checkpoints import Checkpoints
from softprompt.storage.run_folder import read_metrics, read_summary

PATIENCE = 20.0  # seconds from a signal to the end of the process
OVERRIDES = ["training.steps=15", "evaluation.every=4", "checkpoints.every=1"]
CODE = """\
import sys
from pathlib import Path
from softprompt.cli.main import main
Path(sys.argv.pop(1)).touch()
sys.exit(main())
"""
TIMES = {"examples_per_second", "seconds", "train_seconds", "wall_seconds", "peak_memory_bytes"}
GENTLE = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


def outcome(folder: Path) -> Any:
    """Return the prompt and the metrics of a finished run, without times and memory use."""
    summary = read_summary(folder)
    assert summary is not None, f"{folder}: not finished"
    records = [summary, *read_metrics(folder)]
    vectors = load_prompt(folder).method.plain_vectors()
    kept = [{key: v for key, v in record.items() if key not in TIMES} for record in records]
    return kept, np.asarray(vectors).tobytes()


class Attack:
    """A tiny experiment, and the outcome of its undisturbed run.

    Args:
      folder: where everything is written.
      seed: determines signals, moments and damage.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder, self.random = folder, random.Random(seed)
        self.file = write_experiment(folder, 5, 5)
        self.whole = folder / "whole"
        began = time.monotonic()
        self.complete(self.whole)
        self.seconds = time.monotonic() - began  # of the fastest run so far
        self.expected = outcome(self.whole)

    def start(self, run: Path) -> ForkedProcess:
        """Start or resume a run, and wait until its command begins."""
        begun = self.folder / "begun"
        begun.unlink(missing_ok=True)
        arguments = [str(begun), "train", str(self.file), *OVERRIDES, "--run-dir", str(run)]
        process = ForkedProcess(CODE, arguments)
        while not begun.exists() and process.poll() is None:
            time.sleep(0.001)
        return process

    def finish(self, process: ForkedProcess, patience: float = 300) -> tuple[int, str]:
        """Wait for the end of a process, and return its exit status and its messages."""
        deadline = time.monotonic() + patience
        while process.poll() is None:
            if time.monotonic() > deadline:
                process.kill()
                raise AssertionError(
                    f"still running after {patience:.0f} s: {process.communicate()[1]}"
                )
            time.sleep(0.005)
        _, errors = process.communicate()
        assert process.returncode is not None
        return process.returncode, errors

    def complete(self, run: Path) -> None:
        """Start or resume a run, and require that it finishes."""
        status, errors = self.finish(self.start(run))
        assert status == 0, errors

    def strike(self, run: Path, numbers: Sequence[int]) -> int:
        """Start a run, send signals at a random moment, and return the exit status.

        With two signals, the second follows after 1 to 50 milliseconds.
        """
        process = self.start(run)
        began = time.monotonic()
        time.sleep(self.random.uniform(0, self.seconds))
        for number in numbers:
            if process.poll() is None:
                process.send_signal(number)
            time.sleep(self.random.uniform(0.001, 0.05) if number is not numbers[-1] else 0)
        status, errors = self.finish(process, PATIENCE)
        context = f"{run}, signals {list(numbers)}, status {status}:\n{errors}"
        assert "Traceback" not in errors, context
        assert status in {0, -signal.SIGKILL, *(128 + number for number in numbers)}, context
        if status == 0:
            self.seconds = min(self.seconds, time.monotonic() - began)
        return status

    def kill(self, count: int, *, doubled: bool) -> None:
        """Stop runs `count` times, and compare every run that finishes."""
        kind = "doubled signals" if doubled else "kills"
        sent = finished = 0
        run = self.folder / kind.replace(" ", "-")
        while sent < count:
            if doubled:
                numbers = self.random.choices(GENTLE, k=2)
            else:
                numbers = [self.random.choice([signal.SIGKILL, signal.SIGKILL, *GENTLE])]
            if self.strike(run, numbers) == 0:
                finished += self.compare(run)
            else:
                sent += 1
                print(f"{kind}: {sent}/{count}, {finished} runs finished", flush=True)
        self.complete(run)
        finished += self.compare(run)
        print(f"{kind}: {sent} sent, {finished} runs finished, 0 differences", flush=True)

    def compare(self, run: Path) -> int:
        """Require the outcome of the undisturbed run, then delete the run."""
        assert outcome(run) == self.expected, f"{run}: differs from the undisturbed run"
        shutil.rmtree(run)
        return 1

    def flip(self, count: int) -> None:
        """Flip single bits in saved files; each must be found."""
        for number in range(count):
            run = self.folder / "flipped"
            shutil.copytree(self.whole, run)
            messages = io.StringIO()
            if number % 2:
                path = self.flip_bit(run / "prompt")
                with contextlib.redirect_stderr(messages):
                    assert run_command(["eval", str(run)]) == 1, path
                assert messages.getvalue().count("\n") == 1, messages.getvalue()
            else:
                checkpoints = Checkpoints(run / "checkpoints", keep=2)
                path = self.flip_bit(checkpoints.path(checkpoints.steps[-1]))
                (run / "summary.json").unlink()
                with contextlib.redirect_stderr(messages), printed_log():
                    train(load_experiment(self.file, OVERRIDES), run)
                assert "not using this checkpoint" in messages.getvalue(), path
                assert outcome(run) == self.expected, path
            shutil.rmtree(run)
            if number % 20 == 19:
                print(f"flipped bits: {number + 1}/{count}", flush=True)
        print(f"flipped bits: {count} found", flush=True)

    def flip_bit(self, folder: Path) -> Path:
        """Flip a random bit in a random file of a folder, and return the file."""
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
        path = self.random.choice(files)
        content = bytearray(path.read_bytes())
        content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
        path.write_bytes(content)
        return path

    def fill_disk(self, count: int) -> None:
        """Train on disks that become full; resume each run after there is space."""
        disk = self.folder / "disk"
        disk.mkdir()
        if subprocess.run(mount(disk, 1000), capture_output=True).returncode:
            print("full disk: skipped, because a tmpfs cannot be mounted here", flush=True)
            return
        subprocess.run(["umount", str(disk)], check=True)
        for number in range(1, count + 1):
            kilobytes = self.random.randrange(24, 450)
            subprocess.run(mount(disk, kilobytes), check=True)
            try:
                status, errors = self.finish(self.start(disk / "run"))
                context = f"{kilobytes} kB, status {status}:\n{errors}"
                assert "Traceback" not in errors, context
                if status:
                    assert status == 1, context
                    assert "No space left" in errors.splitlines()[-1], context
                print(f"{kilobytes} kB: {errors.splitlines()[-1]}", flush=True)
                more = ["mount", "-o", "remount,size=64M", str(disk)]
                subprocess.run(more, check=True)
                self.complete(disk / "run")
                self.compare(disk / "run")
            finally:
                subprocess.run(["umount", str(disk)], check=True)
            print(f"full disk: {number}/{count}, resumed without a difference", flush=True)


def mount(folder: Path, kilobytes: int) -> list[str]:
    """Return the command that mounts a small file system in memory."""
    return ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]


def main() -> None:
    """Run what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("kills", "doubled", "flips", "full-disk"):
        parser.add_argument(f"--{name}", type=int, default=0, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        attack = Attack(Path(folder), options.seed)
        print(f"an undisturbed run takes {attack.seconds:.1f} s", flush=True)
        if options.kills:
            attack.kill(options.kills, doubled=False)
        if options.doubled:
            attack.kill(options.doubled, doubled=True)
        if options.flips:
            attack.flip(options.flips)
        if options.full_disk:
            attack.fill_disk(options.full_disk)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
