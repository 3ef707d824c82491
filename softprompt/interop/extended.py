"""A plain model that computes the same as a trained prompt, in the tensors of a file format.

A soft prompt becomes new tokens in the vocabulary. Their embeddings are its vectors. Axis letters:
V vocabulary, D hidden, P virtual tokens.
"""

import copy
import dataclasses

import numpy as np
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from softprompt.backbones.formats.names import Names
from softprompt.backbones.formats.storing import stored_tensors
from softprompt.backbones.loading import Base
from softprompt.data.chat import turn_end
from softprompt.data.template import compile_template
from softprompt.errors import UserError
from softprompt.inference.prompt import TrainedPrompt
from softprompt.interop.written import chat_template, written_input


@dataclasses.dataclass(frozen=True)
class ExtendedModel:
    """A base model that contains a trained prompt.

    Attributes:
      tensors: by their names in the file format.
      tokenizer: the tokenizer with the new tokens, and a chat template that writes the inputs of
        the prompt.
      size: the number of tokens of the model.
      untied: whether the head and the embeddings became separate tables.
      new: the ids of the new tokens.
      ends: the ids of the tokens that end a text.
      written: the form of an input: the template with all special tokens written out, to be
        tokenized with `add_special_tokens=False`.
    """

    tensors: dict[str, np.ndarray]
    tokenizer: PreTrainedTokenizerFast
    size: int
    untied: bool
    new: list[int]
    ends: list[int]
    written: str


def extend(prompt: TrainedPrompt, names: Names) -> ExtendedModel:
    """Add a trained prompt to its base model.

    Args:
      prompt: the trained prompt.
      names: the tensor names of the file format.

    Raises:
      UserError: if no plain model computes the same.
    """
    method, base, task = prompt.method, prompt.base, prompt.task
    if kind := base.compute.quantize:
        raise UserError(f"a base model in {kind} cannot be merged; load it without quantize")
    backbone, vectors = method.merge_into(base.backbone, prompt.backbone)
    if task.tasks:
        raise UserError("prompts of several tasks cannot be merged into one model")
    tokenizer = copy.deepcopy(base.tokenizer)
    texts = [f"<|softprompt-{i}|>" for i in range(len(vectors))]
    tensors = dict(stored_tensors(backbone, names))
    tables = f"{names['embedding']}.weight", f"{names['head']}.weight"
    size = base.backbone.arch.vocab_size
    new: list[int] = []
    # Version 4 of transformers scales only the tied heads of T5.
    untied = bool(texts) or getattr(base.backbone.arch, "scaled_head", None) is not None
    if untied:
        _untie(tensors, tables, base)
    if texts:
        tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in texts])
        vocabulary = tokenizer.get_vocab()
        new = [vocabulary[text] for text in texts]
        size = max(size, max(new) + 1)
        _add_tokens(tensors, tables, base, vectors, new, size)
    pieces = compile_template(task.template, task.demonstrations, tokenizer, virtual=bool(texts))
    written = written_input(pieces, tokenizer, "".join(texts))
    tokenizer.chat_template = chat_template(task.template, written, tokenizer, "".join(texts))
    return ExtendedModel(tensors, tokenizer, size, untied, new, _ends(prompt), written)


def _add_tokens(
    tensors: dict[str, np.ndarray],
    tables: tuple[str, str],
    base: Base,
    vectors: np.ndarray,
    ids: list[int],
    size: int,
) -> None:
    """Extend the vocabulary of untied tensors to `size` tokens, with the vectors at `ids`.

    The model does not generate a new token: its row of the head is a copy of the row of a token
    that is never generated. If two logits are equal, the lower id wins.
    """
    embedding, head = tables
    table = tensors[embedding]
    new = np.zeros((size - len(table), table.shape[1]), table.dtype)
    tensors[embedding] = np.concatenate([table, new])
    tensors[embedding][ids] = vectors / base.backbone.embedding.scale
    rows = np.repeat(tensors[head][[_never_generated(base)]], len(new), axis=0)
    tensors[head] = np.concatenate([tensors[head], rows])
    tensors[head][ids] = tensors[head][_never_generated(base)]


def _untie(tensors: dict[str, np.ndarray], tables: tuple[str, str], base: Base) -> None:
    """Store the head as its own table, multiplied by T5's factor."""
    embedding, head = tables
    table = tensors[embedding if base.backbone.arch.tied_head else head]
    tensors[head] = table * table.dtype.type(base.backbone.head_scale)


def _never_generated(base: Base) -> int:
    """Return a token that the model does not generate: one that starts or pads texts.

    If the tokenizer has no such token, this is the first token of the vocabulary. Sampling may
    then choose a new token instead, unless the engine respects `suppress_tokens`.
    """
    tokenizer, end = base.tokenizer, base.tokenizer.eos_token_id
    choices = [tokenizer.pad_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids]
    size = base.backbone.arch.vocab_size
    return next((i for i in choices if i is not None and i != end and i < size), 0)


def _ends(prompt: TrainedPrompt) -> list[int]:
    """Return the end-of-text token, and the token that ends an answer in conversations."""
    tokenizer = prompt.base.tokenizer
    ends = [tokenizer.eos_token_id]
    if prompt.task.template.messages:
        ends.append(tokenizer.get_vocab().get(turn_end(tokenizer)))
    return [end for end in dict.fromkeys(ends) if end is not None]
