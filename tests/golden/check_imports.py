"""Check that adapters from peft give the same logits here, and that exporting them is exact.

This is for models of any size; pytest checks the adapters of the small models. It needs
softprompt, and the adapters that `make_adapters.py` wrote for a model folder.

    python tests/golden/export_base.py smollm2-135m-instruct DIR/smollm2
    python tests/golden/make_adapters.py DIR/smollm2 ADAPTERS       # torch, transformers, peft
    python tests/golden/check_imports.py DIR/smollm2 ADAPTERS/smollm2

The script prints the largest difference of the logits at real positions, divided by their
standard deviation. It fails if a difference is larger than TOLERANCE, or if an adapter changes
when it is imported and exported.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from export_adapters import logits_of

from softprompt.backbones.batch import Batch
from softprompt.backbones.formats.directory import ModelDirectory
from softprompt.backbones.loading import Base, load_backbone
from softprompt.experiment.methods import method_class
from softprompt.experiment.schema import ComputeSettings
from softprompt.inference.prompt import TrainedPrompt
from softprompt.interop.peft_export import export_adapter
from softprompt.interop.peft_import import import_adapter

TOLERANCE = 1e-4


def imported(base: Base, adapter: Path):
    name, arrays, description = import_adapter(adapter, base)
    opening = [~i for i in range(len(arrays.get("vectors", ())))]
    return method_class(name).load(arrays, description, opening)


def is_exact(base: Base, method) -> bool:
    """Whether the method has the same arrays after an export and another import."""
    backbone = method.adapt(base.backbone)
    prompt = TrainedPrompt(base, method, backbone, method.make_prefix(backbone), None, {})
    with tempfile.TemporaryDirectory() as folder:
        export_adapter(prompt, Path(folder))
        again = imported(base, Path(folder)).arrays(backbone)
    arrays = method.arrays(backbone)
    return again.keys() == arrays.keys() and all(
        np.array_equal(again[name], array) for name, array in arrays.items()
    )


def main(model: Path, adapters: Path) -> bool:
    file = ModelDirectory(model)
    base = Base(str(model), "", file.config, load_backbone(file)[0], None, ComputeSettings())
    golden, good = dict(np.load(adapters / "golden.npz")), True
    tokens, lengths = golden["tokens"].astype(np.int32), golden["lengths"]
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    batch = Batch(tokens, lengths, tokens, tokens * 0, positions, None, None)
    real = positions < lengths[:, None]
    for adapter in sorted(path for path in adapters.iterdir() if path.is_dir()):
        method, expected = imported(base, adapter), golden[f"{adapter.name}_logits"][real]
        found = np.abs(logits_of(base, method, batch)[real] - expected).max() / expected.std()
        close, exact = bool(found <= TOLERANCE), is_exact(base, method)
        result = f"{found:.1e}{'' if close else '  TOO LARGE'}, {'exact' if exact else 'CHANGED'}"
        print(f"{adapter.parent.name} {adapter.name}: {result} when exported again")
        good &= close and exact
    return good


if __name__ == "__main__":
    sys.exit(not main(Path(sys.argv[1]), Path(sys.argv[2])))
