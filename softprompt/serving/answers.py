"""Pass answers from the scheduler's thread to HTTP while they are generated."""

import asyncio
import contextlib
import dataclasses
import json
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from softprompt.serving.errors import ApiError, Disconnected, api_error, failed
from softprompt.serving.inputs import Input, Plan
from softprompt.serving.jobs import Job, ScoredToken, Update
from softprompt.serving.scheduler import Removed
from softprompt.serving.schema import GenerationRequest
from softprompt.serving.state import Account, State

Result = TypeVar("Result")


@dataclasses.dataclass
class Answer:
    """What has been received of an answer.

    Attributes:
      input: the input that it answers.
      text: the text.
      given: the scored tokens of the input, from the second on.
      tokens: the generated tokens.
      finish: see `Update`.
      has_begun: whether there was an update.
    """

    input: Input
    text: str = ""
    given: list[ScoredToken] = dataclasses.field(default_factory=list)
    tokens: list[ScoredToken] = dataclasses.field(default_factory=list)
    finish: str | None = None
    has_begun: bool = False

    def add(self, update: Update) -> None:
        """Add an update."""
        self.text += update.text
        self.given += update.input
        self.tokens += update.tokens
        self.finish, self.has_begun = update.finish, True


class Style(Protocol):
    """The format of answers in one part of OpenAI's API.

    Attributes:
      prefix: the beginning of the ids of answers.
      whole, part: the types of a complete answer and of a part of a stream.
    """

    prefix: str
    whole: str
    part: str

    def choice(self, plan: Plan, answer: Answer) -> dict[str, Any]:
        """Return a complete answer."""
        ...

    def piece(self, plan: Plan, before: Answer, update: Update) -> dict[str, Any]:
        """Return the part of a stream for an update. `before` is the answer until then."""
        ...


class Running:
    """The answers to one request while they are generated.

    Args:
      state: of the server.
      plan: the inputs and settings of the request.
      account: records what happens.
    """

    def __init__(self, state: State, plan: Plan, account: Account):
        self._state, self.plan, self.account = state, plan, account
        self._deadline = account.begin + state.options.timeout
        self._queue: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self._jobs: list[Job] = []

    def input(self, index: int) -> Input:
        """Return the input of an answer."""
        return self.plan.inputs[index // self.plan.samples]

    @property
    def count(self) -> int:
        """The number of answers."""
        return len(self.plan.inputs) * self.plan.samples

    @property
    def usage(self) -> dict[str, Any]:
        """The numbers of tokens."""
        generated = self.account.generated
        read = sum(len(each.tokens) for each in self.plan.inputs)
        return {
            "prompt_tokens": read,
            "completion_tokens": generated,
            "total_tokens": read + generated,
            "prompt_tokens_details": {
                "cached_tokens": 0,
                "virtual_tokens": self.plan.before * len(self.plan.inputs),
            },
        }

    async def updates(self) -> AsyncGenerator[tuple[int, Update], None]:
        """Submit the jobs, and yield the updates of each with the number of its answer.

        Jobs that still run when the iteration ends are cancelled.

        Raises:
          ApiError: if a job fails, or the request takes too long.
          Busy, Removed, TooLong: see `Service.submit`.
        """
        left = self.count
        try:
            self._submit()
            while left:
                async with asyncio.timeout(self._deadline - time.monotonic()):
                    index, update = await self._queue.get()
                if update.error is not None:
                    raise failed(update.error, self._state.is_draining)
                if self.plan.only_input:
                    update = dataclasses.replace(update, text="", tokens=(), finish="length")
                self.account.received(index, update)
                left -= update.is_last
                yield index, update
        except TimeoutError as error:
            raise api_error(error) from None
        finally:
            for job in self._jobs:
                job.cancel()

    def _submit(self) -> None:
        plan = self.plan
        for index in range(self.count):
            given = self.input(index)
            self._jobs.append(
                self._state.service.submit(
                    plan.prompt,
                    plan.kind,
                    given.tokens,
                    given.settings,
                    self._deliver(index),
                    sample=index % plan.samples,
                    top=plan.top,
                    score_input=plan.echo and plan.top is not None,
                )
            )
        self.account.began(sum(len(each.tokens) for each in plan.inputs))

    def _deliver(self, index: int) -> Callable[[Update], None]:
        """Return a function that the scheduler's thread calls with the updates of an answer."""
        loop, put = asyncio.get_running_loop(), self._queue.put_nowait

        def deliver(update: Update) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(put, (index, update))

        return deliver


async def respond(
    state: State,
    request: Request,
    body: GenerationRequest,
    make_plan: Callable[[], Plan],
    style: Style,
) -> Response:
    """Answer a request.

    Args:
      state: of the server.
      request: the HTTP request.
      body: its parameters.
      make_plan: is called in a thread, and again if the prompt is replaced in the meantime.
      style: the format of the answer.

    Raises:
      ApiError: see `Running.updates`.
      Disconnected: if the client has disconnected.
    """

    async def work() -> Response:
        try:
            return await answer()
        except Removed:
            return await answer()

    async def answer() -> Response:
        running = Running(state, await asyncio.to_thread(make_plan), account_of(request))
        if not body.stream:
            return JSONResponse(await _whole(running, style))
        options = body.stream_options
        events = _events(running, style, bool(options and options.include_usage))
        return EventStream(await anext(events), events)

    return await until_disconnected(request.receive, work())


def account_of(request: Request) -> Account:
    """Return the record of a request."""
    return request.scope["account"]


def _envelope(running: Running, prefix: str, kind: str) -> dict[str, Any]:
    name = running.plan.prompt.name
    number = uuid.uuid4().hex
    return {
        "id": f"{prefix}-{number}",
        "object": kind,
        "created": int(time.time()),
        "model": name,
    }


async def _whole(running: Running, style: Style) -> dict[str, Any]:
    """Wait for all answers."""
    answers = [Answer(running.input(index)) for index in range(running.count)]
    async with contextlib.aclosing(running.updates()) as updates:
        async for index, update in updates:
            answers[index].add(update)
    choices = [
        {
            "index": index,
            **style.choice(running.plan, answer),
            "finish_reason": answer.finish,
            "truncated": answer.input.truncated,
        }
        for index, answer in enumerate(answers)
    ]
    return {
        **_envelope(running, style.prefix, style.whole),
        "choices": choices,
        "usage": running.usage,
    }


async def _events(
    running: Running, style: Style, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    """Yield the events of a stream. An error after the first one is an event too."""
    envelope = _envelope(running, style.prefix, style.part)
    more = {"usage": None} if include_usage else {}

    def event(*choices: dict[str, Any], **others: Any) -> bytes:
        return _event({**envelope, "choices": choices, **more, **others})

    answers = [Answer(running.input(index)) for index in range(running.count)]
    shows_tokens = running.plan.top is not None
    try:
        async with contextlib.aclosing(running.updates()) as updates:
            async for index, update in updates:
                answer = answers[index]
                if update.text or update.finish or not answer.has_begun or shows_tokens:
                    piece = style.piece(running.plan, answer, update)
                    part = {"index": index, **piece, "finish_reason": update.finish}
                    if update.finish is not None:
                        part["truncated"] = answer.input.truncated
                    yield event(part)
                answer.add(update)
        if include_usage:
            yield event(usage=running.usage)
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        if not any(answer.has_begun for answer in answers):
            raise
        running.account.status = error.status_code
        yield _event(error.body)


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """Server-sent events. They end when the client disconnects.

    Args:
      first: the first event.
      rest: the others; it is closed after the last one.
    """

    media_type = "text/event-stream"

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first, self._rest = first, rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        await until_disconnected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        start = {"status": self.status_code, "headers": self.raw_headers}
        async with contextlib.aclosing(self._rest) as rest:
            await send({"type": "http.response.start", **start})
            await _send_part(send, self._first)
            async for event in rest:
                await _send_part(send, event)
        await send({"type": "http.response.body", "body": b""})


async def _send_part(send: Send, content: bytes) -> None:
    await send({"type": "http.response.body", "body": content, "more_body": True})


async def until_disconnected(receive: Receive, work: Awaitable[Result]) -> Result:
    """Wait for some work. It is cancelled if the client disconnects.

    Raises:
      Disconnected: if the client has disconnected.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnection(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Disconnected
        return await task
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnection(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
