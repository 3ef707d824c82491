"""Check that transformers 4 reads merged exports as transformers 5 does.

    make transformers4-test

`export FOLDER` runs in softprompt's environment. It exports a prompt on every golden model that has
a reference, and writes what transformers 5 reads. `check FOLDER` runs where transformers 4 is
installed, and compares. PyTorch is not needed.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
TEXTS = ["A joy from start to end.", "<|softprompt-0|>Hi <|start|> é我👍\n\n  x", "a<|endoftext|>"]
# Phi-3's class in transformers 4 cannot express a factor of attention that is not the default.
NOT_IN_4 = ["phi3-long.gguf"]


def export(folder: Path) -> None:
    """Export a prompt of two virtual tokens on every model."""
    import jax
    from softprompt import Base, SoftPrompt, load_base
    from softprompt.backbones.formats.directory import ModelDirectory
    from softprompt.backbones.formats.gguf import GGUFFile
    from softprompt.backbones.loading import load_backbone
    from softprompt.experiment.schema import ComputeSettings
    from softprompt.inference.prompt import TrainedPrompt
    from softprompt.interop.merged import export_merged

    golden = Path(__file__).parent
    tokenizer = load_base(str(golden / "llama-grouped")).tokenizer
    paths = [*sorted((golden / "families").iterdir()), *sorted((golden / "gguf").glob("*.gguf"))]
    expected = {}
    for path in paths:
        file = ModelDirectory(path) if path.is_dir() else GGUFFile(path)
        backbone, _ = load_backbone(file)
        base = Base(str(path), "", file.config, backbone, tokenizer, ComputeSettings())
        vectors = jax.random.normal(jax.random.key(0), (2, backbone.arch.hidden_size))
        (folder / path.name).mkdir(parents=True)
        export_merged(TrainedPrompt.from_method(SoftPrompt(vectors), base), folder / path.name)
        expected[path.name] = read(folder / path.name)
    (folder / "expected.json").write_text(json.dumps(expected))


def check(folder: Path) -> None:
    """Compare what this version of transformers reads with the expected values."""
    import transformers

    expected = json.loads((folder / "expected.json").read_text())
    for name, values in expected.items():
        if name in NOT_IN_4:
            continue
        found = read(folder / name)
        differing = [key for key in values if found[key] != values[key]]
        assert not differing, f"{name}: {', '.join(differing)}: {found} instead of {values}"
    print(f"transformers {transformers.__version__} reads {len(expected) - len(NOT_IN_4)} exports")


def read(folder: Path) -> dict[str, Any]:
    """Return what the installed version of transformers reads from an export."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    return {
        "ids": [tokenizer(text).input_ids for text in TEXTS],
        "plain": [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS],
        "keys": list(tokenizer("a").keys()),
        "decoded": [tokenizer.decode(tokenizer(text).input_ids) for text in TEXTS],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        # Version 5 says "tied" for every T5 model, and looks for a head in the weights.
        "tied": config.model_type != "t5" and config.tie_word_embeddings,
        "rope": rope(config),
    }


def rope(config: Any) -> Any:
    """Return base and scaling of the rotary embedding, whose names differ between versions."""
    new = getattr(config, "rope_parameters", None)
    if new:
        new = new.get("full_attention", new)
        kind = new.get("rope_type", "default")
        return [new.get("rope_theta"), kind, new.get("factor")]
    old = getattr(config, "rope_scaling", None) or {}
    kind = old.get("rope_type", old.get("type", "default"))
    theta = getattr(config, "rope_theta", getattr(config, "rotary_emb_base", None))
    return [theta, kind, old.get("factor")]


if __name__ == "__main__":
    {"export": export, "check": check}[sys.argv[1]](Path(sys.argv[2]))
