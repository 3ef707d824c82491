"""From an experiment, or from what was saved, to a method."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from softprompt.backbones.loading import Base
from softprompt.backbones.t5 import T5
from softprompt.config import Experiment
from softprompt.errors import UserError
from softprompt.methods.initializers import initial_vectors
from softprompt.methods.lora import LoRA, find_targets, first_matrices
from softprompt.methods.method import FullFineTuning, Method
from softprompt.methods.multitask import MultiTask
from softprompt.methods.prefix import PrefixTuning, ReparametrizedPrefix
from softprompt.methods.reparametrization import LSTM, MLP, LowRank, Residual
from softprompt.methods.soft_prompt import DecomposedPrompt, Reparametrized, SoftPrompt

_SIZES = {"mlp": 128, "lstm": 128, "residual": 800, "low_rank": 10}  # see docs/methods.md


def virtual_tokens(experiment: Experiment) -> tuple[int, int]:
    """Virtual tokens whose place the template says, and those of prefix tuning."""
    if experiment.method in ("prompt", "dept"):
        return experiment.prompt.length, 0
    return 0, experiment.prefix.length if experiment.method == "prefix" else 0


def make_method(
    experiment: Experiment, base: Base, head: Sequence[int], trained: Sequence[jax.Array] = ()
) -> Method:
    """The method of an experiment as it is before training.

    Args:
      experiment: what is random in it is drawn by its seed.
      base: the base model.
      head: `[S]`, ids that every row begins with.
      trained: `[P, D]` each, the prompts that `init: prompts` names.

    Raises:
      UserError: if the method cannot be had with these settings on this base model.
    """
    method, seed, key = experiment.method, experiment.seed, jax.random.key(experiment.seed)
    labels = list((experiment.verbalizer or {}).values())
    if method == "none":
        return Method(head)
    if method == "full":
        return FullFineTuning(head)
    if method == "lora":
        lora = experiment.lora
        paths = find_targets(base.backbone, lora.targets)
        matrices = first_matrices(base.backbone, paths, lora.rank, key)
        return LoRA(matrices, dict.fromkeys(paths, lora.alpha / lora.rank), lora.dropout, head)
    if method == "prefix":
        prefix = experiment.prefix
        vectors = initial_vectors(prefix, prefix.length, base, labels, trained, seed)
        return _prefix(base, vectors, prefix.size, key, head)
    prompt = experiment.prompt
    vectors = initial_vectors(prompt, prompt.length, base, labels, trained, seed)
    if method == "dept":
        return _decomposed(experiment, vectors, key, head)
    return _prompt(experiment, vectors, key, head)


def method_of(
    name: str, arrays: Mapping[str, jax.Array], scales: Mapping[str, float], head: Sequence[int]
) -> Method:
    """A trained method again.

    Args:
      name: as in an experiment.
      arrays: what its `arrays` gave.
      scales: of LoRA, by path.
      head: as it was trained with.
    """
    if name == "prompt":
        return SoftPrompt(arrays["vectors"], head)
    if name == "dept":
        return DecomposedPrompt(arrays["vectors"], arrays["down"], arrays["up"], head)
    if name == "prefix":
        return PrefixTuning(arrays["keys"], arrays["values"], head)
    if name == "lora":
        matrices = {path: (arrays[f"{path}.down"], arrays[f"{path}.up"]) for path in scales}
        return LoRA(matrices, scales, head=head)
    return FullFineTuning(head) if name == "full" else Method(head)


def _prompt(
    experiment: Experiment, vectors: jax.Array, key: jax.Array, head: Sequence[int]
) -> Method:
    prompt = experiment.prompt
    if prompt.reparametrization is None:
        return SoftPrompt(vectors, head)
    if prompt.reparametrization == "multitask":
        assert prompt.tasks is not None
        return Reparametrized(MultiTask(vectors, len(prompt.tasks)), head)
    size = prompt.size or _SIZES[prompt.reparametrization]
    if prompt.reparametrization == "low_rank":
        if size > min(vectors.shape):
            raise UserError(f"prompt.size {size}: there are only {min(vectors.shape)} ranks")
        return Reparametrized(LowRank(vectors, size), head)
    networks = {"mlp": MLP, "lstm": LSTM, "residual": Residual}
    return Reparametrized(networks[prompt.reparametrization](vectors, size, key), head)


def _decomposed(
    experiment: Experiment, vectors: jax.Array, key: jax.Array, head: Sequence[int]
) -> Method:
    """DePT's offsets start from zero: `down` zero, `up` as the spread of embeddings."""
    settings, size = experiment.dept, vectors.shape[1]
    up = jax.random.normal(key, (settings.rank, size)) * jnp.std(vectors)
    return DecomposedPrompt(vectors, jnp.zeros((settings.positions, settings.rank)), up, head)


def _prefix(
    base: Base, vectors: jax.Array, size: int | None, key: jax.Array, head: Sequence[int]
) -> Method:
    """From what the model makes of vectors; an encoder-decoder, whose decoder it is for, cannot."""
    backbone = base.backbone
    if isinstance(backbone, T5):
        arch = backbone.arch
        shape = (2, arch.num_decoder_layers, len(vectors), arch.num_heads, arch.head_size)
        keys, values = jax.random.normal(key, shape)
    else:
        first = jax.jit(lambda backbone, x: backbone.prefill(x))(
            backbone, vectors.astype(backbone.embedding.table.dtype)
        )
        keys, values = first.keys.astype(jnp.float32), first.values.astype(jnp.float32)
    if size is None:
        return PrefixTuning(keys, values, head)
    return ReparametrizedPrefix(keys, values, size, key, head)
