"""`/v1/chat/completions`: answer the last message of a conversation."""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from softprompt.serving.answers import Answer, account_of, respond
from softprompt.serving.errors import ErrorResponses
from softprompt.serving.inputs import Plan, chat_plan
from softprompt.serving.jobs import ScoredToken, Update
from softprompt.serving.schema import ChatRequest
from softprompt.serving.state import State
from softprompt.serving.token_texts import TokenTexts


class ChatStyle:
    """The format of chat answers. See `Style`.

    Args:
      texts: the texts of tokens.
    """

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, texts: TokenTexts):
        self._texts = texts

    def choice(self, plan: Plan, answer: Answer) -> dict[str, Any]:
        """Return a complete answer."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(plan, answer.tokens)}

    def piece(self, plan: Plan, before: Answer, update: Update) -> dict[str, Any]:
        """Return the part of a stream for an update."""
        delta = {} if before.has_begun else {"role": "assistant"}
        if update.text or delta:
            delta["content"] = update.text
        return {"delta": delta, "logprobs": self._logprobs(plan, update.tokens)}

    def _logprobs(self, plan: Plan, tokens: Sequence[ScoredToken]) -> dict[str, Any] | None:
        if plan.top is None:
            return None
        content = [
            self._token(token.id, token.score)
            | {"top_logprobs": [self._token(*each) for each in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, id: int, score: float | None) -> dict[str, Any]:
        content = self._texts.bytes(id)
        return {"token": self._texts.text(id), "logprob": score, "bytes": list(content)}


def chat_routes(state: State) -> APIRouter:
    """Return the route of conversations."""
    router = APIRouter()
    style = ChatStyle(state.texts)

    @router.post("/v1/chat/completions", responses=ErrorResponses)
    async def answer(body: ChatRequest, request: Request) -> Response:
        """Answer the last message of a conversation."""
        account = account_of(request)

        def plan() -> Plan:
            return chat_plan(state.service, state.prompt(body.model, account), body)

        return await respond(state, request, body, plan, style)

    return router
