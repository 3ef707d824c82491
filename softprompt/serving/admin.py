"""`/v1/prompts`: load and remove prompts over HTTP."""

import asyncio
import tempfile
from typing import IO, Any

import pydantic
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from softprompt.serving.errors import ApiError, ErrorResponses
from softprompt.serving.schema import FolderRequest
from softprompt.serving.state import State
from softprompt.serving.watch import Folders

_LARGEST_UPLOAD = 2**30
_LARGEST_REQUEST = 2**16

_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/x-tar": {"schema": {"type": "string", "format": "binary"}},
            "application/json": {"schema": FolderRequest.model_json_schema()},
        },
    }
}


def admin_routes(state: State) -> APIRouter:
    """Return the routes that load and remove prompts."""
    router = APIRouter()

    @router.put("/v1/prompts/{name}", responses=ErrorResponses, openapi_extra=_BODY)
    async def load(name: str, request: Request) -> Response:
        """Load a prompt: a tar archive of its files, or a folder of the server."""
        state.require_ready()
        folders = state.folders
        if folders is None:
            raise ApiError(400, "prompts cannot be loaded: the server runs without --prompts-dir")
        try:
            if request.headers.get("content-type", "").partition(";")[0] == "application/json":
                body = await _body(request)
                await asyncio.to_thread(folders.open, name, body.folder)
            else:
                await _upload(folders, name, request)
        except OSError as error:  # without the path, which is the server's
            raise ApiError(500, f"--prompts-dir: {error.strerror}", "storage_error") from None
        return JSONResponse({"id": name, "object": "model", "loaded": True})

    @router.delete("/v1/prompts/{name}", responses=ErrorResponses)
    async def remove(name: str) -> Response:
        """Remove a prompt. Its files stay."""
        state.require_ready()
        if not await asyncio.to_thread(state.service.prompts.remove, name):
            raise ApiError(404, f"{name!r} is not the name of a prompt", "model_not_found")
        return JSONResponse({"id": name, "object": "model", "deleted": True})

    return router


async def _body(request: Request) -> FolderRequest:
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > _LARGEST_REQUEST:
            raise ApiError(413, "the body is too large", "request_too_large")
    try:
        return FolderRequest.model_validate_json(bytes(content))
    except pydantic.ValidationError as errors:
        raise ApiError(400, f"folder: {errors.errors()[0]['msg']}", param="folder") from None


async def _upload(folders: Folders, name: str, request: Request) -> None:
    """Store the body in a temporary file in the folder of the prompts, and load it."""
    with tempfile.TemporaryFile(dir=folders.root) as file:
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > _LARGEST_UPLOAD:
                raise ApiError(413, "the archive is larger than 1 GiB", "request_too_large")
            await asyncio.to_thread(_write, file, part)
        file.seek(0)
        await asyncio.to_thread(folders.upload, name, file)


def _write(file: IO[bytes], part: bytes) -> None:
    file.write(part)
