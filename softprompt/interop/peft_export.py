"""What a method learned as an adapter of `peft` 0.21 (`adapter_config.json` and safetensors).

The form of each method's tensors is in the file of the method.
"""

import json
from pathlib import Path

from softprompt.backbones.formats.storing import save_tensors
from softprompt.inference.prompt import TrainedPrompt


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
