"""What a method learned as an adapter of `peft` 0.21 (`adapter_config.json` and safetensors).

Axis letters: P virtual tokens, D hidden, L layers, K key-value heads, h head size, R rank.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from softprompt.backbones.formats.storing import save_tensors
from softprompt.backbones.loading import Base
from softprompt.errors import UserError
from softprompt.inference.prompt import TrainedPrompt
from softprompt.interop.peft_layout import peft_embedding_scale, stored_modules
from softprompt.methods.lora import LoRA, matrices_of
from softprompt.methods.prefix_tuning import PrefixTuning
from softprompt.methods.soft_prompt import SoftPrompt


def export_adapter(prompt: TrainedPrompt, folder: Path, *, as_prefix: bool = False) -> None:
    """Write an adapter that gives the same logits in `peft`.

    A soft prompt becomes PROMPT_TUNING, learned keys and values PREFIX_TUNING, LoRA LORA.

    Args:
      prompt: what was learned.
      folder: where to write; it exists.
      as_prefix: write whatever stands in front of every row (virtual tokens and text) as
        PREFIX_TUNING: keys and values instead of the vectors that they come from.

    Raises:
      UserError: if `peft` has no form for it.
    """
    method, name = prompt.method, prompt.description["method"]
    if isinstance(method, PrefixTuning) or (as_prefix and isinstance(method, SoftPrompt)):
        arrays, config = _prefix(prompt)
    elif as_prefix:
        raise UserError(f"method {name} cannot be written as a prefix")
    elif isinstance(method, SoftPrompt):
        arrays, config = _prompt(prompt.base, method)
    elif isinstance(method, LoRA):
        arrays, config = _lora(prompt.base, method)
    else:
        raise UserError(f"method {name} has no form in peft")
    separate_targets = prompt.base.backbone.separate_targets
    shared = {
        "task_type": "SEQ_2_SEQ_LM" if separate_targets else "CAUSAL_LM",
        "base_model_name_or_path": prompt.base.hub_name,
        "inference_mode": True,
        "revision": None,
    }
    save_tensors(arrays, folder / "adapter_model.safetensors")
    text = json.dumps(config | shared, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n")


def _prompt(base: Base, method: SoftPrompt) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    vectors = np.asarray(method.vectors[...], np.float32)
    if not _in_front(method) or len(method.opening[...]) > len(vectors):
        raise UserError(
            "peft puts virtual tokens in front of everything, and these stand elsewhere or are "
            "not all; what stands in front of every input can be had as --format peft-prefix"
        )
    arch = base.backbone.arch
    layers, *_ = base.backbone.prefix_shape(0)
    return {"prompt_embeddings": vectors / np.float32(peft_embedding_scale(base))}, {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": len(vectors),
        "token_dim": vectors.shape[1],
        "num_transformer_submodules": 1,
        "num_attention_heads": arch.num_heads,
        "num_layers": layers,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_name_or_path": None,
    }


def _in_front(method: SoftPrompt) -> bool:
    """Whether all virtual tokens are part of what every row begins with."""
    opening = np.asarray(method.opening[...])
    return opening[opening < 0].tolist() == [~i for i in range(len(method.vectors[...]))]


def _prefix(prompt: TrainedPrompt) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    prefix: Any = prompt.prefix
    if prefix is None or prefix.keys is None:
        raise UserError(
            "nothing stands in front of every input as keys and values, which is what a "
            "prefix is in peft"
        )
    separate_targets = prompt.base.backbone.separate_targets
    if separate_targets and prefix.embeddings is not None:
        raise UserError("text in front of every input of an encoder has no form in peft")
    if isinstance(prompt.method, SoftPrompt) and not _in_front(prompt.method):
        raise UserError("these virtual tokens stand in the inputs, not in front of them")
    stacked = np.stack([prefix.keys, prefix.values]).astype(np.float32)  # [2, L, P, K, h]
    if separate_targets:
        # Of two submodules peft gives layer 2i to layer i of the decoder, and drops the others;
        # with one it would put the prefix in front of the encoder's output as well.
        stacked = np.stack([stacked, np.zeros_like(stacked)], axis=2)
        stacked = stacked.reshape(2, -1, *stacked.shape[3:])
    _, layers, length, kv_heads, size = stacked.shape
    return {"prompt_embeddings": stacked.transpose(2, 1, 0, 3, 4).reshape(length, -1).copy()}, {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": length,
        "token_dim": kv_heads * size,
        "num_transformer_submodules": 2 if separate_targets else 1,
        "num_attention_heads": kv_heads,
        "num_layers": layers,
        "encoder_hidden_size": kv_heads * size,
        "prefix_projection": False,
    }


def _lora(base: Base, method: LoRA) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    arrays, ranks, alphas = {}, {}, {}
    scales = dict(method.scales)
    transposed = False
    modules, linears = stored_modules(base), matrices_of(base.backbone)
    for name, (entry, paths) in modules.items():
        learned = [path for path in paths if path in scales]
        if not learned:
            continue
        matrices = {
            path: [np.asarray(method.matrices[path][side][...]) for side in ("down", "up")]
            for path in learned
        }
        transposed |= entry.transposed
        sizes = [matrices[path][0].shape[-1] for path in learned]
        ends = np.cumsum(sizes)
        for layer in range(len(matrices[learned[0]][0])):
            down = np.concatenate([matrices[path][0][layer].T for path in learned])  # [R, in]
            parts = [
                np.zeros((linears[path].kernel.shape[-1], ends[-1]), np.float32) for path in paths
            ]
            for path, size, end in zip(learned, sizes, ends, strict=True):
                factor = np.float32(scales[path] / scales[learned[0]])
                parts[paths.index(path)][:, end - size : end] = matrices[path][1][layer].T * factor
            module = name.format(layer=layer)
            up = entry.form.together(tuple(parts), base.backbone.arch)  # [out, R]
            arrays[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(down)
            arrays[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(up)
            ranks[module] = int(ends[-1])
            alphas[module] = float(scales[learned[0]] * ends[-1])
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return arrays, {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "target_modules": _target_modules(list(ranks), modules),
        "fan_in_fan_out": transposed,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def _target_modules(names: Sequence[str], modules: Mapping[str, Any]) -> list[str]:
    """The names' endings behind the layer's number, if these mean no other module."""

    def ending(template: str) -> str:
        return template.rpartition("{layer}.")[2]

    endings = {ending(t) for t in modules if t.format(layer=0) in names}
    meant = [t for t in modules if ending(t) in endings]
    if all(t.format(layer=0) in names for t in meant):
        return sorted(endings)
    return sorted(names)
