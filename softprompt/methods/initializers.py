"""Initial vectors of a soft prompt.

Axis letters: P virtual tokens, D hidden, V vocabulary.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.backbones.loading import Base
from softprompt.errors import UserError
from softprompt.experiment.method_settings import (
    InitializationSettings,
    PrefixSettings,
    PromptSettings,
)
from softprompt.experiment.schema import Experiment

INITIALIZATION_SETTINGS = set(InitializationSettings.model_fields)
"""The settings that decide the initial vectors."""


def initial_vectors(
    experiment: Experiment,
    settings: PromptSettings | PrefixSettings,
    base: Base,
    given: Sequence[jax.Array] = (),
) -> jax.Array:
    """Return the vectors that training starts from.

    Args:
      experiment: gives the seed, and the verbalizer for `init: labels`.
      settings: its section `prompt` or `prefix`, which says how many vectors and which `init`.
      base: the base model.
      given: for `init: prompts`, the vectors `[P, D]` of each prompt in `init_prompts`; for
        `init: teacher`, the embeddings `[S, D]` of the S tokens that the teacher reads first.

    Returns:
      `[P, D]`, float32.

    Raises:
      UserError: if the settings do not fit the base model or the given vectors.
    """
    length, random = settings.length, np.random.default_rng(experiment.seed)
    if settings.init == "vocabulary":
        vectors = sampled_vocabulary(base, length, random, settings.init_top)
    elif settings.init == "random":
        vectors = random_vectors(base, length, random, settings.init_scale)
    elif settings.init == "text":
        assert settings.init_text is not None
        vectors = text_vectors(base, length, settings.init_text)
    elif settings.init == "labels":
        texts = list((experiment.verbalizer or {}).values())
        vectors = label_vectors(base, length, texts, random, settings.init_top)
    elif settings.init == "teacher":
        vectors = first_vectors(given, length)
    else:
        vectors = mean_vectors(given, length)
    return vectors.astype(jnp.float32)


def sampled_vocabulary(
    base: Base, length: int, random: np.random.Generator, top: int = 5000
) -> jax.Array:
    """Return embeddings `[P, D]` of tokens drawn from the `top` lowest ids that are not special.

    In most vocabularies, low ids belong to frequent tokens. No token is drawn twice, unless
    there are fewer than `length`. (Lester et al. 2021, section 3.2)
    """
    special = set(base.tokenizer.all_special_ids) | set(base.tokenizer.added_tokens_decoder)
    size = base.backbone.arch.vocab_size
    ordinary = [i for i in range(min(size, len(base.tokenizer))) if i not in special]
    frequent = ordinary[:top]
    tokens = random.choice(frequent, length, replace=length > len(frequent))
    return base.backbone.embedding(jnp.asarray(tokens))


def random_vectors(
    base: Base, length: int, random: np.random.Generator, scale: float = 1.0
) -> jax.Array:
    """Return normal vectors `[P, D]` with the mean of the embedding table per dimension.

    Their standard deviation is `scale` times the table's, also per dimension.
    """
    embedding = base.backbone.embedding
    # Not by looking up all ids: on a mesh, every device would then hold the whole table.
    table = (embedding.table[...] * embedding.scale).astype(jnp.float32)
    drawn = jnp.asarray(random.standard_normal((length, table.shape[1])), jnp.float32)
    mean, spread = table.mean(axis=0, keepdims=True), table.std(axis=0, keepdims=True)
    return mean + scale * spread * drawn


def text_vectors(base: Base, length: int | None, text: str) -> jax.Array:
    """Return the embeddings `[P, D]` of a text, tokenized without special tokens.

    They are repeated or truncated to `length`; None keeps them all.
    """
    tokens = _tokens(base, text)
    return base.backbone.embedding(tokens if length is None else jnp.resize(tokens, (length,)))


def label_vectors(
    base: Base, length: int, texts: Sequence[str], random: np.random.Generator, top: int = 5000
) -> jax.Array:
    """Return one vector per text of the verbalizer, then vectors of `sampled_vocabulary`.

    The vector of a text is the mean embedding of its tokens. If there are more texts than
    vectors, the last texts have none. (Lester et al. 2021, section 3.2)
    """
    labels = [base.backbone.embedding(_tokens(base, t)).mean(axis=0) for t in texts[:length]]
    rest = sampled_vocabulary(base, length - len(labels), random, top)
    return jnp.concatenate([jnp.stack(labels), rest])


def first_vectors(given: Sequence[jax.Array], length: int) -> jax.Array:
    """Return the embeddings `[P, D]` of the first tokens that a teacher reads.

    Prefix tuning then starts from the keys and values that the base model computes for these
    tokens, as in Cartridges (Eyuboglu et al. 2025, arXiv:2506.06266).

    Raises:
      UserError: if the teacher reads fewer than `length` tokens before every row.
    """
    (embeddings,) = given
    if len(embeddings) < length:
        raise UserError(
            f"init: teacher: the length is {length}, but the teacher reads only {len(embeddings)} "
            "tokens before every row; set a smaller length"
        )
    return embeddings[:length]


def mean_vectors(trained: Sequence[jax.Array], length: int) -> jax.Array:
    """Return the mean of trained prompts `[P, D]`.

    With one of them this is prompt transfer (Vu et al. 2022, arXiv:2110.07904).

    Raises:
      UserError: if one of them does not have `length` vectors.
    """
    for vectors in trained:
        if len(vectors) != length:
            raise UserError(
                f"init_prompts: a prompt has {len(vectors)} virtual tokens, but length is {length}"
            )
    return jnp.mean(jnp.stack(trained), axis=0)


def _tokens(base: Base, text: str) -> jax.Array:
    tokens = base.tokenizer(text, add_special_tokens=False).input_ids
    if not tokens:
        raise UserError(f"init: the text {text!r} has no tokens")
    base.require_embeddings(tokens, "init")
    return jnp.asarray(tokens)
