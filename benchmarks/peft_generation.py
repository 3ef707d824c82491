"""Run peft or stock transformers for `generation.py`, in an environment that has torch.

Reads one line of JSON per measurement, `{"name": "peft" or "transformers", "tokens":
[[...], ...], "new": N}`. Answers with the seconds it took and the generated ids.

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
    path, vectors = Path(sys.argv[1]), torch.from_numpy(np.load(sys.argv[2]))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    load = {"gguf_file": path.name, "dtype": torch.float32}
    plain = transformers.AutoModelForCausalLM.from_pretrained(path.parent, **load).eval()
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(vectors))
    tuned = peft.get_peft_model(plain, config).eval()
    tuned.prompt_encoder.default.embedding.weight.data = vectors
    print(json.dumps({"peft": peft.__version__, "transformers": transformers.__version__}))
    sys.stdout.flush()
    for line in sys.stdin:
        command = json.loads(line)
        tokens, new = torch.tensor(command["tokens"]), command["new"]
        settings = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
        began = time.perf_counter()
        with torch.inference_mode():
            if command["name"] == "peft":
                mask = torch.ones_like(tokens)
                generated = tuned.generate(input_ids=tokens, attention_mask=mask, **settings)
            else:
                rows = vectors[None].expand(len(tokens), -1, -1)
                inputs = torch.cat([rows, plain.get_input_embeddings()(tokens)], dim=1)
                mask = torch.ones(inputs.shape[:2], dtype=torch.long)
                generated = plain.generate(inputs_embeds=inputs, attention_mask=mask, **settings)
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "tokens": generated[:, -new:].tolist()}), flush=True)


if __name__ == "__main__":
    main()
