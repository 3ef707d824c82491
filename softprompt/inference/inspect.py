"""What a trained prompt's vectors look like beside the vocabulary.

Axis letters: P virtual tokens, D hidden, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from softprompt.errors import UserError
from softprompt.inference.prompt import TrainedPrompt


@dataclasses.dataclass(frozen=True)
class VirtualToken:
    """One learned vector: its Euclidean norm, and the tokens nearest to it.

    `nearest` pairs a token's text with the cosine similarity of its embedding.
    """

    norm: float
    nearest: Sequence[tuple[str, float]]


def nearest_tokens(prompt: TrainedPrompt, count: int = 5) -> list[VirtualToken]:
    """The `count` nearest vocabulary tokens of each virtual token, by cosine similarity."""
    virtual = prompt.backbone.embedding.virtual
    if virtual is None:
        raise UserError(f"method {prompt.description['method']} has no vectors to look at")
    vectors = virtual[...]  # [P, D]
    table = prompt.base.backbone.embedding.table[...].astype(jnp.float32)  # [V, D]
    norms = jnp.linalg.norm(vectors, axis=-1)
    table_norms = jnp.linalg.norm(table, axis=-1)
    scale = jnp.maximum(norms[:, None] * table_norms[None], jnp.finfo(jnp.float32).tiny)
    similarity, tokens = jax.lax.top_k(vectors @ table.T / scale, min(count, table.shape[0]))

    def text(token: int) -> str:
        return str(prompt.base.tokenizer.decode([token]))

    return [
        VirtualToken(norm, [(text(i), s) for i, s in zip(ids, near, strict=True)])
        for norm, ids, near in zip(
            norms.tolist(), tokens.tolist(), similarity.tolist(), strict=True
        )
    ]
