"""The teacher of distillation: a frozen model, and the prefix that it reads before every row.

Axis letters: S tokens.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from softprompt.backbones.loading import Backbone, Prefix
from softprompt.methods.method import Constant

_MOST_TOKENS = 1024  # read together


class Teacher(nnx.Module):
    """A frozen model that the student learns from.

    Args:
      backbone: the model. If it is the backbone of the student, it is not stored twice.
      read_first: the prefix that the teacher reads before every row; None for none.

    Examples:
      >>> base = load_base("smollm2-135m-instruct")
      >>> text = base.tokenizer("Answer in one word.").input_ids
      >>> teacher = Teacher(base.backbone, read(base.backbone, text))
    """

    def __init__(self, backbone: Backbone, read_first: Prefix | None = None):
        self.backbone = backbone
        self.read_first: Constant | None = nnx.data(
            None if read_first is None else Constant(read_first)
        )

    @property
    def prefix(self) -> Any:
        """The prefix that the teacher reads before every row, or None."""
        return None if self.read_first is None else self.read_first.get_value()

    def __repr__(self) -> str:
        return f"Teacher({self.backbone!r})"


def read(backbone: Backbone, tokens: Sequence[int]) -> Prefix:
    """Return the prefix that has the same effect as tokens before every row.

    Args:
      backbone: the frozen backbone.
      tokens: `[S]` ids, at least one. Many are read in parts, so that attention needs little
        memory.
    """
    prefix = None
    for start in range(0, len(tokens), _MOST_TOKENS):
        part = np.array(tokens[start : start + _MOST_TOKENS], np.int32)
        prefix = _read(backbone, part, prefix)
    assert prefix is not None
    return prefix


@jax.jit
def _read(backbone: Backbone, tokens: jax.Array, prefix: Prefix | None) -> Prefix:
    return backbone.prefill(backbone.embedding(tokens), prefix)
