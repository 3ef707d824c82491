"""The table of methods: the class for every value of `method:` in an experiment.

Classes are imported when they are first used, because they need JAX and this package does not.
"""

import importlib
from typing import Any

METHODS = {
    "prompt": "softprompt.methods.soft_prompt:SoftPrompt",
    "prefix": "softprompt.methods.prefix_tuning:PrefixTuning",
    "dept": "softprompt.methods.dept:DecomposedPrompt",
    "lora": "softprompt.methods.lora:LoRA",
    "full": "softprompt.methods.full:FullFineTuning",
    "none": "softprompt.methods.zero_shot:ZeroShot",
}


def method_class(name: str) -> Any:
    """Return the class of a method, a subclass of `softprompt.methods.method.Method`.

    Raises:
      ValueError: if there is no method of this name.
    """
    require_method(name)
    module, _, attribute = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def require_method(name: str) -> str:
    """Return the name of a method; raise a `ValueError` that lists all names if it is not one."""
    if name not in METHODS:
        *others, last = map(repr, METHODS)
        raise ValueError(f"Input should be {', '.join(others)} or {last}")
    return name
