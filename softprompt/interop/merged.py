"""Export a model that contains what was learned, for engines without support for prompts.

The result is a model directory in the format of the hub. A soft prompt becomes new tokens of the
vocabulary, whose embeddings are its vectors. Axis letters: V vocabulary, D hidden,
P virtual tokens.
"""

import copy
import json
from pathlib import Path

import numpy as np
from tokenizers import AddedToken

from softprompt.backbones.families import FAMILIES
from softprompt.backbones.formats.storing import save_tensors, stored_tensors
from softprompt.backbones.loading import Base
from softprompt.data.template import compile_template
from softprompt.errors import UserError
from softprompt.inference.prompt import TrainedPrompt
from softprompt.interop.card import written_input
from softprompt.interop.merged_config import merged_config
from softprompt.interop.merged_tokenizer import save_tokenizer


def export_merged(prompt: TrainedPrompt, folder: Path) -> str:
    """Write a model directory that computes the same as the prompt, without softprompt.

    Args:
      prompt: the trained prompt.
      folder: an existing folder.

    Returns:
      The form of an input: the template with all special tokens written out, to be tokenized
      with `add_special_tokens=False`.

    Raises:
      UserError: if no plain model computes the same.
    """
    method, base = prompt.method, prompt.base
    if kind := base.compute.quantize:
        raise UserError(f"a base model in {kind} cannot be merged; load it without quantize")
    backbone, vectors = method.merge_into(base.backbone, prompt.backbone)
    if prompt.task.tasks:
        raise UserError("prompts of several tasks cannot be merged into one model")
    tokenizer = copy.deepcopy(base.tokenizer)
    names = [f"<|softprompt-{i}|>" for i in range(len(vectors))]
    tensors = dict(stored_tensors(backbone, FAMILIES[base.config["model_type"]].names))
    size = base.backbone.arch.vocab_size
    # Version 4 of transformers scales the heads of T5 that are tied, and no others.
    untied = bool(names) or getattr(base.backbone.arch, "scaled_head", None) is not None
    if untied:
        _untie(tensors, base)
    if names:
        tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
        vocabulary = tokenizer.get_vocab()
        ids = [vocabulary[name] for name in names]
        size = max(size, max(ids) + 1)
        _add_tokens(tensors, base, vectors, ids, size)
    save_tokenizer(tokenizer, folder)
    save_tensors(tensors, folder / "model.safetensors")
    config = merged_config(base, size, untied=untied)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if base.backbone.decoder_start_token is not None:
        generation["decoder_start_token_id"] = base.backbone.decoder_start_token
    if names:
        generation["suppress_tokens"] = tokenizer.convert_tokens_to_ids(names)
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    task = prompt.task
    pieces = compile_template(task.template, task.demonstrations, tokenizer, virtual=bool(names))
    return written_input(pieces, tokenizer, "".join(names))


def _add_tokens(
    tensors: dict[str, np.ndarray], base: Base, vectors: np.ndarray, ids: list[int], size: int
) -> None:
    """Extend the vocabulary of untied tensors to `size` tokens, with the vectors at `ids`.

    No new token is ever generated: its row of the head equals the row of another token that the
    model does not generate, and of two equal logits the lower id is chosen.
    """
    embedding, head = _tables(base)
    table = tensors[embedding]
    new = np.zeros((size - len(table), table.shape[1]), table.dtype)
    tensors[embedding] = np.concatenate([table, new])
    tensors[embedding][ids] = vectors / base.backbone.embedding.scale
    rows = np.repeat(tensors[head][[_never_generated(base)]], len(new), axis=0)
    tensors[head] = np.concatenate([tensors[head], rows])
    tensors[head][ids] = tensors[head][_never_generated(base)]


def _untie(tensors: dict[str, np.ndarray], base: Base) -> None:
    """Store the head apart from the embeddings, with T5's factor in its values."""
    embedding, head = _tables(base)
    table = tensors[embedding if base.backbone.arch.tied_head else head]
    tensors[head] = table * table.dtype.type(base.backbone.head_scale)


def _tables(base: Base) -> tuple[str, str]:
    """Return the names of the table of embeddings and of the head."""
    names = FAMILIES[base.config["model_type"]].names
    return f"{names['embedding']}.weight", f"{names['head']}.weight"


def _never_generated(base: Base) -> int:
    """Return a token that the model does not generate: one that starts or pads texts.

    If the tokenizer has none, this is the first token of the vocabulary. Sampling may then
    choose a new token in its place, unless the engine respects `suppress_tokens`.
    """
    tokenizer, end = base.tokenizer, base.tokenizer.eos_token_id
    choices = [tokenizer.pad_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids]
    size = base.backbone.arch.vocab_size
    return next((i for i in choices if i is not None and i != end and i < size), 0)
