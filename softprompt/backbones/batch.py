"""Batches of rows that a backbone reads, with the targets that it predicts.

Axis letters: G packs, N tokens of a pack, R rows of a pack, B = G·R rows, T tokens of a row,
M targets of a pack, D hidden, k most likely tokens.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from softprompt.backbones.head import from_logits, log_probabilities
from softprompt.backbones.packing import Packing

Array = Any  # a NumPy array on the host, a JAX array in a compiled function, or None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows packed end to end, each with an input and its candidates.

    In a causal model, a row holds the input followed by all of its candidates. The tokens of a
    candidate attend to the input and to each other, but not to other candidates (see
    `attention.same_sequence`), so one forward pass scores all candidates. The last token of a
    candidate is predicted but never read: it is in `targets` and not in `tokens`.

    In an encoder-decoder, `tokens` holds only the input, and the decoder reads the targets.

    A batch has one pack for each pass and device. Both its tokens and its targets are packed: the
    rows follow each other without gaps.

    Attributes:
      tokens: `[G, N]` ids.
      lengths: `[G, R]`, the number of tokens in each row.
      targets: `[G, M]` ids.
      target_lengths: `[G, R]`, the number of targets in each row.
      target_candidates: `[G, M]`, the candidate each target belongs to, -1 for padding.
      target_indices: `[G, M]`, the index in the pack of the token from which each target is
        predicted; None for an encoder-decoder.
      positions: `[G, N]`, positions in the row. The positions of every candidate continue those
        of the input. None if no row holds two candidates of more than one token: its tokens are
        then one sequence, and the causal mask is enough.
      segments: `[G, N]`: 0 for the input, 1, 2, … for the candidates, -1 for padding. None if
        `positions` is.
      row_length: T, at least the length of the longest row.
      row_targets: at least the number of targets of every row.
      weights: `[G, R]`, how much each row counts in training; None if all count the same.
      teacher: the same examples as a teacher reads them, in a batch with other tokens and the same
        targets. None if there is no teacher or it reads these rows.
      top_tokens: `[G, M, k]`, the stored most likely tokens of a teacher; see `TopTokens`. None
        without a teacher, or if the teacher reads rows.
      top_log_probabilities: `[G, M, k + 1]`, of these tokens and of all others together. None if
        `top_tokens` is None.
    """

    tokens: Array
    lengths: Array
    targets: Array
    target_lengths: Array
    target_candidates: Array
    target_indices: Array
    positions: Array
    segments: Array
    row_length: int = dataclasses.field(metadata={"static": True})
    row_targets: int = dataclasses.field(metadata={"static": True})
    weights: Array = None
    teacher: "Batch | None" = None
    top_tokens: Array = None
    top_log_probabilities: Array = None

    STATIC: ClassVar = ("row_length", "row_targets")

    def __repr__(self) -> str:
        rows, tokens, targets = self.lengths.size, self.tokens.size, self.targets.size
        return f"Batch({rows} rows, {tokens} tokens, {targets} targets)"

    @property
    def padding(self) -> float:
        """The fraction of `tokens` that is padding."""
        return 1 - float(self.lengths.sum()) / self.tokens.size

    @property
    def rows(self) -> Packing:
        """Where the tokens of each row are."""
        return Packing.of(self.lengths, self.tokens.shape[1], self.row_length)

    @property
    def target_rows(self) -> Packing:
        """Where the targets of each row are."""
        return Packing.of(self.target_lengths, self.targets.shape[1], self.row_targets)


def target_log_probabilities(backbone, prefix, batch: Batch) -> jax.Array:
    """Return the log-probability of each target token given the tokens before it.

    Args:
      backbone: a `Backbone`.
      prefix: a prefix of the backbone, or None.
      batch: rows with M target positions in each pack.

    Returns:
      `[G, M]` float32, with arbitrary values at padding.
    """
    hidden = backbone.target_states(batch, prefix)  # [G, M, D]
    return log_probabilities(backbone.output_head, hidden, batch.targets, most_targets(batch))


def values_from_logits(
    function: Callable[..., tuple[jax.Array, Any]],
    backbone,
    prefix,
    batch: Batch,
    *arrays: jax.Array,
    shared: Any = None,
) -> tuple[jax.Array, Any]:
    """Return what a function computes from the logits of targets, a chunk of them at a time.

    Args:
      function, arrays, shared: see `head.from_logits`. The arrays are `[G, M, ...]`.
      backbone: a `Backbone`.
      prefix: a prefix of the backbone, or None.
      batch: rows with M target positions in each pack.

    Returns:
      The values `[G, M]` and a pytree of arrays `[G, M, ...]`, all arbitrary at padding.
    """
    hidden, count = backbone.target_states(batch, prefix), most_targets(batch)
    return from_logits(function, backbone.output_head, hidden, count, *arrays, shared=shared)


def most_targets(batch: Batch) -> jax.Array:
    """Return the largest number of targets of a pack, a scalar."""
    return jnp.max(jnp.sum(batch.target_lengths, axis=1))


def for_each_target(batch: Batch, values: jax.Array) -> jax.Array:
    """Copy values of rows `[G, R]` to their targets `[G, M]`. Padding becomes zero."""
    rows = jnp.broadcast_to(values.reshape(-1, 1), (values.size, batch.row_targets))
    return batch.target_rows.from_rows(rows)
