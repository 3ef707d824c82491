"""What `generation.py` times peft with, in an environment that has torch, peft and gguf.

Reads commands as lines of JSON, `{"tokens": [[...], ...], "new": N}`, and answers each with
the seconds that `generate` took and what it wrote.

    python peft_generation.py MODEL.gguf PROMPT.npy
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import peft
import torch
import transformers


def main() -> None:
    path, prompt = Path(sys.argv[1]), torch.tensor(np.load(sys.argv[2]))
    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(prompt))
    model = peft.get_peft_model(model, config).eval()
    model.prompt_encoder.default.embedding.weight.data = prompt
    print("ready", flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        tokens = torch.tensor(command["tokens"])
        began = time.perf_counter()
        with torch.inference_mode():
            written = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=command["new"],
                min_new_tokens=command["new"],
            )
        seconds = time.perf_counter() - began
        new = written[:, -command["new"] :].tolist()
        print(json.dumps({"seconds": seconds, "written": new}), flush=True)


if __name__ == "__main__":
    main()
