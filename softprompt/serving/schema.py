"""The bodies of requests. Unknown parameters are rejected by name."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from softprompt.errors import shortened

# Parameters of OpenAI's API that do not change the answer.
_IGNORED = (
    *("metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention"),
    *("safety_identifier", "service_tier", "store", "user"),
)
# Parameters of OpenAI's API that are not supported, with the values that have no effect.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}

_Id = Annotated[int, Field(ge=0, lt=2**31)]
_Text = Annotated[str, Field(min_length=1)]
_Stop = Annotated[str, Field(min_length=1, max_length=256)]
_Fields = dict[str, Any]


def _described(message: str) -> pydantic.WrapValidator:
    """Return a validator that reports a wrong value in one line."""

    def validate(value: Any, check: Callable[[Any], Any]) -> Any:
        try:
            return check(value)
        except pydantic.ValidationError:
            raise ValueError(message) from None

    return pydantic.WrapValidator(validate)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Prompt = Annotated[
    _Text
    | _Fields
    | Annotated[list[_Text], Field(min_length=1)]
    | Annotated[list[_Fields], Field(min_length=1)]
    | Annotated[list[_Id], Field(min_length=1)]
    | Annotated[list[Annotated[list[_Id], Field(min_length=1)]], Field(min_length=1)],
    _described(
        "must be a text, the ids of tokens, an object with the fields of the prompt's template, "
        "or a list of these"
    ),
]

Inputs = Annotated[
    _Text
    | _Fields
    | Annotated[list[_Text], Field(min_length=1, max_length=4096)]
    | Annotated[list[_Fields], Field(min_length=1, max_length=4096)],
    _described("must be a text, an object with the fields of the template, or a list of these"),
]


class Request(pydantic.BaseModel):
    """A request. Unknown keys and values of the wrong type are rejected."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str = Field(description="The name of a prompt or of the base model.")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _without_foreign_keys(cls, values: Any) -> Any:
        """Drop parameters without effect. Reject unsupported ones that would change the answer."""
        if not isinstance(values, dict):
            return values
        for name, neutral in _UNSUPPORTED.items():
            value = values.get(name)
            if value is not None and not any(_same(value, each) for each in neutral):
                raise ValueError(
                    f"{name} is not supported; the request sets it to {shortened(value)}"
                )
        return {
            name: value
            for name, value in values.items()
            if name not in _IGNORED and name not in _UNSUPPORTED
        }


def _same(value: Any, neutral: Any) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


class StreamOptions(pydantic.BaseModel):
    """How an answer is streamed."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = Field(
        default=None, description="Send a last event with token counts."
    )
    include_obfuscation: bool | None = Field(default=None, description="Has no effect.")


class GenerationRequest(Request):
    """The parameters that completions and chat share."""

    max_tokens: int | None = Field(
        default=None,
        ge=0,
        lt=2**31,
        description="Maximum number of new tokens. Default: the setting of the prompt's run.",
    )
    temperature: float | None = Field(
        default=None,
        ge=0,
        description="Sampling temperature; 0 is greedy. Default: the setting of the prompt's run, "
        "which is greedy unless the experiment sets a temperature.",
    )
    top_p: float | None = Field(default=None, ge=0, le=1, description="Nucleus sampling.")
    top_k: int | None = Field(
        default=None, ge=-1, lt=2**31, description="Keep the k most probable tokens; 0 or -1: all."
    )
    min_p: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Keep tokens with at least this fraction of the highest probability.",
    )
    repetition_penalty: float | None = Field(
        default=None, gt=0, description="Values above 1 make repetition rarer."
    )
    seed: int | None = Field(
        default=None,
        ge=-(2**63),
        lt=2**63,
        description="Random seed. Default: the seed of the prompt's run, usually 0.",
    )
    stop: Annotated[
        list[_Stop] | None,
        pydantic.BeforeValidator(_listed, json_schema_input_type=_Stop | list[_Stop] | None),
    ] = Field(
        default=None,
        max_length=16,
        description="Stop texts. They replace the stop texts of the prompt's run.",
    )
    n: int | None = Field(default=None, ge=1, le=128, description="Number of answers per input.")
    stream: bool | None = Field(default=None, description="Send the answer as events.")
    stream_options: StreamOptions | None = None
    raw: bool = Field(
        default=False, description="Use the virtual tokens without the prompt's own template."
    )


class CompletionRequest(GenerationRequest):
    """The body of `/v1/completions`."""

    prompt: Prompt
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=5,
        description="Number of most likely tokens to return at each position.",
    )
    echo: bool | None = Field(default=None, description="Also return the input.")


class TextPart(pydantic.BaseModel):
    """A part of a message."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(pydantic.BaseModel):
    """A message of a conversation."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        _Text | Annotated[list[TextPart], Field(min_length=1)],
        _described("must be a text, or a list of parts with type text"),
    ]
    name: str | None = Field(default=None, description="Has no effect.")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _without_empty_keys(cls, values: Any) -> Any:
        """Drop null values, such as `refusal: null`, which clients copy from answers."""
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}

    def turn(self) -> dict[str, str]:
        """Return the message as chat templates expect it."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content}


class ChatRequest(GenerationRequest):
    """The body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(
        default=None, ge=1, lt=2**31, description="The same as max_tokens."
    )
    logprobs: bool | None = Field(default=None, description="Return log-probabilities.")
    top_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=20,
        description="Number of most likely tokens to return at each position.",
    )


class ClassifyRequest(Request):
    """The body of `/v1/classify`."""

    input: Inputs


class FolderRequest(pydantic.BaseModel):
    """The body of a request to load a prompt from a folder of the server."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    folder: str = Field(min_length=1, description="A path below --prompts-dir.")


class ErrorDetail(pydantic.BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(pydantic.BaseModel):
    """The body of an error response."""

    error: ErrorDetail
