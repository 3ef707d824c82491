"""Hostile HTTP requests. Each function sends one request and reports a wrong reaction.

The server must answer with the right status, or may close the connection where the request is
broken. It must never answer with status 500.
"""

import contextlib
import http.client
import json
import random
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

Hostile = Callable[[int, random.Random], str | None]
"""Sends a request to a port. Returns a problem, or None."""

_JSON = {"Content-Type": "application/json"}
_PATHS = (
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    "a/../b",
    "C:\\x",
    "\x00",
    "%2e%2e%2f",
    "p0/",
    ".",
)
ADMIN_KEY = "admin"


def exchange(
    port: int, method: str, path: str, body: bytes | None = None, headers: Any = _JSON
) -> tuple[int, bytes]:
    """Send a request and return the status and the body of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read()


def _must_be(expected: tuple[int, ...], got: tuple[int, bytes]) -> str | None:
    status, body = got
    if status not in expected:
        return f"status {status} instead of {expected}: {body[:200]!r}"
    error = json.loads(body)["error"]
    return None if error["message"] else f"no message: {body[:200]!r}"


def _completion(**changes: Any) -> bytes:
    body = {"model": "p0", "prompt": "ab", "max_tokens": 4} | changes
    return json.dumps(body).encode()


def malformed_json(port: int, rng: random.Random) -> str | None:
    """JSON that is cut off, nested deeply, not UTF-8, or not an object."""
    whole = _completion()
    bodies = [
        whole[: rng.randrange(len(whole))],
        b"[" * 50_000,
        b'{"model": "p0", "prompt": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
        b"\xff\xfe" + whole,
        b"null",
        b'{"model": NaN, "prompt": Infinity}',
        rng.randbytes(200),
    ]
    return _must_be((400,), exchange(port, "POST", "/v1/completions", rng.choice(bodies)))


def wrong_types(port: int, rng: random.Random) -> str | None:
    """Parameters with values of the wrong type or out of range, and unknown parameters."""
    change: dict[str, Any] = rng.choice(
        [
            {"prompt": 5},
            {"prompt": None},
            {"prompt": [[-1]]},
            {"prompt": [2**40]},
            {"prompt": [1, "a"]},
            {"prompt": {"text": {"a": 1}}},
            {"prompt": {"text": None}},
            {"prompt": {"other": "a"}},
            {"max_tokens": "many"},
            {"max_tokens": 10**9},
            {"max_tokens": -1},
            {"temperature": -1},
            {"temperature": True},
            {"top_p": 7},
            {"n": 10**6},
            {"stop": [""]},
            {"stop": ["x"] * 99},
            {"logprobs": 99},
            {"seed": 2**70},
            {"stream": "yes"},
            {"model": ["p0"]},
            {"unknown": 1},
            {"tools": [{}]},
        ]
    )
    return _must_be((400,), exchange(port, "POST", "/v1/completions", _completion(**change)))


def oversized_body(port: int, rng: random.Random) -> str | None:
    """A body larger than the limit, with and without its length in the header."""
    body = _completion(prompt="a" * 2**20)
    headers = _JSON if rng.random() < 0.5 else _JSON | {"Transfer-Encoding": "chunked"}
    try:
        if headers is _JSON:
            return _must_be((413,), exchange(port, "POST", "/v1/completions", body))
        parts = iter([body[:1000], body[1000:]])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        with contextlib.closing(connection):
            connection.request("POST", "/v1/completions", parts, headers, encode_chunked=True)
            response = connection.getresponse()
            return _must_be((413,), (response.status, response.read()))
    except (BrokenPipeError, ConnectionResetError):
        return None  # closed before everything was sent


def unknown_model(port: int, rng: random.Random) -> str | None:
    """The name of no prompt."""
    body = _completion(model=rng.choice(["absent", "", "P0", "p0 ", "π", "x" * 500]))
    return _must_be((404,), exchange(port, "POST", "/v1/completions", body))


def path_as_name(port: int, rng: random.Random) -> str | None:
    """A path where a name belongs: in a request, and when a prompt is loaded or removed."""
    path = rng.choice(_PATHS)
    quoted = "".join(f"%{byte:02x}" for byte in path.encode())
    admin = _JSON | {"Authorization": f"Bearer {ADMIN_KEY}"}
    folder = json.dumps({"folder": rng.choice(["../outside", "/etc", "guest/../../outside"])})
    calls = [
        ("POST", "/v1/completions", _completion(model=path), _JSON),
        ("GET", f"/v1/models/{quoted}", None, _JSON),
        ("PUT", f"/v1/prompts/{quoted}", folder.encode(), admin),
        ("PUT", "/v1/prompts/stolen", folder.encode(), admin),
        ("DELETE", f"/v1/prompts/{quoted}", None, admin),
    ]
    return _must_be((400, 404, 405), exchange(port, *rng.choice(calls)))


def wrong_key(port: int, rng: random.Random) -> str | None:
    """Loading or removing a prompt without the right key."""
    key = rng.choice(["", "Bearer", "Bearer wrong", "Basic YWRtaW4=", "Bearer admin2"])
    headers = _JSON | {"Authorization": key}
    call = rng.choice([("DELETE", "/v1/prompts/p0"), ("PUT", "/v1/prompts/p0")])
    return _must_be((401,), exchange(port, *call, b"{}", headers))


def damaged_upload(port: int, rng: random.Random) -> str | None:
    """An upload that is no tar archive."""
    headers = {"Content-Type": "application/x-tar", "Authorization": f"Bearer {ADMIN_KEY}"}
    body = rng.randbytes(rng.randrange(5_000))
    return _must_be((400,), exchange(port, "PUT", "/v1/prompts/damaged", body, headers))


def not_http(port: int, rng: random.Random) -> str | None:
    """Bytes that are not HTTP, or endless headers."""
    endless = b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 50_000
    connection = socket.create_connection(("127.0.0.1", port), timeout=120)
    with connection, contextlib.suppress(OSError):
        connection.sendall(rng.choice([rng.randbytes(500) + b"\r\n\r\n", endless]))
        answer = connection.recv(1000)
        if answer and b" 400 " not in answer.partition(b"\r\n")[0]:
            return f"answered {answer[:100]!r}"
    return None


def _open(port: int, content: bytes, claimed: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=120)
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {claimed}\r\n\r\n".encode() + content)
    return connection


def slow_writer(port: int, rng: random.Random) -> str | None:
    """A body that arrives slowly and stays incomplete."""
    body = _completion()
    with _open(port, body[:10], len(body)) as connection:
        for byte in body[10:20]:
            connection.sendall(bytes([byte]))
            time.sleep(rng.random() / 20)
    return None


def slow_reader(port: int, rng: random.Random) -> str | None:
    """A client that reads a few bytes of a stream and then stops."""
    body = _completion(stream=True, max_tokens=60)
    with _open(port, body, len(body)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        for _ in range(10):
            connection.recv(1)
            time.sleep(rng.random() / 20)
    return None


def disconnect(port: int, rng: random.Random) -> str | None:
    """A client that hangs up: at once, or later; with FIN, or with RST."""
    body = _completion(stream=rng.random() < 0.5, max_tokens=60)
    connection = _open(port, body, len(body))
    time.sleep(rng.choice([0, 0.001, 0.01, 0.1]))
    if rng.random() < 0.5:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    return None


HOSTILE: tuple[Hostile, ...] = (
    malformed_json,
    wrong_types,
    oversized_body,
    unknown_model,
    path_as_name,
    wrong_key,
    damaged_upload,
    not_http,
    slow_writer,
    slow_reader,
    disconnect,
)
