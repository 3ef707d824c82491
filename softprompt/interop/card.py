"""The model card of an export: README.md with the hub's metadata."""

import json
from collections.abc import Iterable

from transformers import PreTrainedTokenizerFast

from softprompt.data.template import Piece, compile_template
from softprompt.inference.prompt import TrainedPrompt


def adapter_card(prompt: TrainedPrompt) -> str:
    """The card of an adapter of `peft`."""
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

Inputs look like this, with their fields filled in, and are tokenised without adding special
tokens, which are written out. What follows is the answer.

{_quoted(written_input(pieces, prompt.base.tokenizer))}
"""


def merged_card(prompt: TrainedPrompt, written: str) -> str:
    """The card of a merged model.

    Args:
      prompt: what was learned.
      written: what an input looks like: see `written_input`.
    """
    model = prompt.base.backbone.auto_class
    return f"""{_metadata(prompt, "transformers")}
# {prompt.description["experiment"]}

{_about(prompt)} It is part of this model: nothing but a standard engine is needed.

Every input must look like this, with its fields filled in, and be tokenised without adding
special tokens, which are written out:

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
    """Pieces of an input as one template, special tokens written out.

    Args:
      pieces: see `data.task`.
      tokenizer: knows the special tokens.
      virtual: what stands for the virtual tokens.
    """

    def text(piece: Piece) -> str:
        if piece is None:
            return virtual
        if isinstance(piece, str):
            return piece
        return "".join(tokenizer.convert_ids_to_tokens(piece))

    return "".join(map(text, pieces))


def _metadata(prompt: TrainedPrompt, library: str) -> str:
    """What the hub reads: YAML, of which JSON is a part."""
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
        f"Learned by softprompt {about['versions']['softprompt']}, method `{about['method']}`, "
        f"on the base model `{prompt.base.hub_name}`, whose licence holds for it. "
        f"Validation: {measured or 'not measured'}."
    )


def _quoted(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.split("\n"))
