"""The model card of an export: a README.md with metadata for the Hugging Face Hub.

Names, templates and label texts may hold any character. They are written so that they cannot end
the metadata, a code block or a line of the card.
"""

import json
import math
import re
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerFast

from softprompt.data.task import Task
from softprompt.data.template import Piece, compile_template
from softprompt.experiment.templates import filled_in, template_fields
from softprompt.inference.prompt import TrainedPrompt


def adapter_card(prompt: TrainedPrompt) -> str:
    """Return the card of a `peft` adapter."""
    task, model = prompt.task, prompt.base.backbone.auto_class
    pieces = task.pieces  # what follows the opening
    if task.template.messages or not prompt.method.adapter_holds_opening:
        pieces = compile_template(
            task.template, task.demonstrations, task.base.tokenizer, virtual=False
        )
    loading = f"""\
from peft import PeftModel
from transformers import {model}

model = {model}.from_pretrained({_quoted(prompt.base.hub_name)})
model = PeftModel.from_pretrained(model, "path/to/this/folder")"""
    return f"""{_metadata(prompt, "peft")}
# {_plain(prompt.description["experiment"])}

{_about(prompt)}

{_block(loading, "python")}

{_usage(prompt, written_input(pieces, prompt.base.tokenizer))}
"""


def merged_card(prompt: TrainedPrompt, written: str) -> str:
    """Return the card of a merged model.

    Args:
      prompt: the exported prompt.
      written: the form of an input, as returned by `written_input`.
    """
    model = prompt.base.backbone.auto_class
    running = f"""\
from transformers import AutoTokenizer, {model}

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = {model}.from_pretrained("path/to/this/folder")
text = {written!r}.format_map({_values_of(prompt.task.template.input)!r})
inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
output = model.generate(**inputs, do_sample=False)"""
    return f"""{_metadata(prompt, "transformers")}
# {_plain(prompt.description["experiment"])}

{_about(prompt)} It is part of this model, so any standard engine can run it.

{_block(running, "python")}

{_usage(prompt, written)}
"""


def written_input(
    pieces: Iterable[Piece], tokenizer: PreTrainedTokenizerFast, virtual: str = ""
) -> str:
    """Return the pieces of an input as one template, with special tokens written out.

    Args:
      pieces: as returned by `compile_template`.
      tokenizer: gives the texts of special tokens.
      virtual: the text that takes the place of the virtual tokens.
    """

    def text(piece: Piece) -> str:
        if isinstance(piece, str):
            return piece
        special = virtual if piece is None else "".join(tokenizer.convert_ids_to_tokens(piece))
        return special.replace("{", "{{").replace("}", "}}")

    return "".join(map(text, pieces))


def _metadata(prompt: TrainedPrompt, library: str) -> str:
    """Return the metadata that the hub reads, with the values on one line each."""
    about = prompt.description
    measured = {
        key: value
        for key, value in about["validation"].items()
        if key != "loss" and math.isfinite(value)
    }
    task = {"type": "text-classification" if prompt.task.verbalizer else "text-generation"}
    metrics = [{"type": key, "value": value} for key, value in measured.items()]
    result = {
        "task": task,
        "dataset": {"name": f"{about['experiment']}, validation", "type": about["experiment"]},
        "metrics": metrics,
    }
    metadata = {
        "base_model": prompt.base.hub_name,
        "library_name": library,
        "tags": ["softprompt", about["method"]],
        "metrics": list(measured) or None,
        "model-index": [{"name": about["experiment"], "results": [result]}] if metrics else None,
    }
    lines = [f"{key}: {_quoted(value)}" for key, value in metadata.items() if value]
    return "\n".join(["---", *lines, "---", ""])


def _about(prompt: TrainedPrompt) -> str:
    about = prompt.description
    measured = ", ".join(f"{_plain(k)} {v:.4f}" for k, v in about["validation"].items())
    return (
        f"Trained with softprompt {_plain(about['versions']['softprompt'])} "
        f"({prompt.method.label}) on the base model {_code(prompt.base.hub_name)}, whose license "
        f"applies. Validation: {measured or 'not measured'}."
    )


def _usage(prompt: TrainedPrompt, written: str) -> str:
    """Describe inputs and answers: the template, the form of an input, and a filled example."""
    template = prompt.task.template
    if template.messages:
        texts = {"A conversation, written by the base model's chat template": template.input}
    elif template.text:
        texts = {"Plain text, which the model continues": template.input}
    else:
        texts = {"Input": template.input, "Target": template.target}
    if template.system is not None:
        texts = {"System message": template.system, **texts}
    braces = " `{{` and `}}` stand for single braces." if re.search("{{|}}", written) else ""
    return "\n\n".join(
        [
            "## Template",
            *(f"{name}:\n\n{_block(text)}" for name, text in texts.items()),
            "## Input",
            *(["This is the form of a single user message."] if template.messages else []),
            "Every input must look like this, with its fields filled in. Tokenize it without "
            f"adding special tokens, because they are written out.{braces}",
            _block(written),
            "For example:",
            _block(filled_in(written, _example_of(template.input))),
            "## Answer",
            _answer(prompt.task),
        ]
    )


def _answer(task: Task) -> str:
    """Describe what the model writes after an input."""
    target = task.template.target
    if task.template.messages:
        return "The model continues with the answer and the token that ends its turn."
    if task.template.text:
        return "The model continues the text, up to its end-of-text token."
    if not task.verbalizer:
        text = "The model continues with the answer and its end-of-text token. For example:"
        return f"{text}\n\n{_block(filled_in(target, _example_of(target)))}"
    (field,) = template_fields(target)
    lines = [
        f"- {_code(label)}: {_code(_quoted(filled_in(target, {field: text})))}"
        for label, text in task.verbalizer.items()
    ]
    return "\n".join(["The model continues with the text of a label:", "", *lines])


def _example_of(template: str) -> dict[str, str]:
    """Made-up values for the fields of a template: a card does not publish the user's data."""
    return {name: f"An example of {name}." for name in template_fields(template)}


def _values_of(template: str) -> dict[str, Any]:
    """Return what `format_map` needs to fill in a template."""
    values = _example_of(template)
    return {"record": values, **values} if "{record[" in template else dict(values)


def _quoted(value: Any) -> str:
    """Return JSON on one line that is also valid YAML and, for a text, valid Python.

    Characters that are not printable are escaped, because YAML forbids some of them.
    """
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    number = ord(character)
    if 0xD800 <= number < 0xE000:
        return "\\ufffd"  # half of a character, which no file can hold
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def _plain(text: str) -> str:
    """Return a text that Markdown shows on one line as it is."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return re.sub(r"([\\`*_\[\]<>#|~&$])", r"\\\1", line)


def _code(text: str) -> str:
    """Return a text as code within a line."""
    line = "".join(c if c.isprintable() else " " for c in text)
    fence = "`" * (_longest_run(line) + 1)
    space = " " if line[:1] in ("`", " ") or line[-1:] in ("`", " ", "") else ""
    return f"{fence}{space}{line}{space}{fence}"


def _block(text: str, language: str = "") -> str:
    """Return a text as a block of code, whose fence is longer than any in the text."""
    fence = "`" * max(3, _longest_run(text) + 1)
    kept = text.encode("utf-8", errors="replace").decode("utf-8")
    return f"{fence}{language}\n{kept}\n{fence}"


def _longest_run(text: str) -> int:
    """The length of the longest run of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)
