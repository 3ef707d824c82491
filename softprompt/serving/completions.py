"""`/v1/completions`: complete texts."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from softprompt.serving.answers import Answer, account_of, respond
from softprompt.serving.errors import ErrorResponses
from softprompt.serving.inputs import Input, Plan, completion_plan
from softprompt.serving.jobs import ScoredToken, Update
from softprompt.serving.schema import CompletionRequest
from softprompt.serving.state import State
from softprompt.serving.token_texts import TokenTexts


class CompletionStyle:
    """The format of completions. See `Style`.

    Args:
      texts: the texts of tokens.
    """

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def __init__(self, texts: TokenTexts):
        self._texts = texts

    def choice(self, plan: Plan, answer: Answer) -> dict[str, Any]:
        """Return a complete answer."""
        text = (answer.input.text if plan.echo else "") + answer.text
        tokens = [*self._given(plan, answer.input, answer.given), *answer.tokens]
        return {"text": text, "logprobs": self._logprobs(plan, tokens)}

    def piece(self, plan: Plan, before: Answer, update: Update) -> dict[str, Any]:
        """Return the part of a stream for an update."""
        text, tokens = update.text, list(update.tokens)
        if not before.has_begun:
            text = (before.input.text if plan.echo else "") + text
            tokens = [*self._given(plan, before.input, update.input), *tokens]
            return {"text": text, "logprobs": self._logprobs(plan, tokens)}
        sent = [*self._given(plan, before.input, before.given), *before.tokens]
        offset = sum(len(self._texts.text(token.id)) for token in sent)
        return {"text": text, "logprobs": self._logprobs(plan, tokens, offset)}

    def _given(self, plan: Plan, input: Input, scored: Any) -> list[ScoredToken]:
        """Return the tokens of an input if the answer includes them."""
        if not plan.echo or plan.top is None:
            return []
        return [ScoredToken(input.tokens[0]), *scored]

    def _logprobs(
        self, plan: Plan, tokens: list[ScoredToken], offset: int = 0
    ) -> dict[str, Any] | None:
        """Return the log-probabilities of tokens. The first one begins at character `offset`."""
        if plan.top is None:
            return None
        texts = [self._texts.text(token.id) for token in tokens]
        offsets = [offset]
        for text in texts:
            offsets.append(offsets[-1] + len(text))
        return {
            "tokens": texts,
            "token_logprobs": [token.score for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens] if plan.top else None,
            "text_offset": offsets[:-1],
        }

    def _top(self, token: ScoredToken) -> dict[str, float] | None:
        """Return the most likely tokens, and the token itself."""
        if token.score is None:
            return None
        top = {self._texts.text(id): score for id, score in token.top}
        return top | {self._texts.text(token.id): token.score}


def completion_routes(state: State) -> APIRouter:
    """Return the route of completions."""
    router = APIRouter()
    style = CompletionStyle(state.texts)

    @router.post("/v1/completions", responses=ErrorResponses)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Continue texts."""
        account = account_of(request)

        def plan() -> Plan:
            return completion_plan(state.service, state.prompt(body.model, account), body)

        return await respond(state, request, body, plan, style)

    return router
