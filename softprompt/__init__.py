"""Learn soft prompts for frozen language models, in JAX.

    from softprompt import load_prompt

    prompt = load_prompt("runs/sentiment")
    prompt.classify(["A dull, lifeless film."])

Names are imported when they are first used, so that `softprompt --help` is quick.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softprompt.backbones.loading import Base, load_base
    from softprompt.errors import UserError
    from softprompt.experiment.reading import load_experiment
    from softprompt.experiment.schema import Experiment
    from softprompt.generation.engine import Generated
    from softprompt.inference.generator import Generator
    from softprompt.inference.prompt import Prediction, TrainedPrompt, load_prompt
    from softprompt.methods.soft_prompt import SoftPrompt
    from softprompt.training.loop import train

# transformers is used for its tokenizers, and need not say that it found no PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

_MODULES = {
    "Base": "backbones.loading",
    "Experiment": "experiment.schema",
    "Generated": "generation.engine",
    "Generator": "inference.generator",
    "Prediction": "inference.prompt",
    "SoftPrompt": "methods.soft_prompt",
    "TrainedPrompt": "inference.prompt",
    "UserError": "errors",
    "load_base": "backbones.loading",
    "load_experiment": "experiment.reading",
    "load_prompt": "inference.prompt",
    "train": "training.loop",
}

__all__ = [
    "Base",
    "Experiment",
    "Generated",
    "Generator",
    "Prediction",
    "SoftPrompt",
    "TrainedPrompt",
    "UserError",
    "load_base",
    "load_experiment",
    "load_prompt",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
