"""A server in a thread, with prompts of the tiny model, for tests."""

import contextlib
import copy
import dataclasses
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import softprompt
from softprompt import Base, SoftPrompt, TemplateSettings, make_task
from softprompt.experiment.schema import GenerationSettings
from softprompt.methods.prefix_tuning import PrefixTuning
from softprompt.serving.server import Server, bind
from softprompt.serving.service import Limits, Service
from softprompt.serving.state import Options, State

CHAT = """\
{%- for message in messages %}
    {{- '<|start|>' + message.role[0] + message.content + '<|pad|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>a' }}{% endif %}
"""
LABELS = {"low": " ab", "high": " cd"}
LIMITS = Limits(slots=3, tokens=128, bank_tokens=256, waiting=32)


def with_chat_template(base: Base) -> Base:
    """Return a base model with a short chat template."""
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = CHAT
    return dataclasses.replace(base, tokenizer=tokenizer)


def save_prompt(
    folder: Path,
    base: Base,
    seed: int,
    template: str = "{text}:",
    labels: Mapping[str, str] | None = None,
    *,
    length: int = 4,
    **generation: Any,
) -> Path:
    """Save a random soft prompt."""
    width = base.backbone.arch.hidden_size
    vectors = jax.random.normal(jax.random.key(seed), (length, width))
    settings = TemplateSettings(input=template)
    task = make_task(base, settings, labels, virtual_tokens=length)
    prompt = SoftPrompt(vectors, task.opening)
    how = GenerationSettings(**{"max_new_tokens": 6, **generation})
    softprompt.save_prompt(folder, prompt, base, task, generation=how)
    return folder


def save_huge_prefix(folder: Path, base: Base) -> Path:
    """Save a prefix whose numbers are finite, but with which the model's are not."""
    keys = jnp.full(base.backbone.prefix_shape(2), 1e38)
    task = make_task(base, TemplateSettings(input="{text}:"), None, prefix_length=2)
    softprompt.save_prompt(folder, PrefixTuning(keys, keys, task.opening), base, task)
    return folder


@dataclasses.dataclass
class Answer:
    """What a server answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The events of a stream, without the mark at its end."""
        lines = self.body.decode().split("\n\n")
        assert lines[-1] == ""
        return [
            json.loads(line.removeprefix("data: ")) for line in lines[:-1] if "[DONE]" not in line
        ]


@dataclasses.dataclass
class Running:
    """A server that runs in a thread."""

    server: Server
    state: State
    port: int
    thread: threading.Thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Send a request and wait for the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        more = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body, more = json.dumps(body).encode(), {"Content-Type": "application/json"} | more
        with contextlib.closing(connection):
            connection.request(method, path, body, more)
            response = connection.getresponse()
            return Answer(response.status, dict(response.headers.items()), response.read())

    def post(self, path: str, **body: Any) -> Answer:
        """Send a JSON object."""
        return self.ask("POST", path, body)

    def open(self, path: str, **body: Any) -> socket.socket:
        """Send a request and return the connection, without waiting for the answer."""
        content = json.dumps(body).encode()
        connection = socket.create_connection(("127.0.0.1", self.port))
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        return connection

    def until(self, condition, seconds: float = 60) -> None:
        """Wait until something is true."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.01)


@contextlib.contextmanager
def serving(
    base: Base,
    prompts: Mapping[str, Path],
    options: Options | None = None,
    limits: Limits = LIMITS,
    *,
    wait: bool = True,
) -> Iterator[Running]:
    """Serve prompts while the context is active."""
    state = State(Service(base, "tiny", limits), options or Options())
    server = Server(state, list(prompts.items()))
    bound = bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=[bound])
    thread.start()
    running = Running(server, state, bound.getsockname()[1], thread)
    try:
        if wait:
            running.until(lambda: state.is_ready or not thread.is_alive(), 300)
            assert state.is_ready
        yield running
    finally:
        server.stop()
        thread.join()
