"""The HTTP application: its routes, middleware and error handlers."""

import asyncio
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from softprompt.errors import UserError, shown
from softprompt.experiment.templates import template_fields
from softprompt.serving.admin import admin_routes
from softprompt.serving.chat import chat_routes
from softprompt.serving.classify import classify_routes
from softprompt.serving.completions import completion_routes
from softprompt.serving.errors import ApiError, ErrorResponses, error_response
from softprompt.serving.middleware import Authorization, BodyLimit, Recording
from softprompt.serving.page import page_router
from softprompt.serving.prompts import ServedPrompt
from softprompt.serving.scheduler import Busy, Removed
from softprompt.serving.state import State

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def create_app(state: State) -> FastAPI:
    """Return the application.

    Args:
      state: of the server.
    """
    options = state.options
    middleware = [
        Middleware(Recording, state),
        Middleware(Authorization, options),
        Middleware(BodyLimit, options.max_body_bytes),
    ]
    if options.cors_origins:
        allowed = Middleware(
            CORSMiddleware,
            allow_origins=options.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
        )
        middleware.insert(0, allowed)
    app = FastAPI(
        title="softprompt",
        middleware=middleware,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    for kind in (HTTPException, UserError, Busy, Removed):
        app.add_exception_handler(kind, _told)
    app.add_exception_handler(RequestValidationError, _malformed)
    _add_operations(app, state)
    _add_models(app, state)
    app.include_router(page_router())
    for routes in (completion_routes, chat_routes, classify_routes):
        app.include_router(routes(state))
    if options.admin_key is not None:
        app.include_router(admin_routes(state))
    return app


def _add_operations(app: FastAPI, state: State) -> None:
    @app.get("/health", responses={503: {"description": "Not ready."}})
    async def health() -> Response:
        """Say whether the server can answer requests."""
        status = "ready" if state.is_ready else "starting"
        if state.is_draining:
            status = "draining"
        elif state.is_ready and not state.service.scheduler.is_running:
            status = "failed"
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    @app.get("/metrics", responses=ErrorResponses)
    async def metrics() -> Response:
        """Return metrics for Prometheus."""
        content = await asyncio.to_thread(state.metrics.text)
        return Response(content, media_type=_METRICS_TYPE)


def _add_models(app: FastAPI, state: State) -> None:
    def described(prompt: ServedPrompt) -> dict[str, Any]:
        name = state.service.name
        return {
            "id": prompt.name,
            "object": "model",
            "created": prompt.created,
            "owned_by": "softprompt",
            "parent": None if prompt.name == name else name,
            "root": prompt.root,
            "softprompt": {
                "fields": template_fields(prompt.task.template.input),
                "labels": prompt.task.labels,
                "chat": prompt.name == name and bool(state.service.base.tokenizer.chat_template),
            },
        }

    @app.get("/v1/models", responses=ErrorResponses)
    async def models() -> Response:
        """List the base model and the prompts."""
        state.require_ready()
        prompts = state.service.prompts
        found = [prompt for name in prompts.names() if (prompt := prompts.get(name))]
        return JSONResponse({"object": "list", "data": [described(each) for each in found]})

    @app.get("/v1/models/{model:path}", responses=ErrorResponses)
    async def model(model: str, request: Request) -> Response:
        """Describe the base model or a prompt."""
        return JSONResponse(described(state.prompt(model, request.scope["account"])))


async def _told(request: Request, error: Exception) -> Response:
    return error_response(error)


async def _malformed(request: Request, error: Exception) -> Response:
    """Describe the errors of a body in one line."""
    assert isinstance(error, RequestValidationError)
    problems: dict[str, str] = {}
    for each in error.errors():
        name = ".".join(str(part) for part in each["loc"][1:])
        message = str(each["msg"]).removeprefix("Value error, ")
        if each["type"] == "extra_forbidden":
            message = "unknown parameter"
        problems.setdefault(shown(name), message)
    text = "; ".join(f"{name}: {what}" if name else what for name, what in problems.items())
    param = next(iter(problems), "") or None
    return error_response(ApiError(400, shown(text, 1000), "invalid_request", param))
