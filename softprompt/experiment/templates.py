"""Templates: texts in which `{field}` stands for a field of a record."""

from string import Formatter


def template_pieces(template: str) -> list[str]:
    """A template's parts in front of and behind `{prompt}`, if it has it."""
    pieces = [""]
    for literal, field, _, _ in Formatter().parse(template):
        pieces[-1] += literal.replace("{", "{{").replace("}", "}}")
        if field == "prompt":
            pieces.append("")
        elif field is not None:
            pieces[-1] += f"{{{field}}}"
    return pieces


def template_fields(template: str) -> list[str]:
    """The fields of a template but `prompt`, in order; `ValueError` if it is malformed."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"not a valid template ({error}); write {{{{ for a brace") from error
    fields: list[str] = []
    for _, field, spec, conversion in parts:
        if field is None:
            continue
        if not field.isidentifier() or spec or conversion:
            raise ValueError(f"{{{field}}} is not a field name; write {{{{ for a brace")
        if field not in (*fields, "prompt"):
            fields.append(field)
    return fields
