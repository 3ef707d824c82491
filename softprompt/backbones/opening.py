"""Openings: the embeddings that every row of a batch begins with.

Axis letters: P tokens of an opening, D hidden.
"""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Opening:
    """Embeddings that every row of a batch begins with.

    They have the same effect as the prefix that `computed` returns. Training does not compute that
    prefix. It reads the embeddings and the rows in one pass through the layers.

    Attributes:
      embeddings: `[P, D]`.
      prefix: what comes before the embeddings, or None.
      spans: `[1, 2]`, start and end of the embeddings that are not padding; None if all of them
        are not. It requires that there is no prefix.
    """

    embeddings: jax.Array
    prefix: Any = None
    spans: jax.Array | None = None

    def __repr__(self) -> str:
        before = "" if self.prefix is None else f", after {self.prefix!r}"
        return f"Opening({self.length} tokens{before})"

    @property
    def length(self) -> int:
        """Number of tokens, P."""
        return self.embeddings.shape[0]


def computed(backbone: Any, prefix: Any) -> Any:
    """Return a prefix. If it is an opening, run it through the backbone.

    Args:
      backbone: the backbone that reads the batch.
      prefix: a prefix of the backbone, an opening, or None.
    """
    if not isinstance(prefix, Opening):
        return prefix
    result = backbone.prefill(prefix.embeddings, prefix.prefix)
    return result if prefix.spans is None else dataclasses.replace(result, spans=prefix.spans)
