"""Export a merged model and the texts that softprompt generates, for `check_merged.py`.

This script needs softprompt. `check_merged.py` needs torch and transformers:

    python tests/golden/export_merged.py RUN DIR TEXT [TEXT ...]
    python tests/golden/check_merged.py DIR

DIR/expected.json contains the greedy continuation of each text, with at most 32 tokens.
"""

import json
import sys
from pathlib import Path

from softprompt import load_prompt
from softprompt.interop.export import export

NEW_TOKENS = 32


def main(run: str, folder: Path, texts: list[str]) -> None:
    prompt = load_prompt(run)
    export(prompt, folder, "merged")
    written = prompt.generate(texts, max_new_tokens=NEW_TOKENS, stop=[])
    expected = [
        {"text": text, "written": one.text, "ended": one.ended[0]}
        for text, one in zip(texts, written, strict=True)
    ]
    (folder / "expected.json").write_text(json.dumps(expected))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
