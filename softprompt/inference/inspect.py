"""Find the vocabulary tokens that are closest to the virtual tokens of a prompt.

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
    """One learned vector.

    Attributes:
      norm: its Euclidean norm.
      nearest: the vocabulary tokens with the most similar embeddings: text and cosine
        similarity of each.
    """

    norm: float
    nearest: Sequence[tuple[str, float]]


def nearest_tokens(prompt: TrainedPrompt, count: int = 5) -> list[VirtualToken]:
    """Find the vocabulary tokens nearest to each virtual token.

    Args:
      prompt: a trained soft prompt.
      count: the number of tokens to return for each virtual token.

    Raises:
      UserError: if the method has no virtual tokens in the embedding space.
    """
    virtual = prompt.backbone.embedding.virtual
    if virtual is None:
        raise UserError(f"method {prompt.description['method']} has no vectors to inspect")
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
