"""Middleware for every HTTP request: the log and metrics, the key, and the size of the body."""

import hashlib
import hmac
import json
import logging
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from softprompt.serving.errors import ApiError, Disconnected, error_response
from softprompt.serving.state import Account, Options, State

_log = logging.getLogger(__name__)

_ANSWERS = ("/v1/completions", "/v1/chat/completions", "/v1/classify")
_OTHERS = ("/", "/health", "/metrics", "/openapi.json", "/v1/models")
_NAMED = {"/v1/models/": "/v1/models/{model}", "/v1/prompts/": "/v1/prompts/{name}"}
_UNRECORDED = ("/health", "/metrics")
_WITHOUT_KEY = ("/", "/health")

UPLOADS = "/v1/prompts/"
"""The paths that need the admin key and have their own limit for bodies."""


class Recording:
    """Gives every request an id, logs one line about it, and counts it.

    It also answers errors that nothing else handles, so every client gets a response.

    Args:
      app: handles the request.
      state: of the server.
    """

    def __init__(self, app: ASGIApp, state: State):
        self._app, self._state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        account = Account(self._state.metrics, f"req-{uuid.uuid4().hex}")
        scope["account"] = account
        running = self._state.metrics.running
        is_answer = scope["path"] in _ANSWERS
        running.inc(is_answer)
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started, account.status = True, message["status"]
                MutableHeaders(scope=message)["x-request-id"] = account.id
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Disconnected:
            account.status = 499
        except Exception as error:
            _log.exception("a request failed")
            account.status = 500
            if not started:
                await error_response(error)(scope, receive, sending)
        finally:
            running.dec(is_answer)
            self._record(scope["path"], account)

    def _record(self, path: str, account: Account) -> None:
        if path in _UNRECORDED:
            return
        path, model, status = _label(path), account.model or "", account.status or 499
        metrics = self._state.metrics
        metrics.requests.labels(path, model, status).inc()
        metrics.request_seconds.labels(path, model).observe(account.seconds)
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "id": account.id,
            "path": path,
            "model": account.model,
            "status": status,
            "prompt_tokens": account.read,
            "completion_tokens": account.generated,
            "seconds": round(account.seconds, 4),
        }
        _log.info(json.dumps(line))


class Authorization:
    """Rejects requests without the right key.

    Args:
      app: handles the others.
      options: hold the keys.
    """

    def __init__(self, app: ASGIApp, options: Options):
        self._app, self._options = app, options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] == "http" and scope["path"] not in _WITHOUT_KEY:
            is_admin = scope["path"].startswith(UPLOADS) and self._options.admin_key
            key = self._options.admin_key if is_admin else self._options.api_key
            if key is not None and not _has_key(Headers(scope=scope), key):
                name = "admin key" if is_admin else "API key"
                error = ApiError(
                    401,
                    f"the {name} is missing or wrong; send 'Authorization: Bearer KEY'",
                    "invalid_api_key",
                )
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyLimit:
    """Rejects bodies that are too large, before they are in memory.

    Args:
      app: handles the others.
      most: the largest number of bytes.
    """

    def __init__(self, app: ASGIApp, most: int):
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http" or scope["path"].startswith(UPLOADS):
            await self._app(scope, receive, send)
            return
        too_large = ApiError(
            413, f"the body is larger than {self._most} bytes", "request_too_large"
        )
        announced = Headers(scope=scope).get("content-length", "0")
        if not announced.isdecimal() or int(announced[:20]) > self._most:
            await error_response(too_large)(scope, receive, send)
            return
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._most:
                raise too_large
            return message

        await self._app(scope, limited, send)


def _has_key(headers: Headers, key: str) -> bool:
    """Whether a request has a key. The comparison takes the same time for all wrong keys."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    digests = [hashlib.sha256(each.encode()).digest() for each in (given.strip(), key)]
    return hmac.compare_digest(*digests) and scheme.lower() == "bearer"


def _label(path: str) -> str:
    """Return the path for the log and the metrics, without text from the client."""
    if path in _ANSWERS or path in _OTHERS:
        return path
    return next((label for start, label in _NAMED.items() if path.startswith(start)), "other")
