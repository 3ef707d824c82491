"""Export a trained prompt to the format of another program, and upload it to the hub."""

from pathlib import Path

import huggingface_hub

from softprompt.errors import UserError, reason_of
from softprompt.files.writing import write_errors
from softprompt.inference.prompt import TrainedPrompt
from softprompt.interop.card import adapter_card, embeds_card, gguf_card, merged_card
from softprompt.interop.embeds import export_embeds
from softprompt.interop.gguf_export import GGUFType, export_gguf
from softprompt.interop.merged import export_merged
from softprompt.interop.peft_export import export_adapter


def export(prompt: TrainedPrompt, folder: Path, format: str, dtype: GGUFType = "f16") -> None:
    """Write a trained prompt in the format of another program, with a README.md.

    Args:
      prompt: the trained prompt.
      folder: a folder that does not exist or is empty.
      format: `peft`, an adapter; `peft-prefix`, an adapter that holds everything before the
        inputs as keys and values; `merged`, a model that needs no adapter; `gguf`, that
        model in one file for llama.cpp; `embeds`, the embeddings before the inputs, for vLLM.
      dtype: how a GGUF file stores matrices.

    Raises:
      UserError: if the folder is not empty, or the method has no such format.
    """
    make_folder(folder)
    try:
        with write_errors(folder):
            if format == "merged":
                card = merged_card(prompt, export_merged(prompt, folder))
            elif format == "gguf":
                card = gguf_card(prompt, export_gguf(prompt, folder, dtype))
            elif format == "embeds":
                card = embeds_card(prompt, export_embeds(prompt, folder))
            else:
                export_adapter(prompt, folder, as_prefix=format == "peft-prefix")
                card = adapter_card(prompt)
            (folder / "README.md").write_text(card, encoding="utf-8")
    except UserError:
        if not any(folder.iterdir()):
            folder.rmdir()
        raise


def make_folder(folder: Path) -> None:
    """Create a folder; raise a `UserError` if it exists and is not empty."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{folder}: the folder is not empty; choose a new one")
    except OSError as error:
        raise UserError(f"{folder}: cannot be created ({error.strerror})") from None


def push(folder: Path, repository: str) -> str:
    """Upload an exported folder to the Hugging Face Hub.

    Args:
      folder: the folder that `export` wrote.
      repository: `owner/name`; it is created if it does not exist.

    Returns:
      The URL of the commit.

    Raises:
      UserError: if the hub cannot be reached or rejects the upload.
    """
    try:
        huggingface_hub.create_repo(repository, exist_ok=True)
        done = huggingface_hub.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload by softprompt"
        )
    except Exception as error:  # the client of the hub raises unrelated types
        raise UserError(f"{repository}: cannot be uploaded ({reason_of(error)})") from error
    return str(done.commit_url)
