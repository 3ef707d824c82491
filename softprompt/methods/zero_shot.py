"""The base model alone: the template, and solved examples if the experiment asks for them.

In-context learning (Brown et al. 2020, arXiv:2005.14165). The baseline of every other method.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from softprompt.backbones.loading import Backbone
from softprompt.methods.method import Axes, Method


class ZeroShot(Method):
    """A method that learns nothing."""

    name: ClassVar[str] = "none"
    label: ClassVar[str] = "base model alone"
    is_pure_prefix: ClassVar[bool] = True

    @classmethod
    def saved_axes(cls, description: Mapping[str, Any], backbone: Backbone) -> Mapping[str, Axes]:
        """Return nothing: no array is saved."""
        return {}
