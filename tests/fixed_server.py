"""A server with the routes of the real one and fixed answers, for tests of its page."""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from softprompt.serving.page import page_router

EVIL = "<img src=x onerror=alert(1)>"
ABOUT: dict[str, dict[str, Any]] = {
    "tiny": {"fields": ["text"], "labels": [], "chat": True},
    "summarize": {"fields": ["article"], "labels": [], "chat": False},
    "sentiment": {"fields": ["review"], "labels": ["negative", "positive"], "chat": False},
    "entailment": {"fields": ["premise", "hypothesis"], "labels": [], "chat": False},
    EVIL: {"fields": ["text"], "labels": [], "chat": False},
}
ANSWERS = {"tiny": ["Deep ", "blue"], "summarize": ["A short ", "summary"]}


class FixedServer:
    """A server with fixed answers.

    Attributes:
      url: its address.
      requests: the body of each request, with its path.
      go_on: answers pause after their first half until this is set.
      open: the number of answers that are being sent.
      key: the API key, or None.
      error: the status and message of the next answers, or None.
      ending: how an answer ends: "well", with an "error", or "cut" off.
    """

    def __init__(self) -> None:
        self.app = FastAPI()
        self.app.include_router(page_router())
        self.app.middleware("http")(self._check)
        self.app.get("/v1/models")(self._models)
        self.app.post("/v1/completions")(self._generate)
        self.app.post("/v1/chat/completions")(self._generate)
        self.app.post("/v1/classify")(self._classify)
        self.go_on, self.url = threading.Event(), ""
        self.reset()

    def reset(self) -> None:
        """Forget everything that a test has set."""
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.open, self.ending = 0, "well"
        self.key: str | None = None
        self.error: tuple[int, str] | None = None
        self.go_on.set()

    async def _check(self, request: Request, call_next: Any) -> Any:
        if request.url.path != "/":
            if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
                return JSONResponse({"error": {"message": "wrong key"}}, 401)
            if self.error:
                return JSONResponse({"error": {"message": self.error[1]}}, self.error[0])
        return await call_next(request)

    async def _models(self) -> Any:
        parents = dict.fromkeys(ABOUT, "tiny") | {"tiny": None}
        return {
            "object": "list",
            "data": [
                {"id": name, "parent": parents[name], "softprompt": about}
                for name, about in ABOUT.items()
            ],
        }

    async def _generate(self, request: Request) -> StreamingResponse:
        body = json.loads(await request.body())
        self.requests.append((request.url.path, body))
        chat = "chat" in request.url.path
        return StreamingResponse(self._events(body, chat), media_type="text/event-stream")

    async def _events(self, body: dict[str, Any], chat: bool) -> AsyncIterator[str]:
        self.open += 1
        try:
            first, second = ANSWERS.get(body["model"], [EVIL, EVIL])
            yield _event(first, None, chat)
            while not self.go_on.is_set():
                await asyncio.sleep(0.01)
            if self.ending == "error":
                yield f"data: {json.dumps({'error': {'message': 'a weight is not finite'}})}\n\n"
            elif self.ending == "well":
                yield _event(second, None, chat)
                yield _event("", "length", chat)
                usage = {"prompt_tokens": 3, "completion_tokens": 7}
                yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
                yield "data: [DONE]\n\n"
        finally:
            self.open -= 1

    async def _classify(self, request: Request) -> Any:
        body = json.loads(await request.body())
        self.requests.append((request.url.path, body))
        probabilities = {"negative": 0.125, "positive": 0.875}
        return {"data": [{"label": "positive", "probabilities": probabilities, "truncated": True}]}


def _event(text: str, finish: str | None, chat: bool) -> str:
    part = {"delta": {"content": text}} if chat else {"text": text}
    return f"data: {json.dumps({'choices': [{'index': 0, **part, 'finish_reason': finish}]})}\n\n"


@contextlib.contextmanager
def serving_fixed_answers() -> Iterator[FixedServer]:
    """Run the server in a thread while the context is active."""
    fixed = FixedServer()
    listening = socket.create_server(("127.0.0.1", 0))
    fixed.url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
    server = uvicorn.Server(uvicorn.Config(fixed.app, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield fixed
    finally:
        fixed.go_on.set()
        server.should_exit = True
        thread.join()
