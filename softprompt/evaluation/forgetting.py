"""Forgetting: how much worse a model predicts plain text after training.

Axis letters: N texts.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from softprompt.backbones.loading import Backbone, Base
from softprompt.data.examples import Example
from softprompt.data.records import Record
from softprompt.errors import UserError
from softprompt.evaluation.scoring import prepare_model, score
from softprompt.methods.method import Constant, Method
from softprompt.metrics.scores import Scores, weighted_mean
from softprompt.runtime.progress import Progress, silent

_SAMPLE = Path(__file__).with_name("plain_text.jsonl")


def plain_texts() -> list[str]:
    """Return the 34 texts that come with the package, of 80 to 154 tokens of SmolLM2 each.

    They are passages of fiction, articles, dialogues, instructions and code.
    `plain_text.md` names their sources and licenses.
    """
    lines = _SAMPLE.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def forgetting(
    method: Method,
    backbone: Backbone,
    base: Base,
    texts: Sequence[str] | None = None,
    batch_size: int = 8,
    label: str = "forgetting",
    progress: Progress = silent,
) -> Scores:
    """Return the mean loss on plain text with the trained part, minus the mean loss without it.

    The text of a template is left out. Virtual tokens come before each text.

    Args:
      method: the trained method.
      backbone: the backbone after training; only full fine-tuning changes it.
      base: the base model, which is causal.
      texts: N texts; by default `plain_texts()`. Long texts are cut off at their end.
      batch_size: the most texts in a batch.
      label: label of the progress bar.
      progress: shows how many texts are done, with and without the trained part.

    Returns:
      `forgetting`, in nats per token. The first token of a text is read and not predicted.

    Raises:
      UserError: if the base model has an encoder, or a text has fewer than two tokens.
    """
    require_causal(base)
    adapted, prefix = prepare_model(_without_text(method, backbone), backbone)
    available = base.backbone.arch.context_length - (0 if prefix is None else prefix.length)
    examples = [
        _example(base, text, available, number)
        for number, text in enumerate(plain_texts() if texts is None else texts, 1)
    ]
    difference = np.zeros(len(examples))
    with progress(label, 2 * len(examples), "texts") as bar:
        for sign, model, first in ((-1, adapted, prefix), (1, base.backbone, None)):
            for numbers, scores in score(model, first, examples, batch_size):
                difference[numbers] += sign * scores[:, 0]
                bar.advance(len(numbers))
    tokens = [len(example.candidates[0]) for example in examples]
    return Scores(np.stack([difference, tokens], axis=1), weighted_mean("forgetting"))


def require_causal(base: Base) -> None:
    """Require a base model whose forgetting can be measured.

    Raises:
      UserError: if the base model has an encoder.
    """
    if base.backbone.separate_targets:
        raise UserError(
            f"forgetting needs a causal base model, which predicts plain text; {base.name} is an "
            "encoder-decoder"
        )


def _without_text(method: Method, backbone: Backbone) -> Method:
    """Return the method with an opening that has only its virtual tokens."""
    trained = nnx.clone(method.folded())
    opening = np.asarray(trained.opening[...])
    virtual = opening[opening < 0]
    if not virtual.size:  # there are none, or a template places them inside the rows
        table = trained.adapt(backbone).embedding.virtual
        virtual = ~np.arange(0 if table is None else len(table[...]))
    trained.opening, trained.span = Constant(jnp.asarray(virtual, jnp.int32)), None
    return trained


def _example(base: Base, text: str, available: int, number: int) -> Example:
    """Return an example whose input is the first token of a text and whose target is the rest."""
    ids = base.tokenizer(text).input_ids[:available]
    if len(ids) < 2:
        raise UserError(f"text {number}: has fewer than two tokens")
    return Example(ids[:1], [ids[1:]], 0, Record({}, f"text {number}"), truncated=False)
