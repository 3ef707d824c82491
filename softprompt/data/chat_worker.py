"""Render chat templates inside a `ConfinedProcess`.

The environment equals the one of `apply_chat_template` in transformers
(`transformers/utils/chat_template_utils.py`), which a test checks. Importing transformers
would take seconds.
"""

import datetime
import functools
import json
from typing import Any, NoReturn

import jinja2
from jinja2 import ext, nodes, sandbox


class _Generation(ext.Extension):
    """The tag `generation`, which marks the answers.

    The characters `environment.marks` are written before and after them. The environment has the
    attribute `marks` if a template has the tag.
    """

    tags = {"generation"}  # noqa: RUF012 (declared without an annotation by Jinja)

    def parse(self, parser: Any) -> nodes.Node:
        self.environment.extend(marks=("", ""))
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Any) -> str:
        begin, end = self.environment.marks  # type: ignore[attr-defined]
        return f"{begin}{caller()}{end}"


class _Dict:
    """The function `dict` without access to the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """A namespace without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a name may be `self`
        self, *values = args
        for name in (attributes := dict(*values, **kwargs)):
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


@functools.lru_cache(1)
def _compiled(template: str) -> jinja2.Template:
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(template)


def answer(request: dict[str, Any]) -> Any:
    """Render conversations.

    Args:
      request: `template`, `conversations`, and the other `variables` that the template sees; with
        `answers: true`, the places of the assistant turns are wanted.

    Returns:
      The text of each conversation; with `answers`, a list: the text, where each answer starts
      and stops, and whether the template itself marks them. Otherwise a turn stops where the
      next message starts.
    """
    template, answers = _compiled(request["template"]), request["answers"]
    return [
        _rendered(template, request["variables"] | {"messages": messages}, answers)
        for messages in request["conversations"]
    ]


def _rendered(template: Any, variables: dict[str, Any], answers: bool) -> Any:
    text = template.render(variables)
    text.encode()  # a template can write half of a surrogate pair
    if not answers:
        return text
    if hasattr(template.environment, "marks"):
        return [text, _marked(template, variables, text), True]
    return [text, _turns(template, variables, text), False]


def _marked(template: Any, variables: dict[str, Any], text: str) -> list[tuple[int, int]]:
    """Return where the parts of the text that the template marks start and stop."""
    unused = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in text)
    begin, end = marks = next(unused), next(unused)
    template.environment.marks = marks
    try:
        written = template.render(variables)
    finally:
        template.environment.marks = "", ""
    if written.replace(begin, "").replace(end, "") != text:
        raise jinja2.TemplateError("it changes the text that it marks with {% generation %}")
    spans, length = [], 0
    for number, part in enumerate(written.split(begin)):
        inside, *after = part.split(end)
        if len(after) != (number > 0):
            raise jinja2.TemplateError("it marks text twice with {% generation %}")
        if inside and after:
            spans.append((length, length + len(inside)))
        length += len(inside) + sum(map(len, after))
    return spans


def _turns(template: Any, variables: dict[str, Any], text: str) -> list[tuple[int, int]]:
    """Return where the assistant turns start and stop, found by rendering parts of the chat."""
    spans = []
    messages = variables["messages"]
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            asked = variables | {"messages": messages[:number], "add_generation_prompt": True}
            answered = variables | {"messages": messages[: number + 1]}
            before, whole = template.render(asked), template.render(answered)
            if not whole.startswith(before):
                raise jinja2.TemplateError(
                    f"it does not write message {number + 1} right after the generation prompt, "
                    "so that its answer cannot be separated exactly"
                )
            if not text.startswith(whole):
                raise jinja2.TemplateError(
                    f"it changes the text up to message {number + 1} when other messages follow, "
                    "so that the answers cannot be separated exactly"
                )
            spans.append((len(before), len(whole)))
    return spans
