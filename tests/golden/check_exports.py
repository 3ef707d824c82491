"""Check that exported adapters give the same logits in peft as in softprompt.

Needs torch, transformers and peft, in a separate environment. Without MODEL, it checks all
models in EXPORTS:

    python tests/golden/check_exports.py EXPORTS [MODEL ...]

MODEL is the name of a folder in families/, or the path of another model folder. The adapters of
a model, in peft's format, are in EXPORTS/<name of the model folder>/KIND/. The expected results
are in golden.npz next to them:

    tokens, lengths             a right-padded batch
    targets, target_lengths     only for T5
    KIND_logits                 at the positions of the batch, for T5 at the targets

The script prints the largest difference of the logits at real positions, divided by their
standard deviation. It fails if a difference is larger than TOLERANCE.
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
        close = bool(found <= TOLERANCE)  # False for NaN
        print(f"{exports.name} {kind}: {found:.1e}{'' if close else '  TOO LARGE'}")
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
