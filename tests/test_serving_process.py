"""The command: its mistakes, SIGKILL and SIGTERM under load."""

import contextlib
import http.client
import json
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from conftest import GOLDEN
from processes import ForkedProcess
from servers import LABELS, save_prompt

from softprompt import load_prompt
from softprompt.cli import serve

COMMAND = "import sys\nfrom softprompt.cli.main import main\nsys.exit(main())"


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return save_prompt(tmp_path_factory.mktemp("prompts") / "texts", tiny, 1)


def free_port() -> int:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        return server.getsockname()[1]


BASE = str(GOLDEN / "llama-grouped")


def start(folder: Path, port: int, *more: str) -> ForkedProcess:
    words = ["serve", f"texts={folder}", "--base", BASE]
    limits = ["--max-tokens", "128", "--slots", "2", "--bank-tokens", "64"]
    return ForkedProcess(COMMAND, [*words, *limits, "--port", str(port), *more])


def ask(port: int, path: str, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        content = None if body is None else json.dumps(body)
        headers = {"Content-Type": "application/json"}
        connection.request("GET" if body is None else "POST", path, content, headers)
        response = connection.getresponse()
        return response.status, response.read()


def wait_until_ready(process: ForkedProcess, port: int) -> set[int]:
    """Wait, and return the statuses of `/health` on the way."""
    statuses = set()
    end = time.monotonic() + 300
    while 200 not in statuses:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        with contextlib.suppress(OSError, http.client.HTTPException):
            statuses.add(ask(port, "/health")[0])
        time.sleep(0.02)
    return statuses


class Load:
    """Clients that ask again and again until they are told to stop, or cannot connect."""

    def __init__(self, port: int, count: int = 6):
        self.port, self.stopping, self.results = port, False, []
        self.threads = [threading.Thread(target=self._run) for _ in range(count)]
        for thread in self.threads:
            thread.start()

    def _run(self):
        body = {"model": "texts", "prompt": "hello", "max_tokens": 60}
        while not self.stopping:
            try:
                status, content = ask(self.port, "/v1/completions", body)
                text = json.loads(content)["choices"][0]["text"] if status == 200 else ""
                self.results.append((status, text))
            except ConnectionRefusedError:
                return
            except (OSError, http.client.HTTPException) as error:
                self.results.append((0, repr(error)))
                return

    def join(self):
        for thread in self.threads:
            thread.join()


def test_a_killed_server_starts_again_and_sigterm_loses_no_request(folder, tiny):
    port = free_port()
    process = start(folder, port)
    assert wait_until_ready(process, port) == {503, 200}  # it answers while it compiles
    models = json.loads(ask(port, "/v1/models")[1])["data"]
    assert [model["id"] for model in models] == [BASE, "texts"]
    load = Load(port)
    while len(load.results) < 6:
        time.sleep(0.01)
    process.kill()
    load.join()
    process.communicate()
    assert process.returncode == -signal.SIGKILL

    process = start(folder, port)
    wait_until_ready(process, port)
    load = Load(port)
    while len(load.results) < 6:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    load.join()
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    (expected,) = load_prompt(folder, tiny).generate(["hello"], max_new_tokens=60)
    assert {text for status, text in load.results if status == 200} == {expected.text}
    lost = [text for status, text in load.results if status != 200]
    # A connection that was not accepted before the signal is closed without an answer.
    assert all("reset" in text or "closed" in text.lower() for text in lost), lost
    logged = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    answered = [line for line in logged if line["path"] == "/v1/completions"]
    assert [line["status"] for line in answered] == [200] * len(answered)
    assert "Traceback" not in errors


def test_mistakes_of_the_command_are_one_line(call, folder, tmp_path, monkeypatch, tiny):
    limit = ["--max-tokens", 128]
    base = ["--base", str(GOLDEN / "llama-grouped"), "--port", "0"]

    def fails(*words):
        status, _, errors = call("serve", *words)
        assert status == 1
        assert errors.count("\n") == 1, errors
        return errors

    assert "give the base model with --base" in fails()
    assert "give a prompt as NAME=RUN" in fails("runs/sentiment")
    assert "two prompts have the same name" in fails(f"a={folder}", f"a={folder}")
    assert "a name has at most" in fails(f"../a={folder}", *base)
    assert "no such folder" in fails("--prompts-dir", tmp_path / "absent", *base)
    assert "the API key must consist of printable ASCII" in fails("--api-key", "ключ", *base)
    assert "contains no trained prompt" in fails(f"a={tmp_path / 'absent'}", *base)
    assert "--max-tokens 1024: the context window" in fails(f"a={folder}", *base)
    inside = save_prompt(tmp_path / "inside", tiny, 1, "{text} {prompt} is", LABELS)
    assert f"{inside}: virtual tokens are inside its inputs" in fails(f"a={inside}", *base, *limit)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "cannot be used" in fails(f"a={folder}", *base[:2], "--port", port)
    monkeypatch.setattr(serve, "_EXTRA", ("absent_package",))
    assert "pip install 'softprompt[serve]'" in fails(f"a={folder}", *base)
