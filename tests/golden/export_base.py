"""Write a base model as a model directory that transformers can read, for the other scripts.

    python tests/golden/export_base.py smollm2-135m-instruct DIR
"""

import json
import sys
from pathlib import Path

from softprompt import load_base
from softprompt.backbones.families import FAMILIES
from softprompt.backbones.formats.storing import save_tensors, stored_tensors


def main(name: str, folder: Path) -> None:
    base = load_base(name)
    folder.mkdir(parents=True)
    names = FAMILIES[base.config["model_type"]].names
    save_tensors(dict(stored_tensors(base.backbone, names)), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(base.config, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
