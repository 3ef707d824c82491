"""Export a base model with a trained prompt, for engines that do not support soft prompts.

The result is a model directory in the format of the hub. A soft prompt becomes new tokens of the
vocabulary.
"""

import json
from pathlib import Path

from softprompt.backbones.families import FAMILIES
from softprompt.backbones.formats.storing import save_tensors
from softprompt.inference.prompt import TrainedPrompt
from softprompt.interop.extended import extend
from softprompt.interop.merged_config import merged_config
from softprompt.interop.merged_tokenizer import save_tokenizer


def export_merged(prompt: TrainedPrompt, folder: Path) -> str:
    """Write a model directory that computes the same as the prompt, without softprompt.

    Args:
      prompt: the trained prompt.
      folder: an existing folder.

    Returns:
      The form of an input, see `ExtendedModel`.

    Raises:
      UserError: if no plain model computes the same.
    """
    base = prompt.base
    model = extend(prompt, FAMILIES[base.config["model_type"]].names)
    save_tokenizer(model.tokenizer, folder)
    save_tensors(model.tensors, folder / "model.safetensors")
    config = merged_config(base, model.size, untied=model.untied)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    ends = model.ends[0] if len(model.ends) == 1 else model.ends or None
    generation = {"eos_token_id": ends, "pad_token_id": model.tokenizer.pad_token_id}
    if base.backbone.decoder_start_token is not None:
        generation["decoder_start_token_id"] = base.backbone.decoder_start_token
    if model.new:
        generation["suppress_tokens"] = model.new
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    return model.written
