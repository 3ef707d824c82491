"""Forgetting: how much worse a model predicts plain text after training.

Axis letters: N texts.
"""

from collections.abc import Sequence

import numpy as np
from flax import nnx

from softprompt.backbones.loading import Backbone, Base
from softprompt.data.examples import Example
from softprompt.data.records import Record
from softprompt.errors import UserError
from softprompt.evaluation.scoring import prepare_model, score
from softprompt.methods.method import Constant, Method
from softprompt.metrics.scores import Scores, weighted_mean


def forgetting(
    method: Method,
    backbone: Backbone,
    base: Base,
    texts: Sequence[str],
    batch_size: int = 8,
) -> Scores:
    """Return the mean loss on plain text with the trained part, minus the mean loss without it.

    The text of a template is left out. Virtual tokens come before each text.

    Args:
      method: the trained method.
      backbone: the backbone after training; only full fine-tuning changes it.
      base: the base model, which is causal.
      texts: N texts. Of a long one, the beginning is used.
      batch_size: the most texts in a batch.

    Returns:
      `forgetting`, in nats per token. The first token of a text is read and not predicted.

    Raises:
      UserError: if the base model has an encoder, or a text has fewer than two tokens.
    """
    if base.backbone.separate_targets:
        raise UserError("forgetting is measured with causal models, which predict plain text")
    trained = nnx.clone(method)
    opening = np.asarray(method.opening[...])
    trained.opening = Constant(opening[opening < 0])
    adapted, prefix = prepare_model(trained, backbone)
    available = base.backbone.arch.context_length - (0 if prefix is None else prefix.length)
    examples = [_example(base, text, available, number) for number, text in enumerate(texts, 1)]
    difference = np.zeros(len(examples))
    for numbers, scores in score(adapted, prefix, examples, batch_size):
        difference[numbers] -= scores[:, 0]
    for numbers, scores in score(base.backbone, None, examples, batch_size):
        difference[numbers] += scores[:, 0]
    tokens = [len(example.candidates[0]) for example in examples]
    return Scores(np.stack([difference, tokens], axis=1), weighted_mean("forgetting"))


def _example(base: Base, text: str, available: int, number: int) -> Example:
    """Return an example whose input is the first token of a text and whose target is the rest."""
    ids = base.tokenizer(text).input_ids[:available]
    if len(ids) < 2:
        raise UserError(f"text {number}: has fewer than two tokens")
    return Example(ids[:1], [ids[1:]], 0, Record({}, f"text {number}"), truncated=False)
