"""Templates: texts in which `{field}` is replaced by a field of a record.

`{prompt}` marks the place of the virtual tokens. `{record[prompt]}` is the field `prompt` of the
record. Any other name can be written in this form, too.
"""

import re
from collections.abc import Mapping
from string import Formatter
from typing import Any

PROMPT_FIELD = "{record[prompt]}"
"""A template that consists of the field `prompt`."""

_IN_RECORD = re.compile(r"record\[([^\[\]{}]*[^\[\]{}0-9][^\[\]{}]*)\]")


def template_pieces(template: str) -> list[str]:
    """Split a template at `{prompt}`; a template without it is one piece."""
    pieces: list[list[str]] = [[]]
    for literal, field, _, _ in Formatter().parse(template):
        pieces[-1].append(literal.replace("{", "{{").replace("}", "}}"))
        if field == "prompt":
            pieces.append([])
        elif field is not None:
            pieces[-1].append(f"{{{field}}}")
    return ["".join(parts) for parts in pieces]


def template_fields(template: str) -> list[str]:
    """Return the names of the fields of a template in order, each once.

    Raises:
      ValueError: if the template is malformed.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"not a valid template ({error}); write {{{{ for a brace") from error
    fields: dict[str, None] = {}
    for _, field, spec, conversion in parts:
        if field is None:
            continue
        if spec or conversion or not (field.isidentifier() or _IN_RECORD.fullmatch(field)):
            raise ValueError(f"{{{field}}} is not a field name; write {{{{ for a brace")
        if field != "prompt":
            fields[field_name(field)] = None
    return list(fields)


def field_name(written: str) -> str:
    """Return the name of a field that a template writes as `name` or as `record[name]`."""
    found = _IN_RECORD.fullmatch(written)
    return found[1] if found else written


def written_field(name: str) -> str:
    """Return a template that consists of one field."""
    plain = name.isidentifier() and name != "prompt"
    return f"{{{name}}}" if plain else f"{{record[{name}]}}"


def filled_in(template: str, values: Mapping[str, str]) -> str:
    """Replace the fields of a template by values."""
    return template.format_map({"record": values, **values})


def preferred_answer(template: Mapping[str, Any]) -> str:
    """Return the default target of `objective: preference`: the field `chosen`.

    A space comes before it if the input ends in literal text, such as `Answer:`. After a field,
    white space or a chat template, the answer of the record is used as it is.

    Args:
      template: the section as the user wrote it, without a target.
    """
    text = template.get("input")
    if not isinstance(text, str) or template.get("chat") or text.endswith("}"):
        return "{chosen}"
    return "{chosen}" if text[-1:].isspace() else " {chosen}"
