"""The form of an input as text: with all special tokens and virtual tokens written out."""

from collections.abc import Iterable
from string import Formatter

from transformers import PreTrainedTokenizerFast

from softprompt.data.chat import require_chat_template
from softprompt.data.task import Task
from softprompt.data.template import Piece, compile_template
from softprompt.experiment.schema import TemplateSettings
from softprompt.experiment.templates import filled_in, template_fields

# The escapes of a Jinja string. llama.cpp does not support numeric escapes.
_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"})


def written_input(
    pieces: Iterable[Piece], tokenizer: PreTrainedTokenizerFast, virtual: str = ""
) -> str:
    """Return the pieces of an input as one template, with special tokens written out.

    Args:
      pieces: as returned by `compile_template`.
      tokenizer: gives the texts of special tokens.
      virtual: the text of the virtual tokens.
    """

    def text(piece: Piece) -> str:
        if isinstance(piece, str):
            return piece
        special = virtual if piece is None else "".join(tokenizer.convert_ids_to_tokens(piece))
        return special.replace("{", "{{").replace("}", "}}")

    return "".join(map(text, pieces))


def rest_of_input(task: Task) -> list[Piece]:
    """Return the pieces of an input that follow the opening, for a single message or record."""
    if not task.template.messages:
        return list(task.pieces)
    return compile_template(task.template, (), task.base.tokenizer, virtual=False)


def example_of(template: str) -> dict[str, str]:
    """Return made-up values for the fields of a template, so that exports contain no user data."""
    return {name: f"An example of {name}." for name in template_fields(template)}


def example_input(written: str) -> str:
    """Return a written input with made-up values in its fields."""
    return filled_in(written, example_of(written))


def written_parts(written: str) -> list[str | None]:
    """Return the texts of a written input, with None for each field."""
    parts: list[str | None] = []
    text = ""
    for literal, field, _, _ in Formatter().parse(written):
        text += literal
        if field is not None:
            parts += [text, None] if text else [None]
            text = ""
    return [*parts, text] if text else parts


def chat_template(
    template: TemplateSettings, written: str, tokenizer: PreTrainedTokenizerFast, virtual: str
) -> str | None:
    """Return a chat template that writes the inputs of a prompt, virtual tokens included.

    For a prompt trained on conversations, this is the virtual tokens and then the base model's chat
    template. For other prompts, the last message fills the only field.

    Args:
      template: the experiment's template.
      written: as returned by `written_input`.
      tokenizer: the base model's.
      virtual: the text of the virtual tokens.

    Returns:
      The template in Jinja's syntax; None if the input has several fields.
    """
    if template.messages:
        return virtual + require_chat_template(tokenizer)
    if len(template_fields(written)) != 1:
        return None
    texts = [
        'messages[-1]["content"]' if part is None else f'"{part.translate(_ESCAPES)}"'
        for part in written_parts(written)
    ]
    return "".join(f"{{{{ {text} }}}}" for text in texts)
