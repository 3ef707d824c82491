"""Exports: a folder in another program's form, and the way to the hub."""

from pathlib import Path

import huggingface_hub

from softprompt.errors import UserError
from softprompt.inference.prompt import TrainedPrompt
from softprompt.interop.card import adapter_card, merged_card
from softprompt.interop.merged import export_merged
from softprompt.interop.peft_export import export_adapter


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
            card = merged_card(prompt, export_merged(prompt, folder))
        else:
            export_adapter(prompt, folder, as_prefix=format == "peft-prefix")
            card = adapter_card(prompt)
        (folder / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
    except UserError:
        if not any(folder.iterdir()):
            folder.rmdir()
        raise


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
    except Exception as error:  # the hub's client raises errors of unrelated kinds
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{repository}: cannot be uploaded ({reason})") from error
    return str(done.commit_url)
