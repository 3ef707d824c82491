"""Check that stock transformers generates the same text from a merged model as softprompt.

Needs torch and transformers, in a separate environment. First run `export_merged.py`.

    python tests/golden/check_merged.py DIR
"""

import ast
import json
import sys
from pathlib import Path

import torch
import transformers

NEW_TOKENS = 32


def main(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    form = (folder / "README.md").read_text().split("text = ")[1].split(".format_map(")[0]
    same = []
    for case in json.loads((folder / "expected.json").read_text()):
        text = ast.literal_eval(form).format(text=case["text"])
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[0]
        if not config.is_encoder_decoder:
            output = output[inputs["input_ids"].shape[1] :]
        else:
            output = output[1:]
        ended = output[-1].item() == tokenizer.eos_token_id
        written = tokenizer.decode(output[:-1] if ended else output)
        same.append((written, ended) == (case["written"], case["ended"]))
        print("same" if same[-1] else f"differs: {written!r}, expected {case['written']!r}")
    print(f"{sum(same)} of {len(same)} texts are the same")
    sys.exit(not all(same))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
