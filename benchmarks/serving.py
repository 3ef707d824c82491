"""Measure `softprompt serve` over loopback and compare it with calls in Python.

    python benchmarks/serving.py FOLDER [--rounds 3] [--other NAME=URL ...]

The script writes 20 prompts of 20 virtual tokens and one prompt with two labels to FOLDER. It
starts the server with the base model, and reports:

- tokens/s of 16 clients that use the prompts and the base model without a prompt, 64 tokens per
  request. They are compared with `generate` in Python with batches of 16, and with one client. All
  answers must be equal.
- the time to the first token with 1 client and with 8. The 8 clients start one after another and
  ask for 16 to 96 tokens, so that requests arrive at any time. Then they start together and all ask
  for 64 tokens, so that 8 requests arrive at once.
- the time of one request, compared with the same call in Python.
- labels/s of 32 clients with one text each, compared with one request with 32 texts.

`--other` also measures another server with an OpenAI-compatible API, which must serve an export of
the prompt FOLDER/p00 with all virtual tokens in its vocabulary:

    softprompt export FOLDER/p00 DIR --format gguf --dtype f32
    python -m llama_cpp.server --model DIR/model.gguf --n_ctx 1024 --port 8001

    softprompt export FOLDER/p00 DIR --format merged
    python -m vllm.entrypoints.openai.api_server --model DIR --dtype float32 \
        --gpu-memory-utilization 0.5 --port 8002

Each client sends its next request when it has received an answer. The number of requests is fixed.
"""

import argparse
import http.client
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from softprompt import Generator, SoftPrompt, TemplateSettings, load_base, load_prompt, make_task

BASE = "smollm2-135m-instruct"
PROMPTS, CLIENTS, REQUESTS, NEW_TOKENS = 20, 16, 64, 64
THINGS = [
    "river",
    "clock",
    "garden",
    "engine",
    "letter",
    "window",
    "market",
    "bridge",
    "candle",
    "forest",
]
LABELS = {"positive": " positive", "negative": " negative"}


class Client:
    """One connection to a server."""

    def __init__(self, url: str):
        parts = urllib.parse.urlsplit(url)
        self._connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=600)

    def send(self, path: str, body: dict[str, Any]) -> http.client.HTTPResponse:
        """Send a request and return the response. Its body is not read yet."""
        content = json.dumps(body).encode()
        self._connection.request("POST", path, content, {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{path}: {response.status} {response.read().decode()}")
        return response

    def complete(
        self, model: str, text: str, tokens: int = NEW_TOKENS, **more: Any
    ) -> tuple[str, int]:
        """Return the answer and its number of tokens."""
        body = {"model": model, "prompt": text, "max_tokens": tokens, "temperature": 0} | more
        answer = json.load(self.send("/v1/completions", body))
        return answer["choices"][0]["text"], answer["usage"]["completion_tokens"]

    def first_token(self, model: str, text: str, tokens: int) -> float:
        """Return the seconds to the first token, and read the rest of the answer."""
        body = {"model": model, "prompt": text, "max_tokens": tokens, "temperature": 0}
        began = time.perf_counter()
        response = self.send("/v1/completions", body | {"stream": True})
        response.readline()
        seconds = time.perf_counter() - began
        response.read()
        return seconds

    def classify(self, model: str, texts: Sequence[str]) -> list[str]:
        """Return the label of each text."""
        answer = json.load(self.send("/v1/classify", {"model": model, "input": list(texts)}))
        return [each["label"] for each in answer["data"]]


def in_clients(
    url: str, clients: int, items: Sequence[Any], work: Callable, apart: float = 0
) -> tuple[float, list]:
    """Do some work for each item in several clients, which start some seconds apart.

    Returns:
      The seconds and the results.
    """
    results: list[Any] = [None] * len(items)
    left, lock = iter(range(len(items))), threading.Lock()

    def run(client: Client) -> None:
        while True:
            with lock:
                number = next(left, None)
            if number is None:
                return
            results[number] = work(client, items[number])

    threads = [threading.Thread(target=run, args=[Client(url)]) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
        time.sleep(apart)
    for thread in threads:
        thread.join()
    return time.perf_counter() - began, results


def make_prompts(base, folder: Path) -> list[str]:
    """Save the prompts. Return the names of those without labels."""
    names = [f"p{number:02}" for number in range(PROMPTS)]
    for number, name in enumerate(names):
        SoftPrompt.from_vocabulary(base, 20, jax.random.key(number)).save(folder / name, base)
    template = TemplateSettings(input="Review: {text}\nSentiment:")
    task = make_task(base, template, LABELS, virtual_tokens=20)
    SoftPrompt.from_text(base, "Sentiment of the review.", 20).save(folder / "labels", base, task)
    return names


def inputs(count: int) -> list[str]:
    """Return short inputs that differ."""
    random = np.random.default_rng(0)
    pairs = (random.choice(THINGS, 2, replace=False) for _ in range(count))
    return [f"Number {i}: the {a} and the {b}. Then" for i, (a, b) in enumerate(pairs)]


def start_server(folder: Path) -> tuple[subprocess.Popen, str]:
    """Start the server and wait until it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["serve", "--base", BASE, "--prompts-dir", folder, "--port", port]
    began = time.perf_counter()
    server = subprocess.Popen([sys.executable, "-m", "softprompt", *map(str, command)])
    url = f"http://127.0.0.1:{port}"
    while not is_ready(port):
        if server.poll() is not None:
            raise SystemExit("the server has stopped")
        time.sleep(0.2)
    print(f"the server was ready after {time.perf_counter() - began:.1f} s", flush=True)
    return server, url


def is_ready(port: int) -> bool:
    """Return whether the server is ready."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def measure_generation(generator: Generator, url: str, names: Sequence[str], rounds: int) -> None:
    """Compare the tokens/s of many clients, of one client and of Python."""
    texts = inputs(REQUESTS)
    models = [[*names, BASE][number % (PROMPTS + 1)] for number in range(REQUESTS)]
    chosen = [None if model == BASE else model for model in models]
    requests = list(zip(models, texts, strict=True))

    def offline() -> tuple[float, list[str]]:
        began = time.perf_counter()
        found = generator.generate(texts, chosen, CLIENTS, max_new_tokens=NEW_TOKENS)
        return time.perf_counter() - began, [each.text for each in found]

    def complete(client: Client, request: tuple[str, str]) -> tuple[str, int]:
        return client.complete(*request)

    offline()  # compiles
    in_clients(url, CLIENTS, requests, complete)
    rates: dict[str, list[float]] = {"python": [], "clients": [], "ratio": []}
    for _ in range(rounds):
        python_seconds, expected = offline()
        seconds, answers = in_clients(url, CLIENTS, requests, complete)
        tokens = sum(count for _, count in answers)
        wrong = sum(text != other for (text, _), other in zip(answers, expected, strict=True))
        rates["python"].append(tokens / python_seconds)
        rates["clients"].append(tokens / seconds)
        rates["ratio"].append(python_seconds / seconds)
        print(f"{REQUESTS} answers, {tokens} tokens, {wrong} not equal", flush=True)
    few = requests[: REQUESTS // 8]
    seconds, answers = in_clients(url, 1, few, complete)
    alone = sum(count for _, count in answers) / seconds
    print(f"generate in Python, batches of {CLIENTS}: {median(rates['python']):.1f} tokens/s")
    print(f"{CLIENTS} clients: {median(rates['clients']):.1f} tokens/s", end=" ")
    times = median(rates["clients"]) / alone
    print(f"({median(rates['ratio']):.2f} of Python, {times:.1f} times one client's {alone:.1f})")


def measure_first_token(url: str, names: Sequence[str]) -> None:
    """Measure the time to the first token with one client and with eight."""
    count = 96
    lengths = np.random.default_rng(1).integers(16, 97, count).tolist()
    models = [names[number % PROMPTS] for number in range(count)]
    varied = list(zip(models, inputs(count), lengths, strict=True))
    equal = [(model, text, NEW_TOKENS) for model, text, _ in varied]

    def measure(clients: int, requests: Sequence[Any], apart: float = 0) -> np.ndarray:
        def first(client: Client, request: tuple[str, str, int]) -> float:
            return client.first_token(*request)

        _, found = in_clients(url, clients, requests, first, apart)
        return np.quantile(found, (0.5, 0.95)) * 1e3

    alone = measure(1, varied[:24])
    print(f"first token, 1 client: median {alone[0]:.0f} ms, p95 {alone[1]:.0f} ms")
    for name, found in (
        ("at any time", measure(8, varied, apart=0.3)),
        ("together", measure(8, equal)),
    ):
        print(
            f"first token, 8 clients, requests arrive {name}: median {found[0]:.0f} ms, "
            f"p95 {found[1]:.0f} ms, {found[1] / alone[1]:.1f} times one client's"
        )


def measure_overhead(base, folder: Path, url: str) -> None:
    """Compare a request with the same call in Python."""
    prompt, client = load_prompt(folder, base), Client(url)
    text, tokens, differences = inputs(1)[0], 8, []
    python, server = [], []
    for _ in range(20):
        began = time.perf_counter()
        prompt.generate([text], max_new_tokens=tokens)
        middle = time.perf_counter()
        client.complete(folder.name, text, tokens)
        python.append(middle - began)
        server.append(time.perf_counter() - middle)
        differences.append(server[-1] - python[-1])
    print(
        f"one request of {tokens} tokens: {median(server) * 1e3:.1f} ms, in Python "
        f"{median(python) * 1e3:.1f} ms, difference {median(differences) * 1e3:.1f} ms"
    )


def measure_labels(url: str, rounds: int) -> None:
    """Compare clients that send one text each with one request for all texts."""
    texts = inputs(32)

    def one_text(client: Client, text: str) -> list[str]:
        return client.classify("labels", [text])

    def all_texts(client: Client, item: Sequence[str]) -> list[str]:
        return client.classify("labels", item)

    repeated, ratios = texts * 4, []
    for _ in range(rounds):
        together, _ = in_clients(url, 1, [texts] * 4, all_texts)
        apart, _ = in_clients(url, 32, repeated, one_text)
        ratios.append(together / apart)
    rate = len(repeated) / apart
    print(f"labels of 32 clients: {rate:.0f} texts/s, {median(ratios):.2f} of one request with 32")


def measure_engine(
    name: str,
    url: str,
    model: str,
    opening: str = "",
    expected: Sequence[str] = (),
    **more: Any,
) -> list[str]:
    """Measure the tokens/s of a server for one prompt. Return its answers.

    Args:
      name: the name of the server in the output.
      url: its address.
      model: the name of the model in requests.
      opening: the text that each input begins with.
      expected: the right answers.
      more: other parameters of requests.
    """
    texts = [opening + text for text in inputs(CLIENTS)]

    def complete(client: Client, text: str) -> tuple[str, int]:
        return client.complete(model, text, **more)

    def rate(clients: int, texts: Sequence[str]) -> tuple[float, list[str]]:
        seconds, answers = in_clients(url, clients, texts, complete)
        return sum(count for _, count in answers) / seconds, [text for text, _ in answers]

    rate(CLIENTS, texts)
    together = [rate(CLIENTS, texts) for _ in range(3)]
    alone = [rate(1, texts[:2]) for _ in range(3)]
    found = together[0][1]
    equal = sum(a == b for a, b in zip(found, expected or found, strict=True))
    print(
        f"{name}: {median([each for each, _ in together]):.1f} tokens/s with {CLIENTS} clients, "
        f"{median([each for each, _ in alone]):.1f} with one; "
        f"{equal} of {len(found)} answers equal softprompt's",
        flush=True,
    )
    return found


def fetch(url: str, path: str) -> http.client.HTTPResponse:
    """Return the response to a GET request."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    connection.request("GET", path)
    return connection.getresponse()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of the prompts")
    parser.add_argument("--rounds", type=int, default=3, help="0 measures only with --other")
    parser.add_argument("--other", action="append", default=[], metavar="NAME=URL")
    options = parser.parse_args()
    base = load_base(BASE)
    names = make_prompts(base, options.folder)
    generator = Generator(base, {name: options.folder / name for name in names})
    server, url = start_server(options.folder)
    try:
        if options.rounds:
            measure_generation(generator, url, names, options.rounds)
            measure_first_token(url, names)
            measure_overhead(base, options.folder / names[0], url)
            measure_labels(url, options.rounds)
        expected = measure_engine("softprompt", url, names[0]) if options.other else []
    finally:
        server.terminate()
        server.wait()
    opening = "".join(f"<|softprompt-{number}|>" for number in range(20))
    for name, address in (other.split("=", 1) for other in options.other):
        model = json.load(fetch(address, "/v1/models"))["data"][0]["id"]
        # llama-cpp-python penalizes repetition by default. vLLM ignores the parameter.
        measure_engine(name, address, model, opening, expected, repeat_penalty=1.0)


if __name__ == "__main__":
    main()
