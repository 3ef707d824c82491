"""Scores of targets by a plain forward pass, and by a method with its task.

Axis letters: P virtual tokens, D hidden.
"""

import jax
import jax.numpy as jnp

from softprompt.data.records import Record
from softprompt.evaluation.scoring import make_prefix, score

D, P = 32, 3
VERBALIZER = {"one": " ab", "two": "xyz"}
SHOWN = [("aa:", " ab"), ("bb:", "xyz")]
VECTORS = jax.random.normal(jax.random.key(7), (P, D))


def ids(base, text):
    """Return the token ids of a text, without special tokens."""
    return base.tokenizer(text, add_special_tokens=False).input_ids


def log_probability(base, *parts):
    """Return the log-probability of the last part after the others, in one plain forward pass.

    Parts are texts, or vectors `[P, D]`.
    """
    *before, last = parts
    embeddings = [
        base.backbone.embedding(jnp.array(ids(base, part))) if isinstance(part, str) else part
        for part in before
    ]
    targets = jnp.array(ids(base, last))
    rows = jnp.concatenate([*embeddings, base.backbone.embedding(targets)])[None]
    log_probabilities = jax.nn.log_softmax(base.backbone.logits(base.backbone(rows)))[0]
    first = rows.shape[1] - len(targets) - 1
    return float(sum(log_probabilities[first + i, t] for i, t in enumerate(targets)))


def scores(base, method, task, record):
    """Return the log-probabilities of the verbalizers after a record."""
    backbone = method.adapt(base.backbone)
    example = task.example(Record(record, "here"), with_answer=False)
    ((_, found),) = score(backbone, make_prefix(method, backbone), [example], 1)
    return found[0]
