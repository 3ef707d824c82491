"""Learn soft prompts for frozen language models, in JAX.

    from softprompt import load_prompt

    prompt = load_prompt("runs/sentiment")
    prompt.classify(["A dull, lifeless film."])

Names are imported when they are first used, so that `import softprompt` is fast.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softprompt.backbones.loading import Base, load_base
    from softprompt.data.batches import TrainingBatches
    from softprompt.data.datasets import make_examples
    from softprompt.data.records import Record
    from softprompt.data.task import make_task
    from softprompt.errors import UserError
    from softprompt.experiment.reading import load_experiment
    from softprompt.experiment.schema import Experiment, TemplateSettings
    from softprompt.generation.engine import Generated
    from softprompt.inference.generator import Generator
    from softprompt.inference.prompt import Prediction, TrainedPrompt, load_prompt
    from softprompt.methods.dept import DecomposedPrompt
    from softprompt.methods.full import FullFineTuning
    from softprompt.methods.lora import LoRA
    from softprompt.methods.prefix_tuning import PrefixTuning
    from softprompt.methods.saved import save_prompt
    from softprompt.methods.soft_prompt import PromptParam, SoftPrompt
    from softprompt.objectives.cross_entropy import cross_entropy
    from softprompt.objectives.model import Model
    from softprompt.parallel.mesh import make_mesh
    from softprompt.runtime.bars import ProgressBar
    from softprompt.training.callbacks import Callback
    from softprompt.training.loop import train
    from softprompt.training.step import split, train_step

    __version__: str

# transformers is used for its tokenizers only; its advice to install PyTorch does not apply.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

_MODULES = {
    "Base": "backbones.loading",
    "Callback": "training.callbacks",
    "DecomposedPrompt": "methods.dept",
    "Experiment": "experiment.schema",
    "FullFineTuning": "methods.full",
    "Generated": "generation.engine",
    "Generator": "inference.generator",
    "LoRA": "methods.lora",
    "Model": "objectives.model",
    "Prediction": "inference.prompt",
    "PrefixTuning": "methods.prefix_tuning",
    "ProgressBar": "runtime.bars",
    "PromptParam": "methods.soft_prompt",
    "Record": "data.records",
    "SoftPrompt": "methods.soft_prompt",
    "TemplateSettings": "experiment.schema",
    "TrainedPrompt": "inference.prompt",
    "TrainingBatches": "data.batches",
    "UserError": "errors",
    "cross_entropy": "objectives.cross_entropy",
    "load_base": "backbones.loading",
    "load_experiment": "experiment.reading",
    "load_prompt": "inference.prompt",
    "make_examples": "data.datasets",
    "make_mesh": "parallel.mesh",
    "make_task": "data.task",
    "save_prompt": "methods.saved",
    "split": "training.step",
    "train": "training.loop",
    "train_step": "training.step",
}

__all__ = [
    "Base",
    "Callback",
    "DecomposedPrompt",
    "Experiment",
    "FullFineTuning",
    "Generated",
    "Generator",
    "LoRA",
    "Model",
    "Prediction",
    "PrefixTuning",
    "ProgressBar",
    "PromptParam",
    "Record",
    "SoftPrompt",
    "TemplateSettings",
    "TrainedPrompt",
    "TrainingBatches",
    "UserError",
    "__version__",
    "cross_entropy",
    "load_base",
    "load_experiment",
    "load_prompt",
    "make_examples",
    "make_mesh",
    "make_task",
    "save_prompt",
    "split",
    "train",
    "train_step",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("softprompt")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
