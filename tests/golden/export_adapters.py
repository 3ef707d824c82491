"""Export adapters from softprompt, with its logits, so that `check_exports.py` can check them.

This script needs softprompt. `check_exports.py` needs torch, transformers and peft:

    python tests/golden/export_adapters.py EXPORTS [MODEL_DIRECTORY ...]
    python tests/golden/check_exports.py EXPORTS

Writes a random adapter of every kind (prompt, prefix, LoRA, and soft prompt as a prefix) to
EXPORTS/<variant>/<kind>/. EXPORTS/<variant>/golden.npz contains `tokens` and `lengths`, for T5 also
`targets` and `target_lengths`, and `<kind>_logits`. The variants are the first one of each family
in families/, or the trained models in the given directories.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.backbones.batch import Batch
from softprompt.backbones.formats.directory import ModelDirectory
from softprompt.backbones.loading import Base, load_backbone
from softprompt.experiment.schema import ComputeSettings
from softprompt.inference.prompt import TrainedPrompt
from softprompt.interop.peft_export import export_adapter
from softprompt.methods.lora import LoRA, find_targets, matrices_of
from softprompt.methods.prefix_tuning import PrefixTuning
from softprompt.methods.soft_prompt import SoftPrompt

FAMILIES = Path(__file__).parent / "families"
LENGTHS, TARGET_LENGTHS, VIRTUAL_TOKENS, RANK = (9, 6, 2), (4, 2, 1), 4, 3


def methods(base: Base, random: np.random.Generator, trained: bool):
    arch = base.backbone.arch
    spread = float(jnp.std(base.backbone.embedding.table[...])) * base.backbone.embedding.scale
    vectors = draw(random, VIRTUAL_TOKENS, arch.hidden_size) * spread
    shape = base.backbone.prefix_shape(VIRTUAL_TOKENS)
    if not base.backbone.separate_targets:
        yield "soft-as-prefix", SoftPrompt(vectors)
    yield "prompt", SoftPrompt(vectors)
    if trained:  # with random keys, rounding errors of float32 alone reach 1e-3
        tokens = jnp.asarray(random.integers(5, arch.vocab_size, VIRTUAL_TOKENS))
        prefix = base.backbone.prefill(base.backbone.embedding(tokens))
        yield "prefix", PrefixTuning(prefix.keys, prefix.values)
    else:
        yield "prefix", PrefixTuning(draw(random, *shape), draw(random, *shape))
    paths = find_targets(base.backbone, ["*"])
    linears = matrices_of(base.backbone)
    shapes = {path: linears[path].kernel.shape for path in paths if "router" not in path}
    matrices = {
        path: (
            draw(random, layers, inputs, RANK) * inputs**-0.5,
            draw(random, layers, RANK, outputs) * 0.1,
        )
        for path, (layers, inputs, outputs) in shapes.items()
    }
    yield "lora", LoRA(matrices, dict.fromkeys(matrices, 5 / RANK))


def draw(random, *shape):
    return jnp.asarray(random.standard_normal(shape), jnp.float32)


def logits_of(base, method, batch):
    @jax.jit
    def run(backbone):
        backbone, prefix = method.apply(backbone)
        return backbone.logits(backbone.target_states(batch, prefix))

    return np.asarray(run(base.backbone))


def batch_of(base, random):
    size = min(base.backbone.arch.vocab_size, 50000)
    tokens = np.zeros((len(LENGTHS), max(LENGTHS)), np.int32)
    for row, length in enumerate(LENGTHS):
        tokens[row, :length] = random.integers(5, size, length)
    rows = {"tokens": tokens, "lengths": np.array(LENGTHS)}
    if not base.backbone.separate_targets:
        every = np.broadcast_to(np.arange(max(LENGTHS)), tokens.shape)
        batch = Batch(tokens, rows["lengths"], tokens, tokens * 0, every, None, None)
        return batch, rows
    targets = np.zeros((len(TARGET_LENGTHS), max(TARGET_LENGTHS)), np.int32)
    candidates = np.full_like(targets, -1)
    for row, length in enumerate(TARGET_LENGTHS):
        targets[row, :length] = random.integers(5, size, length)
        candidates[row, :length] = 0
    rows |= {"targets": targets, "target_lengths": np.array(TARGET_LENGTHS)}
    return Batch(tokens, rows["lengths"], targets, candidates, None, None, None), rows


def main(exports: Path, directories: list[str]) -> None:
    first = {}
    for path in sorted(FAMILIES.iterdir()):
        first.setdefault(path.name.split("-")[0], path)
    for path in map(Path, directories or first.values()):
        variant, file = path.name, ModelDirectory(path)
        random = np.random.default_rng(0)
        base = Base(str(path), "", file.config, load_backbone(file)[0], None, ComputeSettings())
        batch, arrays = batch_of(base, random)
        for kind, method in methods(base, random, trained=path.parent != FAMILIES):
            (exports / variant / kind).mkdir(parents=True, exist_ok=True)
            backbone = method.adapt(base.backbone)
            prompt = TrainedPrompt(base, method, backbone, method.make_prefix(backbone), None, {})
            export_adapter(prompt, exports / variant / kind, as_prefix=kind == "soft-as-prefix")
            arrays[f"{kind}_logits"] = logits_of(base, method, batch)
        np.savez(exports / variant / "golden.npz", **arrays)
        print(variant)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
