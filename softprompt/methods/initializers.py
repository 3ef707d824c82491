"""Initial vectors of a soft prompt, `[P, D]`: P virtual tokens, D hidden, V vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.backbones.loading import Base
from softprompt.config import Experiment

_FREQUENT = 5000  # tokens to draw from; ids of a vocabulary rise as frequency falls


def initial_vectors(experiment: Experiment, base: Base) -> jax.Array:
    """The vectors `[P, D]`, float32, that `experiment.prompt` asks for, drawn by its seed."""
    prompt, random = experiment.prompt, np.random.default_rng(experiment.seed)
    if prompt.init == "vocabulary":
        vectors = sampled_vocabulary(base, prompt.length, random)
    elif prompt.init == "random":
        vectors = random_vectors(base, prompt.length, random)
    elif prompt.init == "text":
        assert prompt.init_text is not None
        vectors = text_vectors(base, prompt.length, prompt.init_text)
    else:
        assert experiment.verbalizer is not None
        vectors = label_vectors(base, prompt.length, list(experiment.verbalizer.values()), random)
    return vectors.astype(jnp.float32)


def sampled_vocabulary(base: Base, length: int, random: np.random.Generator) -> jax.Array:
    """Embeddings of tokens drawn from the 5,000 of lowest id that are not special.

    No token is drawn twice unless there are fewer than `length`. (Lester et al. 2021,
    section 3.2)
    """
    special = set(base.tokenizer.all_special_ids) | set(base.tokenizer.added_tokens_decoder)
    size = base.backbone.arch.vocab_size
    ordinary = [i for i in range(min(size, len(base.tokenizer))) if i not in special]
    frequent = ordinary[:_FREQUENT]
    tokens = random.choice(frequent, length, replace=length > len(frequent))
    return base.backbone.embedding(jnp.asarray(tokens))


def random_vectors(base: Base, length: int, random: np.random.Generator) -> jax.Array:
    """Normal vectors with the mean and the spread of the embedding table, per dimension."""
    table = base.backbone.embedding(jnp.arange(base.backbone.arch.vocab_size)).astype(jnp.float32)
    drawn = jnp.asarray(random.standard_normal((length, table.shape[1])), jnp.float32)
    mean, spread = table.mean(axis=0, keepdims=True), table.std(axis=0, keepdims=True)
    return mean + spread * drawn


def text_vectors(base: Base, length: int, text: str) -> jax.Array:
    """Embeddings of a text's tokens, special ones left out, repeated or cut to `length`."""
    tokens = base.tokenizer(text, add_special_tokens=False).input_ids
    return base.backbone.embedding(jnp.resize(jnp.asarray(tokens), (length,)))


def label_vectors(
    base: Base, length: int, texts: list[str], random: np.random.Generator
) -> jax.Array:
    """One vector for each verbalizer text, the mean over its tokens; then sampled vocabulary.

    With fewer vectors than texts, the first texts have them. (Lester et al. 2021,
    section 3.2)
    """
    labels = [
        base.backbone.embedding(jnp.asarray(ids)).mean(axis=0)
        for ids in base.tokenizer(texts, add_special_tokens=False).input_ids[:length]
    ]
    rest = sampled_vocabulary(base, length - len(labels), random)
    return jnp.concatenate([jnp.stack(labels), rest])
