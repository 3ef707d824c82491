"""A merged model of a trained prompt, with what the prompt writes here, for `check_merged.py`.

Runs where softprompt is installed; `check_merged.py` where torch and transformers are:

    python tests/golden/export_merged.py RUN DIR TEXT [TEXT ...]
    python tests/golden/check_merged.py DIR

DIR/expected.json has for each text the ids of the input and of 32 tokens written greedily.
"""

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from softprompt import load_prompt
from softprompt.inference.generate import greedy
from softprompt.interop.export import export

NEW_TOKENS = 32


def main(run: str, folder: Path, texts: list[str]) -> None:
    prompt = load_prompt(run)
    export(prompt, folder, "merged")
    end = prompt.base.tokenizer.eos_token_id
    expected = []
    for text in texts:
        example = prompt.task.example(prompt.record(text, text), with_answer=False)
        written = greedy(
            prompt.backbone,
            prompt.prefix,
            jnp.array([example.input]),
            jnp.array([len(example.input)]),
            end,
            count=NEW_TOKENS,
        )
        expected.append({"text": text, "written": np.asarray(written)[0].tolist()})
    (folder / "expected.json").write_text(json.dumps(expected))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
