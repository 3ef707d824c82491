"""From an experiment, or from what was saved, to a method."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from softprompt.backbones.loading import Base
from softprompt.errors import UserError
from softprompt.experiment.schema import Experiment
from softprompt.methods.initializers import initial_vectors
from softprompt.methods.lora import LoRA, find_targets, first_matrices
from softprompt.methods.method import FullFineTuning, Method
from softprompt.methods.multitask import MultiTask
from softprompt.methods.prefix_tuning import PrefixTuning, ReparametrizedPrefix
from softprompt.methods.reparametrization import LSTM, MLP, LowRank, Residual
from softprompt.methods.soft_prompt import DecomposedPrompt, Reparametrized, SoftPrompt

_SIZES = {"mlp": 128, "lstm": 128, "residual": 800, "low_rank": 10}  # from: docs/methods.md


def virtual_tokens(experiment: Experiment) -> tuple[int, int]:
    """Virtual tokens whose place the template says, and those of prefix tuning."""
    if experiment.method in ("prompt", "dept"):
        return experiment.prompt.length, 0
    return 0, experiment.prefix.length if experiment.method == "prefix" else 0


def make_method(
    experiment: Experiment, base: Base, opening: Sequence[int], trained: Sequence[jax.Array] = ()
) -> Method:
    """The method of an experiment as it is before training.

    Args:
      experiment: what is random in it is drawn by its seed.
      base: the base model.
      opening: `[S]`, ids that every row begins with.
      trained: `[P, D]` each, the prompts that `init: prompts` names.

    Raises:
      UserError: if the method cannot be had with these settings on this base model.
    """
    method, seed, key = experiment.method, experiment.seed, jax.random.key(experiment.seed)
    labels = list((experiment.verbalizer or {}).values())
    if method == "none":
        return Method(opening)
    if method == "full":
        return FullFineTuning(opening)
    if method == "lora":
        lora = experiment.lora
        paths = find_targets(base.backbone, lora.targets)
        matrices = first_matrices(base.backbone, paths, lora.rank, key)
        return LoRA(matrices, dict.fromkeys(paths, lora.alpha / lora.rank), lora.dropout, opening)
    if method == "prefix":
        prefix = experiment.prefix
        vectors = initial_vectors(prefix, prefix.length, base, labels, trained, seed)
        return _prefix(base, vectors, prefix.size, key, opening)
    prompt = experiment.prompt
    vectors = initial_vectors(prompt, prompt.length, base, labels, trained, seed)
    if method == "dept":
        return _decomposed(experiment, vectors, key, opening)
    return _prompt(experiment, vectors, key, opening)


def method_of(
    name: str, arrays: Mapping[str, jax.Array], scales: Mapping[str, float], opening: Sequence[int]
) -> Method:
    """A trained method again.

    Args:
      name: as in an experiment.
      arrays: what its `arrays` gave.
      scales: of LoRA, by path.
      opening: as it was trained with.
    """
    if name == "prompt":
        return SoftPrompt(arrays["vectors"], opening)
    if name == "dept":
        return DecomposedPrompt(arrays["vectors"], arrays["down"], arrays["up"], opening)
    if name == "prefix":
        return PrefixTuning(arrays["keys"], arrays["values"], opening)
    if name == "lora":
        matrices = {path: (arrays[f"{path}.down"], arrays[f"{path}.up"]) for path in scales}
        return LoRA(matrices, scales, opening=opening)
    return FullFineTuning(opening) if name == "full" else Method(opening)


def _prompt(
    experiment: Experiment, vectors: jax.Array, key: jax.Array, opening: Sequence[int]
) -> Method:
    prompt = experiment.prompt
    if prompt.reparametrization is None:
        return SoftPrompt(vectors, opening)
    if prompt.reparametrization == "multitask":
        assert prompt.tasks is not None
        return Reparametrized(MultiTask(vectors, len(prompt.tasks)), opening)
    size = prompt.size or _SIZES[prompt.reparametrization]
    if prompt.reparametrization == "low_rank":
        ranks = min(vectors.shape)
        if prompt.size and prompt.size > ranks:
            raise UserError(f"prompt.size {prompt.size}: there are only {ranks} ranks")
        size = min(size, ranks)
        return Reparametrized(LowRank(vectors, size), opening)
    networks = {"mlp": MLP, "lstm": LSTM, "residual": Residual}
    return Reparametrized(networks[prompt.reparametrization](vectors, size, key), opening)


def _decomposed(
    experiment: Experiment, vectors: jax.Array, key: jax.Array, opening: Sequence[int]
) -> Method:
    """DePT's offsets start from zero: `down` zero, `up` normal with the vectors' spread."""
    settings, size = experiment.dept, vectors.shape[1]
    up = jax.random.normal(key, (settings.rank, size)) * jnp.std(vectors)
    return DecomposedPrompt(vectors, jnp.zeros((settings.positions, settings.rank)), up, opening)


def _prefix(
    base: Base, vectors: jax.Array, size: int | None, key: jax.Array, opening: Sequence[int]
) -> Method:
    keys, values = base.backbone.initial_prefix(vectors, key)
    if size is None:
        return PrefixTuning(keys, values, opening)
    return ReparametrizedPrefix(keys, values, size, key, opening)
