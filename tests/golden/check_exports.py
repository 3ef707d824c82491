"""Whether peft makes of exported adapters what softprompt does.

Needs torch, transformers and peft, in an environment of its own. For the exports of all models
in a folder, or of those named:

    python tests/golden/check_exports.py EXPORTS [MODEL ...]

A model is one of families/, or a folder elsewhere. Its adapters, in peft's format, are in
EXPORTS/<the folder's name>/KIND/, and their results in EXPORTS/<the folder's name>/golden.npz:
right-padded `tokens` of `lengths`, T5's `targets` of `target_lengths` too, and KIND_logits of the
batch's own positions, T5's of the targets. Prints how much the logits at real positions differ at
most, as a share of their spread, and fails if any differ by more than TOLERANCE.
"""

import sys
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from make_adapters import logits, real
from make_families import FAMILIES, read

TOLERANCE = 1e-4
LOGITS = "_logits"


def difference(folder: Path, adapter: Path, golden: dict, expected: np.ndarray) -> float:
    tuned = peft.PeftModel.from_pretrained(read(folder), adapter)
    lengths = golden.get("target_lengths", golden["lengths"])
    compared = real(lengths, expected.shape[1]).numpy()
    error = np.abs(logits(tuned, golden).numpy() - expected)[compared]
    return error.max() / expected[compared].std()


def check(folder: Path, exports: Path) -> bool:
    golden = dict(np.load(exports / "golden.npz"))
    kinds = {key.removesuffix(LOGITS) for key in golden if key.endswith(LOGITS)}
    assert kinds == {path.name for path in exports.iterdir() if path.is_dir()}, exports
    good = True
    for kind in sorted(kinds):
        found = difference(folder, exports / kind, golden, golden[kind + LOGITS])
        close = bool(found <= TOLERANCE)  # which NaN is not
        print(f"{exports.name} {kind}: {found:.1e}{'' if close else '  TOO MUCH'}")
        good &= close
    return good


def main(exports: Path, models: list[str]) -> bool:
    good = True
    for model in models or sorted(path.name for path in exports.iterdir()):
        folder = FAMILIES / model if (FAMILIES / model).is_dir() else Path(model).resolve()
        good &= check(folder, exports / folder.name)
    return good


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sys.exit(not main(Path(sys.argv[1]), sys.argv[2:]))
