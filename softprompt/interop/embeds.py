"""Export the embeddings that every input begins with, for engines that accept embeddings.

With `enable_prompt_embeds`, vLLM accepts `prompt_embeds`: this tensor, followed by the embeddings
of the rest of the input.
"""

from pathlib import Path

import numpy as np

from softprompt.backbones.formats.storing import save_tensors
from softprompt.errors import UserError
from softprompt.inference.prompt import TrainedPrompt
from softprompt.interop.written import rest_of_input, written_input
from softprompt.methods.peft_layout import peft_embedding_scale

EMBEDS_FILE = "prompt_embeds.safetensors"
"""The name of the file in an export."""


def export_embeds(prompt: TrainedPrompt, folder: Path) -> str:
    """Write `prompt_embeds`, `[T, D]` in float32: the virtual tokens and the text around them.

    Args:
      prompt: the trained prompt.
      folder: an existing folder.

    Returns:
      The form of the rest of an input, see `written_input`.

    Raises:
      UserError: if the prompt does not consist of vectors alone, or they are not before the inputs.
    """
    base, task = prompt.base, prompt.task
    _, vectors = prompt.method.merge_into(base.backbone, prompt.backbone)
    if not len(vectors):
        raise UserError(f"method {prompt.method.name} learns no vectors; use --format merged")
    if base.backbone.separate_targets:
        raise UserError("vLLM does not run encoder-decoder models")
    if None in task.pieces:
        raise UserError("the virtual tokens are inside the inputs, not before them")
    ids = np.array(task.opening)
    embeds = np.array(base.backbone.embedding(np.maximum(ids, 0)), np.float32)  # [T, D]
    embeds[ids < 0] = vectors[~ids[ids < 0]]
    embeds /= np.float32(peft_embedding_scale(base))
    save_tensors({"prompt_embeds": embeds}, folder / EMBEDS_FILE)
    return written_input(rest_of_input(task), base.tokenizer)
