"""`/v1/classify`: predict the labels of inputs."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from softprompt.serving.answers import account_of, until_disconnected
from softprompt.serving.errors import ApiError, ErrorResponses, api_error, failed
from softprompt.serving.inputs import classified_examples
from softprompt.serving.scheduler import Removed
from softprompt.serving.schema import ClassifyRequest
from softprompt.serving.state import Account, State


def classify_routes(state: State) -> APIRouter:
    """Return the route of labels."""
    router = APIRouter()

    @router.post("/v1/classify", responses=ErrorResponses)
    async def classify(body: ClassifyRequest, request: Request) -> Response:
        """Predict the label of each input."""
        account = account_of(request)

        async def work() -> dict[str, Any]:
            try:
                return await _classified(state, body, account)
            except Removed:  # the prompt was replaced
                return await _classified(state, body, account)

        return JSONResponse(await until_disconnected(request.receive, work()))

    return router


async def _classified(state: State, body: ClassifyRequest, account: Account) -> dict[str, Any]:
    prompt = state.prompt(body.model, account)
    examples = await asyncio.to_thread(classified_examples, prompt, body.input)
    before = prompt.reading("own").prefix.length
    scored = await asyncio.to_thread(state.service.score, prompt, examples)
    read = sum(len(example.input) for example in examples)
    account.began(read)
    try:
        async with asyncio.timeout(state.options.timeout - account.seconds):
            await asyncio.gather(*map(asyncio.wrap_future, scored))
    except TimeoutError as error:
        raise api_error(error) from None
    except (ApiError, asyncio.CancelledError):
        raise
    except Exception as error:
        raise failed(error, state.is_draining) from None
    finally:
        for each in scored:
            each.cancel()
    predictions = state.service.predict(prompt, scored)
    return {
        "object": "list",
        "model": prompt.name,
        "data": [
            {
                "index": index,
                "label": prediction.label,
                "probabilities": prediction.probabilities,
                "truncated": example.truncated,
            }
            for index, (prediction, example) in enumerate(zip(predictions, examples, strict=True))
        ],
        "usage": {
            "prompt_tokens": read,
            "total_tokens": read,
            "prompt_tokens_details": {"virtual_tokens": before * len(examples)},
        },
    }
