"""Exports: a folder in another program's form, with a model card, and the way to the hub."""

import json
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError

from softprompt.errors import UserError
from softprompt.inference.prompt import TrainedPrompt
from softprompt.interop.merged import export_merged
from softprompt.interop.peft_export import export_adapter

FORMATS = ("peft", "peft-prefix", "merged")


def export(prompt: TrainedPrompt, folder: Path, format: str) -> None:
    """Write what was learned in another program's form, and a README.md beside it.

    Args:
      prompt: what was learned.
      folder: to make, or an empty one.
      format: `peft`, an adapter; `peft-prefix`, an adapter of whatever stands in front of
        every row as keys and values; `merged`, a model that needs no adapter.

    Raises:
      UserError: if there is something in the folder, or the method has no such form.
    """
    make_folder(folder)
    try:
        if format == "merged":
            card = _merged_card(prompt, export_merged(prompt, folder))
        else:
            export_adapter(prompt, folder, as_prefix=format == "peft-prefix")
            card = _adapter_card(prompt)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
    except UserError:
        if not any(folder.iterdir()):
            folder.rmdir()
        raise
    (folder / "README.md").write_text(card, encoding="utf-8")


def make_folder(folder: Path) -> None:
    """Make a folder to write to; `UserError` if there is something in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{folder}: there is something in it; choose a new folder")
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror})") from None


def push(folder: Path, repository: str) -> str:
    """Upload an exported folder to the hub, making the repository if need be.

    Returns:
      The address of what was uploaded.

    Raises:
      UserError: if the hub refuses or cannot be reached.
    """
    try:
        huggingface_hub.create_repo(repository, exist_ok=True)
        done = huggingface_hub.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload by softprompt"
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{repository}: cannot be uploaded ({reason})") from error
    return str(done.commit_url)


def _adapter_card(prompt: TrainedPrompt) -> str:
    encoder_decoder = prompt.base.backbone.is_encoder_decoder
    model = "AutoModelForSeq2SeqLM" if encoder_decoder else "AutoModelForCausalLM"
    return f"""{_metadata(prompt, "peft")}
# {prompt.description["experiment"]}

{_about(prompt)}

```python
from peft import PeftModel
from transformers import {model}

model = {model}.from_pretrained("{prompt.base.hub_name}")
model = PeftModel.from_pretrained(model, "path/to/this/folder")
```

Inputs look like this, and what follows is the answer:

{_quoted(prompt.task.template.input)}
"""


def _merged_card(prompt: TrainedPrompt, written: str) -> str:
    encoder_decoder = prompt.base.backbone.is_encoder_decoder
    model = "AutoModelForSeq2SeqLM" if encoder_decoder else "AutoModelForCausalLM"
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


def _metadata(prompt: TrainedPrompt, library: str) -> str:
    """The card's head in YAML, of which JSON is a part."""
    about = prompt.description
    measured = {key: value for key, value in about["validation"].items() if key != "loss"}
    task = {"type": "text-classification" if prompt.task.verbalizer else "text-generation"}
    metrics = [{"type": key, "value": value} for key, value in measured.items()]
    result = {
        "task": task,
        "dataset": {"name": f"{about['experiment']}, validation", "type": about["experiment"]},
        "metrics": metrics,
    }
    head = {
        "base_model": prompt.base.hub_name,
        "library_name": library,
        "tags": ["softprompt", about["method"]],
        "metrics": list(measured) or None,
        "model-index": [{"name": about["experiment"], "results": [result]}] if metrics else None,
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in head.items() if value]
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
