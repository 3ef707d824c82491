"""Keys, limits, metrics, logs, prompts that come and go, and clients that leave."""

import dataclasses
import io
import json
import shutil
import tarfile
import time

import pytest
from servers import LABELS, save_huge_prefix, save_prompt, serving

from softprompt import load_prompt
from softprompt.serving.service import Limits
from softprompt.serving.state import Options

KEY = {"Authorization": "Bearer key"}
ADMIN = {"Authorization": "Bearer admin"}


@pytest.fixture(scope="module")
def root(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("root")
    save_prompt(folder / "first", tiny, 1)
    return folder


@pytest.fixture(scope="module")
def server(tiny, root, tmp_path_factory):
    given = save_prompt(tmp_path_factory.mktemp("given") / "p", tiny, 5)
    options = Options("key", "admin", root, max_body_bytes=2000, cors_origins=("http://a.b",))
    limits = Limits(slots=2, tokens=128, bank_tokens=64, waiting=2)
    with serving(tiny, {"given": given}, options, limits) as running:
        yield running


@pytest.fixture
def slow(server, monkeypatch):
    """Let every token take a while."""
    device = server.state.service._device
    decode = device.decode

    def slowly(steps, *arguments):
        time.sleep(0.05)
        return decode(1, *arguments)

    monkeypatch.setattr(device, "decode", slowly)


def complete(server, headers=KEY, **body):
    body = {"model": "given", "prompt": "ab", "max_tokens": 4} | body
    return server.ask("POST", "/v1/completions", body, headers)


def names(server):
    return [each["id"] for each in server.ask("GET", "/v1/models", headers=KEY).json["data"]]


def test_requests_need_the_key(server):
    assert server.ask("GET", "/health").json == {"status": "ready"}
    for headers in ({}, {"Authorization": "key"}, {"Authorization": "Bearer kex"}, ADMIN):
        answer = complete(server, headers)
        assert answer.status == 401
        assert answer.json["error"]["code"] == "invalid_api_key"
        assert server.ask("GET", "/metrics", headers=headers).status == 401
    assert complete(server).status == 200
    assert server.ask("DELETE", "/v1/prompts/given", headers=KEY).status == 401


def test_large_bodies_are_rejected(server):
    assert complete(server, prompt="a" * 3000).status == 413

    def parts():
        yield b'{"model": "' + b"a" * 1500
        yield b"a" * 1500 + b'"}'

    headers = KEY | {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("POST", "/v1/completions", parts(), headers, encode_chunked=True)
    response = connection.getresponse()
    assert response.status == 413
    assert json.loads(response.read())["error"]["code"] == "request_too_large"
    connection.close()


def test_web_pages_of_other_origins_are_not_allowed(server):
    ask = {"Access-Control-Request-Method": "POST"}
    good = server.ask("OPTIONS", "/v1/completions", headers=ask | {"Origin": "http://a.b"})
    assert good.headers["access-control-allow-origin"] == "http://a.b"
    bad = server.ask("OPTIONS", "/v1/completions", headers=ask | {"Origin": "http://c.d"})
    assert "access-control-allow-origin" not in bad.headers


def test_a_request_is_logged_without_its_texts(server, capsys):
    capsys.readouterr()
    answer = complete(server, prompt="secret")
    assert complete(server, model="hidden").status == 404
    time.sleep(0.2)  # the line is written after the answer
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert lines[0]["id"] == answer.headers["x-request-id"]
    assert lines[0] | {"time": 0, "id": 0, "seconds": 0} == {
        "time": 0,
        "id": 0,
        "path": "/v1/completions",
        "model": "given",
        "status": 200,
        "prompt_tokens": 7,
        "completion_tokens": 4,
        "seconds": 0,
    }
    assert (lines[1]["status"], lines[1]["model"]) == (404, None)
    assert "secret" not in str(lines)
    assert "hidden" not in str(lines)


def test_metrics_count_requests_and_tokens(server):
    def values():
        lines = server.ask("GET", "/metrics", headers=KEY).body.decode().splitlines()
        return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))

    before = values()
    complete(server)
    server.until(lambda: values() != before)
    after = values()

    def more(name):
        return float(after[name]) - float(before.get(name, 0))

    labels = '{path="/v1/completions",prompt="given",status="200"}'
    assert more(f"softprompt_requests_total{labels}") == 1
    assert more('softprompt_generated_tokens_total{prompt="given"}') == 4
    assert more('softprompt_input_tokens_total{prompt="given"}') == 3
    assert more('softprompt_time_to_first_token_seconds_count{prompt="given"}') == 1
    assert more('softprompt_time_per_token_seconds_count{prompt="given"}') == 1
    assert after["softprompt_slots"] == "2.0"
    assert after["softprompt_requests_running"] == "0.0"
    assert float(after["softprompt_bank_tokens_used"]) >= 8


def test_a_client_that_leaves_frees_its_slot(server, slow):
    scheduler = server.state.service.scheduler
    for stream in (False, True):
        body = {"model": "given", "prompt": "ab", "max_tokens": 100, "stream": stream}
        connection = open_with_key(server, body)
        server.until(lambda: scheduler.occupied == 1)
        connection.close()
        begin = time.monotonic()
        server.until(lambda: scheduler.occupied == 0)
        assert time.monotonic() - begin < 1


def open_with_key(server, body):
    content = json.dumps(body).encode()
    import socket

    connection = socket.create_connection(("127.0.0.1", server.port))
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer key\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


def test_too_many_waiting_requests_are_rejected(server, slow):
    scheduler = server.state.service.scheduler
    body = {"model": "given", "prompt": "ab", "max_tokens": 100}
    open_ones = []
    for occupied, waiting in ((1, 0), (2, 0), (2, 1), (2, 2)):
        open_ones.append(open_with_key(server, body))
        server.until(lambda: scheduler.occupied == occupied)  # noqa: B023
        server.until(lambda: scheduler.waiting == waiting)  # noqa: B023
    answer = complete(server)
    assert (answer.status, answer.json["error"]["type"]) == (429, "rate_limit_error")
    assert int(answer.headers["retry-after"]) >= 1
    for connection in open_ones:
        connection.close()
    server.until(lambda: scheduler.occupied + scheduler.waiting == 0)


def test_a_request_that_takes_too_long_ends(server, slow, monkeypatch):
    def limit(seconds):
        options = dataclasses.replace(server.state.options, timeout=seconds)
        monkeypatch.setattr(server.state, "options", options)

    limit(0.3)
    answer = complete(server, max_tokens=100)
    assert (answer.status, answer.json["error"]["code"]) == (504, "timeout")
    limit(4)  # enough for the first token, and too little for all
    answer = complete(server, max_tokens=100, stream=True)
    assert answer.status == 200
    assert answer.events[-1]["error"]["code"] == "timeout"
    assert b"[DONE]" not in answer.body
    server.until(lambda: server.state.service.scheduler.occupied == 0)


def test_prompts_of_the_folder_come_and_go(server, root, tiny, tmp_path, capsys):
    look = server.state.folders.look
    assert names(server) == ["tiny", "given", "first"]
    new = save_prompt(tmp_path / "new", tiny, 7, "{text} is", LABELS)
    shutil.copytree(new, root / "second")
    look()
    look()
    assert "second" in names(server)
    assert server.state.service.prompts.get("second").root == "second"
    answer = server.ask("POST", "/v1/classify", {"model": "second", "input": "ab"}, KEY)
    expected = load_prompt(new, tiny).classify(["ab"])[0]
    assert answer.json["data"][0]["label"] == expected.label

    before = complete(server, model="first").json["choices"][0]["text"]
    save_prompt(root / "first", tiny, 8)
    look()
    look()
    after = complete(server, model="first").json["choices"][0]["text"]
    (offline,) = load_prompt(root / "first", tiny).generate(["ab"], max_new_tokens=4)
    assert after == offline.text != before

    array = next(
        path for path in (root / "second").rglob("*") if "arrays" in str(path) and path.is_file()
    )
    array.write_bytes(array.read_bytes() + b"x")
    capsys.readouterr()
    for _ in range(4):
        look()
    assert capsys.readouterr().err.count("damaged") == 1
    assert "second" in names(server)  # as it was

    shutil.rmtree(root / "second")
    (root / "unfinished").mkdir()
    (root / "unfinished" / "config.yaml").touch()
    shutil.copytree(new, root / "unfinished" / "prompt")
    look()
    look()
    assert names(server) == ["tiny", "given", "first"]
    (root / "unfinished" / "summary.json").write_text("{}")
    look()
    look()
    assert "unfinished" in names(server)
    shutil.rmtree(root / "unfinished")
    look()


def archive(*entries):
    """Return a tar archive of names and contents, or of other members."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
            else:
                info = tarfile.TarInfo(entry[0])
                info.size = len(entry[1])
                tar.addfile(info, io.BytesIO(entry[1]))
    return file.getvalue()


def archive_of(folder, top="./"):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return archive(*((f"{top}{p.relative_to(folder)}", p.read_bytes()) for p in files))


def put(server, name, body, headers=ADMIN):
    kind = "application/json" if isinstance(body, dict) else "application/x-tar"
    return server.ask("PUT", f"/v1/prompts/{name}", body, headers | {"Content-Type": kind})


def test_prompts_are_uploaded_and_removed(server, root, tiny, tmp_path):
    for number, top in enumerate(("./", "prompt/")):
        folder = save_prompt(tmp_path / str(number), tiny, 20 + number)
        assert put(server, "up", archive_of(folder, top)).status == 200
        (expected,) = load_prompt(folder, tiny).generate(["ab"], max_new_tokens=4)
        assert complete(server, model="up").json["choices"][0]["text"] == expected.text
        assert server.state.service.prompts.get("up").root == "up"
    used = server.state.service.bank.used
    server.state.folders.look()
    server.state.folders.look()
    assert server.state.service.bank.used == used
    assert [path.name for path in root.iterdir() if path.name.startswith(".")] == []
    assert server.ask("DELETE", "/v1/prompts/up", headers=ADMIN).status == 200
    server.state.folders.look()
    assert "up" not in names(server)
    assert server.ask("DELETE", "/v1/prompts/up", headers=ADMIN).status == 404
    assert put(server, "again", {"folder": "up"}).status == 200
    assert "again" in names(server)
    assert server.ask("DELETE", "/v1/prompts/again", headers=ADMIN).status == 200
    shutil.rmtree(root / "up")


def test_uploads_touch_nothing_else(server, root, tiny, tmp_path):
    folder = save_prompt(tmp_path / "p", tiny, 30)
    good = archive_of(folder)
    link = tarfile.TarInfo("arrays")
    link.type, link.linkname = tarfile.SYMTYPE, "/tmp"
    hole = tarfile.TarInfo("arrays")
    hole.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(10**13)}
    bad = tarfile.TarInfo("prompt.json")
    bad.pax_headers = {"GNU.sparse.map": "x", "GNU.sparse.size": "1"}
    many = [tarfile.TarInfo(str(number)) for number in range(1001)]
    wrong = [
        (archive(("prompt.json", b"{}"), hole), "which is not part of a saved"),
        (archive(bad), "not an uncompressed tar archive"),
        (archive(*many), "more than 1000 files"),
        (b"no archive", "not an uncompressed tar archive"),
        (archive(("../prompt.json", b"{}")), "which is not part of a saved"),
        (archive(("/tmp/prompt.json", b"{}")), "which is not part of a saved"),
        (archive(("prompt.json", b"{}"), link), "which is not part of a saved"),
        (archive(("prompt.json", b"{}"), ("prompt.json", b"{}")), "twice"),
        (archive(("a/prompt.json", b"{}"), ("b/prompt.json", b"{}")), "exactly one prompt.json"),
        (archive(("prompt.json", b"{}")), "SHA256SUMS: missing"),
        (good[: len(good) // 2], ""),
        (good.replace(b"virtual_tokens", b"virtual_tokenz"), "damaged"),
    ]
    before = sorted(path.name for path in root.rglob("*"))
    for body, message in wrong:
        answer = put(server, "bad", body)
        assert answer.status == 400
        assert message in answer.json["error"]["message"]
        assert str(root) not in answer.json["error"]["message"]
    for name in ("..", ".x", "a%2Fb", "a" * 101, "%00"):
        assert put(server, name, good).status in (400, 404, 405)
    for name in ("given", "tiny"):
        assert "command line" in put(server, name, good).json["error"]["message"]
    (root / "run").mkdir()
    assert "not a saved prompt" in put(server, "run", good).json["error"]["message"]
    (root / "run").rmdir()
    for path in ("..", "/etc", "a/../..", str(tmp_path), ".", "\0"):
        assert "is not below" in put(server, "bad", {"folder": path}).json["error"]["message"]
    (root / "out").symlink_to(folder)
    assert "is not below" in put(server, "bad", {"folder": "out"}).json["error"]["message"]
    server.state.folders.look(at_once=True)
    assert "out" not in names(server)
    (root / "out").unlink()
    assert sorted(path.name for path in root.rglob("*")) == before
    assert names(server) == ["tiny", "given", "first"]


def test_a_full_bank_is_named(server, root, tiny, tmp_path):
    folder = save_prompt(tmp_path / "p", tiny, 31, length=60)
    answer = put(server, "large", archive_of(folder))
    assert (answer.status, "--bank-tokens" in answer.json["error"]["message"]) == (400, True)
    assert not (root / "large").exists()


def test_not_finite_logits_fail_one_request(server, root, tiny, tmp_path):
    expected = complete(server).json["choices"][0]["text"]
    folder = save_huge_prefix(tmp_path / "p", tiny)
    assert put(server, "huge", archive_of(folder)).status == 200
    for stream in (False, True):
        answer = complete(server, model="huge", stream=stream)
        assert (answer.status, answer.json["error"]["code"]) == (500, "model_error")
        assert "infinite or NaN logits" in answer.json["error"]["message"]
    assert server.ask("DELETE", "/v1/prompts/huge", headers=ADMIN).status == 200
    shutil.rmtree(root / "huge")
    for _ in range(3):
        assert complete(server).json["choices"][0]["text"] == expected


def test_a_prompt_that_is_replaced_meanwhile(server, root, tiny, slow):
    """A request that waits for its slot gets the text of the prompt that it named."""
    expected = complete(server, model="first").json["choices"][0]["text"]
    scheduler = server.state.service.scheduler
    body = {"model": "given", "prompt": "ab", "max_tokens": 60}
    blocking = [open_with_key(server, body) for _ in range(2)]
    server.until(lambda: scheduler.occupied == 2)
    waiting = open_with_key(server, {"model": "first", "prompt": "ab", "max_tokens": 4})
    server.until(lambda: scheduler.waiting == 1)
    assert server.ask("DELETE", "/v1/prompts/first", headers=ADMIN).status == 200
    assert complete(server, model="first").status == 404
    for connection in blocking:
        connection.close()
    answer = b""
    while not answer.endswith(b"}"):
        answer += waiting.recv(4096)
    waiting.close()
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["text"] == expected
