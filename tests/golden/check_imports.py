"""Whether adapters that peft made for a model of any size give its logits here, and come back exact.

Runs where softprompt is installed, on what `make_adapters.py` wrote for a model's directory; the
small models' adapters are in the tests.

    python tests/golden/export_base.py smollm2-135m-instruct DIR/smollm2
    python tests/golden/make_adapters.py DIR/smollm2 ADAPTERS       # torch, transformers, peft
    python tests/golden/check_imports.py DIR/smollm2 ADAPTERS/smollm2

Prints how much the logits at real positions differ at most, as a share of their spread, and
fails if any differ by more than TOLERANCE or an adapter exported again is another.
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


def comes_back(base: Base, method) -> bool:
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
    places = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    batch = Batch(tokens, lengths, tokens, tokens * 0, places, None, None)
    real = places < lengths[:, None]
    for adapter in sorted(path for path in adapters.iterdir() if path.is_dir()):
        method, expected = imported(base, adapter), golden[f"{adapter.name}_logits"][real]
        found = np.abs(logits_of(base, method, batch)[real] - expected).max() / expected.std()
        close, exact = bool(found <= TOLERANCE), comes_back(base, method)
        said = f"{found:.1e}{'' if close else '  TOO MUCH'}, {'exact' if exact else 'CHANGED'}"
        print(f"{adapter.parent.name} {adapter.name}: {said} when exported again")
        good &= close and exact
    return good


if __name__ == "__main__":
    sys.exit(not main(Path(sys.argv[1]), Path(sys.argv[2])))
