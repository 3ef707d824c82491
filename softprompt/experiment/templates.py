"""Templates: texts in which `{field}` is replaced by a field of a record."""

from string import Formatter


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
    """Return the fields of a template in order, each once and without `prompt`.

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
        if not field.isidentifier() or spec or conversion:
            raise ValueError(f"{{{field}}} is not a field name; write {{{{ for a brace")
        if field != "prompt":
            fields[field] = None
    return list(fields)
