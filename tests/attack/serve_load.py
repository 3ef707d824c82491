"""Send thousands of requests to a server, some of them hostile, while prompts come and go.

    python tests/attack/serve_load.py --requests 10000 --hostile 0.05

All valid requests must be answered, and each answer must be what the prompt generates offline. A
request for a prompt that comes and goes may also get status 404. At the end no request may be left
in the server, its memory must not have grown by more than 2 %, and SIGTERM must end it with
status 0.
"""

import argparse
import contextlib
import io
import itertools
import json
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from conftest import GOLDEN
from servers import LABELS, save_prompt

from attack.hostile_requests import ADMIN_KEY, HOSTILE, exchange
from softprompt import load_base, load_prompt

BASE = str(GOLDEN / "llama-grouped")
STAYING = ("p0", "p1", "p2", "labels")
GUESTS = ("guest", "uploaded", "copied")
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
SETTINGS: tuple[dict[str, Any], ...] = (
    {"max_tokens": 8},
    {"max_tokens": 24},
    {"max_tokens": 12, "temperature": 1.2, "seed": 3},
    {"max_tokens": 12, "temperature": 0.9, "seed": 4, "top_p": 0.8, "top_k": 20},
    {"max_tokens": 12, "repetition_penalty": 1.3, "stop": ["e"]},
)
LARGEST_GROWTH = 0.02


class Expected:
    """What each prompt answers offline."""

    def __init__(self, folder: Path, base: Any):
        rng = random.Random(0)
        self.texts = ["".join(rng.choices("abcdefg hi", k=rng.randint(1, 60))) for _ in range(24)]
        self.answers: dict[tuple[str, int, str], str] = {}
        self.labels: dict[str, dict[str, float]] = {}
        for name in (*STAYING[:-1], "guest"):
            prompt = load_prompt(folder / name, base)
            for number, given in enumerate(SETTINGS):
                settings = {"max_new_tokens": given["max_tokens"], **given}
                del settings["max_tokens"]
                found = prompt.generate(self.texts, **settings)
                for text, generated in zip(self.texts, found, strict=True):
                    self.answers[name, number, text] = generated.text
        for text, found in zip(
            self.texts, load_prompt(folder / "labels", base).classify(self.texts), strict=True
        ):
            self.labels[text] = found.probabilities

    def answer(self, name: str, number: int, text: str) -> str:
        return self.answers["guest" if name in GUESTS else name, number, text]


def make_prompts(folder: Path, base: Any) -> None:
    """Save the prompts. All guests are the same one."""
    for number, name in enumerate(STAYING[:-1]):
        save_prompt(folder / name, base, number, length=4 + number)
    save_prompt(folder / "labels", base, 7, "{text} is", LABELS)
    save_prompt(folder / "guest", base, 9, length=7)


class Attack:
    """Clients that send requests until a number of them is reached."""

    def __init__(self, port: int, expected: Expected, count: int, hostile: float):
        self.port, self.expected, self.count, self.hostile = port, expected, count, hostile
        self.numbers, self.lock = itertools.count(), threading.Lock()
        self.done: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()  # guests
        self.problems: list[str] = []

    def run(self, clients: int) -> None:
        """Run the clients."""
        threads = [threading.Thread(target=self._client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    @property
    def total(self) -> int:
        """The number of requests that have been sent."""
        return sum(self.done.values())

    def report(self, kind: str, problem: str | None) -> None:
        with self.lock:
            self.done[kind] += 1
            if problem is not None:
                self.problems.append(f"{kind}: {problem}")

    def _client(self) -> None:
        while (number := next(self.numbers)) < self.count:
            rng = random.Random(number)
            send = rng.choice(HOSTILE) if rng.random() < self.hostile else self._valid(rng)
            try:
                problem = send(self.port, rng)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            self.report(send.__name__.lstrip("_"), problem)

    def _valid(self, rng: random.Random) -> Any:
        kinds = (self._complete, self._stream, self._chat, self._classify, self._guest)
        return rng.choices(kinds, weights=(4, 3, 1, 2, 2))[0]

    def _case(self, rng: random.Random, names: Any) -> tuple[str, dict[str, Any], str]:
        """Return a text, the body of a request, and the right answer."""
        name, number = rng.choice(names), rng.randrange(len(SETTINGS))
        text = rng.choice(self.expected.texts)
        return (
            text,
            {"model": name} | SETTINGS[number],
            self.expected.answer(name, number, text),
        )

    def _complete(self, port: int, rng: random.Random) -> str | None:
        text, body, right = self._case(rng, STAYING[:-1])
        status, content = post(port, "/v1/completions", body | {"prompt": text})
        return different(status, content, lambda answer: answer["choices"][0]["text"], right)

    def _chat(self, port: int, rng: random.Random) -> str | None:
        text, body, right = self._case(rng, STAYING[:-1])
        body |= {"messages": [{"role": "user", "content": text}], "logprobs": True}
        status, content = post(port, "/v1/chat/completions", body)
        return different(
            status, content, lambda answer: answer["choices"][0]["message"]["content"], right
        )

    def _stream(self, port: int, rng: random.Random) -> str | None:
        text, body, right = self._case(rng, STAYING[:-1])
        status, content = post(port, "/v1/completions", body | {"prompt": text, "stream": True})
        if status != 200 or not content.endswith(b"data: [DONE]\n\n"):
            return f"status {status}: {content[-200:]!r}"
        events = [json.loads(line[6:]) for line in content.decode().split("\n\n")[:-2]]
        got = "".join(event["choices"][0]["text"] for event in events)
        return None if got == right else f"{got!r} instead of {right!r}"

    def _classify(self, port: int, rng: random.Random) -> str | None:
        texts = rng.choices(self.expected.texts, k=rng.choice([1, 1, 1, 5]))
        status, content = post(port, "/v1/classify", {"model": "labels", "input": texts})
        if status != 200:
            return f"status {status}: {content[:200]!r}"
        for text, found in zip(texts, json.loads(content)["data"], strict=True):
            right = self.expected.labels[text]
            got = [found["probabilities"][label] for label in right]
            if not np.allclose(got, list(right.values()), atol=1e-4):
                return f"{found} instead of {right}"
        return None

    def _guest(self, port: int, rng: random.Random) -> str | None:
        text, body, right = self._case(rng, GUESTS)
        status, content = post(port, "/v1/completions", body | {"prompt": text})
        if status == 404 and json.loads(content)["error"]["code"] == "model_not_found":
            return None
        with self.lock:
            self.answered[body["model"]] += 1
        return different(status, content, lambda answer: answer["choices"][0]["text"], right)


def post(port: int, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
    """Send JSON."""
    headers = {"Content-Type": "application/json"}
    return exchange(port, "POST", path, json.dumps(body).encode(), headers)


def different(status: int, content: bytes, text_of: Any, right: str) -> str | None:
    """Return how an answer differs from the right one, or None."""
    if status != 200:
        return f"status {status}: {content[:200]!r}"
    got = text_of(json.loads(content))
    return None if got == right else f"{got!r} instead of {right!r}"


class Guests(threading.Thread):
    """Loads and removes prompts in every way, again and again."""

    def __init__(self, port: int, folder: Path):
        super().__init__()
        self.port, self.folder, self.stopping = port, folder, threading.Event()
        self.rounds, self.problems = 0, []
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            archive.add(folder / "guest", ".")
        self.archive = packed.getvalue()

    def run(self) -> None:
        try:
            self._come_and_go()
        except Exception as error:
            self.problems.append(f"{type(error).__name__}: {error}")

    def _come_and_go(self) -> None:
        outside = self.folder.parent / "copy"
        shutil.copytree(self.folder / "guest", outside)
        rng = random.Random(0)
        while not self.stopping.is_set():
            self.call("PUT", "guest", json.dumps({"folder": "guest"}).encode(), "application/json")
            self.call("PUT", "uploaded", self.archive, "application/x-tar")
            shutil.copytree(outside, self.folder / "copied", dirs_exist_ok=True)
            self.stopping.wait(rng.uniform(0, 4))
            self.call("DELETE", "guest")
            self.call("DELETE", "uploaded")
            shutil.rmtree(self.folder / "copied")
            self.stopping.wait(rng.uniform(0, 2))
            self.rounds += 1

    def call(self, method: str, name: str, body: bytes | None = None, kind: str = "") -> None:
        headers = ADMIN | ({"Content-Type": kind} if kind else {})
        status, content = exchange(self.port, method, f"/v1/prompts/{name}", body, headers)
        if status != 200:
            self.problems.append(f"{method} {name}: {status} {content[:200]!r}")


@contextlib.contextmanager
def started(folder: Path, log: Path) -> Iterator[tuple[subprocess.Popen, int]]:
    """Start a server and wait until it is ready."""
    command = [sys.executable, "-m", "softprompt", "serve", "--base", BASE, "--port", "0"]
    command += ["--prompts-dir", str(folder), "--admin-key", ADMIN_KEY, "--name", "tiny"]
    command += ["--max-tokens", "128", "--slots", "8", "--bank-tokens", "256"]
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        while not (found := [line for line in log.read_text().splitlines() if "serving" in line]):
            if server.poll() is not None:
                raise SystemExit(log.read_text())
            time.sleep(0.2)
        yield server, int(found[0].rsplit(":", 1)[1])
    finally:
        server.kill()
        server.wait()


def memory(server: subprocess.Popen) -> int:
    """Return the resident memory in bytes."""
    status = Path(f"/proc/{server.pid}/status").read_text().splitlines()
    (line,) = [line for line in status if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


def left_over(port: int) -> list[str]:
    """Return the metrics according to which requests are still in the server."""
    _, content = exchange(port, "GET", "/metrics")
    names = ("requests_running", "requests_waiting", "slots_used")
    lines = [line for line in content.decode().splitlines() if not line.startswith("#")]
    found = [line for line in lines if line.split()[0].removeprefix("softprompt_") in names]
    return [line for line in found if float(line.split()[1]) > 0] if len(found) == 3 else lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--hostile", type=float, default=0.05, help="the share of hostile requests")
    parser.add_argument("--clients", type=int, default=12)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, base = Path(temporary) / "prompts", load_base(BASE)
        make_prompts(folder, base)
        expected = Expected(folder, base)
        with started(folder, Path(temporary) / "log") as (server, port):
            attack = Attack(port, expected, options.requests, options.hostile)
            guests = Guests(port, folder)
            runner = threading.Thread(target=attack.run, args=[options.clients])
            began = time.monotonic()
            guests.start()
            runner.start()
            sizes: list[tuple[int, int]] = []
            while runner.is_alive() and server.poll() is None:
                runner.join(0.2)
                sizes.append((attack.total, memory(server)))
                print(f"\r{attack.total} requests, {sizes[-1][1] / 2**20:.0f} MiB", end="")
            guests.stopping.set()
            guests.join()
            runner.join()
            seconds = time.monotonic() - began
            time.sleep(2)
            left = left_over(port) if server.poll() is None else []
            server.terminate()
            code = server.wait(60)
        early = [size for done, size in sizes if 0.2 <= done / options.requests <= 0.3]
        late = [size for done, size in sizes if done / options.requests >= 0.9]
        if not early or not late:
            raise SystemExit("\nthe server died, or there were too few requests")
        growth = np.median(late) / np.median(early) - 1
    problems = [*attack.problems, *guests.problems, *left]
    problems += [f"{name} never answered" for name in GUESTS if not attack.answered[name]]
    if code != 0:
        problems.append(f"the server ended with status {code}")
    if growth > LARGEST_GROWTH:
        problems.append(f"the memory grew by {growth:.1%}")
    print(f"\n{dict(sorted(attack.done.items()))}; answers of guests: {dict(attack.answered)}")
    print(f"{attack.total} requests in {seconds:.0f} s; guests came and went {guests.rounds} times")
    print(f"memory {np.median(early) / 2**20:.0f} MiB, at the end {growth:+.1%}")
    for problem in problems[:20]:
        print(f"problem: {problem}")
    print(f"{len(problems)} problems")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
