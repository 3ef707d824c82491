"""Write adapters for `peft` 0.21: `adapter_config.json` and safetensors.

Each method converts its own arrays, see `Method.peft_adapter` and `Method.peft_prefix`.
"""

import json
from pathlib import Path

from softprompt.backbones.formats.storing import save_tensors
from softprompt.inference.prompt import TrainedPrompt


def export_adapter(prompt: TrainedPrompt, folder: Path, *, as_prefix: bool = False) -> None:
    """Write an adapter that has the same logits in `peft`.

    Args:
      prompt: the trained prompt.
      folder: an existing folder.
      as_prefix: write a PREFIX_TUNING adapter, which holds everything before the inputs
        (virtual tokens and text) as keys and values.

    Raises:
      UserError: if `peft` has no such adapter.
    """
    make_adapter = prompt.method.peft_prefix if as_prefix else prompt.method.peft_adapter
    arrays, config = make_adapter(prompt.base, prompt.prefix)
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
