"""Errors of requests, in the format of OpenAI's API."""

import json
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from softprompt.errors import UserError
from softprompt.serving.scheduler import Busy, Removed
from softprompt.serving.schema import ErrorBody
from softprompt.serving.service import TooLong

RETRY_SECONDS = 1
"""The seconds after which a client may try again."""

ErrorResponses: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody},
    "5XX": {"model": ErrorBody},
}
"""The errors of a route in the OpenAPI document."""

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """An error that a client sees.

    Args:
      status: the HTTP status.
      message: the problem, and what to do about it.
      code: a short name for programs.
      param: the parameter that is wrong.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ):
        retry = {"Retry-After": str(RETRY_SECONDS)} if status in (429, 503) else None
        super().__init__(status, message, retry)
        self.code, self.param = code, param

    @property
    def body(self) -> dict[str, Any]:
        """The body of the response."""
        return error_body(self.status_code, self.detail, self.code, self.param)


class Disconnected(Exception):
    """The client has disconnected."""


def error_body(
    status: int, message: str, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """Return an error in OpenAI's format."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def api_error(error: BaseException) -> ApiError:
    """Return the error that the client receives for an exception."""
    match error:
        case ApiError():
            return error
        case HTTPException():
            return ApiError(error.status_code, str(error.detail))
        case TooLong():
            return ApiError(400, str(error), "context_length_exceeded")
        case Busy():
            return ApiError(429, "too many requests are waiting; try again later", "busy")
        case Removed():
            return ApiError(404, "the model was removed", "model_not_found", "model")
        case TimeoutError():
            return ApiError(504, "the request took too long", "timeout")
        case UserError():
            return ApiError(400, str(error))
        case _:
            return ApiError(500, "internal error; see the log of the server", "internal")


def failed(error: Exception, draining: bool) -> ApiError:
    """Return the error that the client receives for a job that failed while it ran."""
    if isinstance(error, Busy):
        return ApiError(503, "the server is stopping", "stopping") if draining else api_error(error)
    if isinstance(error, UserError):  # of the model, not of the request
        return ApiError(500, str(error), "model_error")
    return api_error(error)


def error_response(error: BaseException) -> Response:
    """Return the response to a request that failed."""
    if isinstance(error, Disconnected):
        return Response(status_code=499)  # as in the log of nginx; nobody receives it
    told = api_error(error)
    headers = dict(getattr(error, "headers", None) or told.headers or {})
    content = json.dumps(told.body)  # ASCII, because a message can contain half a character
    return Response(content, told.status_code, headers, "application/json")
