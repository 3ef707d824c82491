"""The inputs of requests as token ids, and the settings of their answers.

These functions tokenize and may load a prefix, so they run in threads.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from softprompt.data.examples import Example
from softprompt.errors import UserError
from softprompt.experiment.schema import GenerationSettings
from softprompt.inference.prompt import changed
from softprompt.serving.errors import ApiError
from softprompt.serving.prompts import Kind, ServedPrompt
from softprompt.serving.reading import Reading
from softprompt.serving.schema import ChatRequest, CompletionRequest, GenerationRequest
from softprompt.serving.service import Service, TooLong


@dataclasses.dataclass(frozen=True)
class Input:
    """One input of a request.

    Attributes:
      tokens: its ids.
      settings: the generation settings of its answer.
      text: the text that `echo` returns.
      truncated: whether the input was truncated.
    """

    tokens: Sequence[int]
    settings: GenerationSettings
    text: str = ""
    truncated: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a request is answered.

    Attributes:
      prompt: the prompt.
      kind: the template of the inputs.
      inputs: the inputs.
      before: the number of tokens before each input.
      samples: the number of answers per input.
      top: see `Job`.
      echo: whether the input is a part of the answer.
      only_input: whether to return the input without generating.
    """

    prompt: ServedPrompt
    kind: Kind
    inputs: Sequence[Input]
    before: int
    samples: int = 1
    top: int | None = None
    echo: bool = False
    only_input: bool = False


def completion_plan(service: Service, prompt: ServedPrompt, request: CompletionRequest) -> Plan:
    """Return the plan of a request for completions.

    Raises:
      UserError: if an input does not fit the template, or settings contradict each other.
      ApiError: if parameters contradict each other, or it asks for too many answers.
    """
    values = _several(request.prompt)
    _require_few(service, len(values) * (request.n or 1))
    is_ids = isinstance(values[0], list)
    if request.max_tokens == 0 and not request.echo:
        raise ApiError(400, "max_tokens: 0 needs echo", param="max_tokens")
    if request.raw and isinstance(values[0], dict):
        raise ApiError(400, "raw: fields need the prompt's own template", param="raw")
    is_base = prompt.name == service.name
    kind: Kind = "raw" if request.raw or is_ids or is_base else "own"
    reading = prompt.reading(kind)
    settings = _settings(prompt, reading, request)
    inputs = []
    for number, value in enumerate(values, 1):
        where = f"prompt {number}" if values[1:] else "prompt"
        if is_ids:
            service.base.require_embeddings(value, where)
            ids, cut = value, False
        else:
            example = _encoded(reading, value, where)
            ids, cut = example.input, example.truncated
            if cut and kind == "raw":
                raise TooLong(f"{where}: longer than the {service.limits.tokens} tokens that fit")
        text = str(service.base.tokenizer.decode(ids)) if request.echo else ""
        limited = _limited(service, settings, request.max_tokens, reading, ids)
        inputs.append(Input(ids, limited, text, cut))
    return Plan(
        prompt,
        kind,
        inputs,
        reading.prefix.length,
        request.n or 1,
        request.logprobs,
        bool(request.echo),
        request.max_tokens == 0,
    )


def chat_plan(service: Service, prompt: ServedPrompt, request: ChatRequest) -> Plan:
    """Return the plan of a chat request.

    Raises:
      UserError: as for `completion_plan`.
      ApiError: as for `completion_plan`.
    """
    _require_few(service, request.n or 1)
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs", param="top_logprobs")
    if request.max_tokens == 0:
        raise ApiError(400, "max_tokens must be at least 1", param="max_tokens")
    most = request.max_completion_tokens or request.max_tokens
    is_base = prompt.name == service.name
    kind: Kind = "chat" if request.raw or is_base else "own"
    reading = prompt.reading(kind)
    settings = _settings(prompt, reading, request)
    example = reading.conversation([message.turn() for message in request.messages])
    limited = _limited(service, settings, most, reading, example.input)
    inputs = [Input(example.input, limited, truncated=example.truncated)]
    top = (request.top_logprobs or 0) if request.logprobs else None
    return Plan(prompt, kind, inputs, reading.prefix.length, request.n or 1, top)


def classified_examples(prompt: ServedPrompt, given: Any) -> list[Example]:
    """Return the inputs of a request for labels.

    Raises:
      UserError: if the prompt has no labels, or an input does not fit the template.
    """
    if not prompt.task.labels:
        raise UserError(f"model {prompt.name!r} was trained on free text and has no labels")
    reading = prompt.reading("own")
    values = _several(given)
    return [
        _encoded(reading, value, f"input {number}" if values[1:] else "input")
        for number, value in enumerate(values, 1)
    ]


def _require_few(service: Service, answers: int) -> None:
    """Require that a request can be accepted, before its inputs are encoded.

    Raises:
      ApiError: if it asks for more answers than may wait.
    """
    most = service.limits.waiting
    if answers > most:
        raise ApiError(400, f"the request asks for {answers} answers, but the limit is {most}")


def _several(values: Any) -> list[Any]:
    """Return one or several inputs as a list."""
    if isinstance(values, str | dict) or isinstance(values[0], int):
        return [values]
    return values


def _encoded(reading: Reading, value: str | Mapping[str, Any], where: str) -> Example:
    """Encode a text or fields. A text is the only message for a template of conversations."""
    if reading.task.template.messages and isinstance(value, str):
        return reading.conversation([{"role": "user", "content": value}])
    return reading.example(value, where)


def _settings(
    prompt: ServedPrompt, reading: Reading, request: GenerationRequest
) -> GenerationSettings:
    """Return the settings of a prompt with the changes of a request.

    Raises:
      UserError: if settings contradict each other.
    """
    without_effect: dict[str, tuple[Any, ...]] = {"top_p": (1,), "top_k": (0, -1), "min_p": (0,)}
    changes: dict[str, Any] = {}
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop"):
        value = getattr(request, name)
        if value is not None:
            changes[name] = None if value in without_effect.get(name, ()) else value
    if request.temperature == 0:
        changes = {name: value for name, value in changes.items() if name not in without_effect}
    if request.seed is not None:
        changes["seed"] = request.seed % 2**32
    settings = prompt.generation
    if changes or settings.beams > 1 or settings.samples > 1:
        settings = changed(settings, {"beams": 1, "samples": 1} | changes)
    if (request.n or 1) > 1 and settings.temperature is None:
        raise UserError("n: several answers need a temperature, because greedy answers are equal")
    return reading.stopping(settings)


def _limited(
    service: Service,
    settings: GenerationSettings,
    asked: int | None,
    reading: Reading,
    tokens: Sequence[int],
) -> GenerationSettings:
    """Set the maximum number of new tokens. The default is limited to the tokens that fit."""
    if asked is None:
        left = service.limits.tokens - reading.prefix.length - len(tokens)
        asked = min(settings.max_new_tokens, left)
    return settings.model_copy(update={"max_new_tokens": max(asked, 1)})
