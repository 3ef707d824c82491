"""The model card of an export: a README.md with metadata for the Hugging Face Hub."""

import json
from collections.abc import Iterable

from transformers import PreTrainedTokenizerFast

from softprompt.data.template import Piece, compile_template
from softprompt.inference.prompt import TrainedPrompt


def adapter_card(prompt: TrainedPrompt) -> str:
    """Return the card of a `peft` adapter."""
    task, model = prompt.task, prompt.base.backbone.auto_class
    pieces = task.pieces  # what follows the opening
    if not prompt.method.adapter_holds_opening:
        pieces = compile_template(
            task.template, task.demonstrations, task.base.tokenizer, virtual=False
        )
    return f"""{_metadata(prompt, "peft")}
# {prompt.description["experiment"]}

{_about(prompt)}

```python
from peft import PeftModel
from transformers import {model}

model = {model}.from_pretrained("{prompt.base.hub_name}")
model = PeftModel.from_pretrained(model, "path/to/this/folder")
```

An input must look like this, with its fields filled in. Tokenize it without adding special tokens,
because they are written out. The model continues with the answer.

{_quoted(written_input(pieces, prompt.base.tokenizer))}
"""


def merged_card(prompt: TrainedPrompt, written: str) -> str:
    """Return the card of a merged model.

    Args:
      prompt: the exported prompt.
      written: the form of an input, as returned by `written_input`.
    """
    model = prompt.base.backbone.auto_class
    return f"""{_metadata(prompt, "transformers")}
# {prompt.description["experiment"]}

{_about(prompt)} It is part of this model, so any standard engine can run it.

Every input must look like this, with its fields filled in. Tokenize it without adding special
tokens, because they are written out:

{_quoted(written)}

```python
from transformers import AutoTokenizer, {model}

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = {model}.from_pretrained("path/to/this/folder")
text = {written!r}.format(...)
inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
output = model.generate(**inputs, do_sample=False)
```
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
        if piece is None:
            return virtual
        if isinstance(piece, str):
            return piece
        return "".join(tokenizer.convert_ids_to_tokens(piece))

    return "".join(map(text, pieces))


def _metadata(prompt: TrainedPrompt, library: str) -> str:
    """Return the metadata that the hub reads. Its values are JSON, which is valid YAML."""
    about = prompt.description
    measured = {key: value for key, value in about["validation"].items() if key != "loss"}
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
    lines = [f"{key}: {json.dumps(value)}" for key, value in metadata.items() if value]
    return "\n".join(["---", *lines, "---", ""])


def _about(prompt: TrainedPrompt) -> str:
    about = prompt.description
    measured = ", ".join(f"{key} {value:.4f}" for key, value in about["validation"].items())
    return (
        f"Trained with softprompt {about['versions']['softprompt']} ({prompt.method.label}) "
        f"on the base model `{prompt.base.hub_name}`, whose license applies. "
        f"Validation: {measured or 'not measured'}."
    )


def _quoted(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.split("\n"))
