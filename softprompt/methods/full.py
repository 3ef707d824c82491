"""Full fine-tuning: every parameter of the backbone is trained."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx

from softprompt.backbones.loading import Backbone
from softprompt.experiment.schema import Experiment
from softprompt.methods.backbone_arrays import parameters_of, with_parameters
from softprompt.methods.method import Method


class FullFineTuning(Method):
    """Train the whole backbone. The method itself holds no arrays.

    Args:
      opening: see `Method`.

    Examples:
      >>> base = load_base("smollm2-135m-instruct")
      >>> backbone = nnx.clone(base.backbone)  # `train_step` donates what it trains
      >>> graphdef, trainable, frozen = split(FullFineTuning(), backbone)
    """

    name: ClassVar[str] = "full"
    label: ClassVar[str] = "full fine-tuning"
    default_learning_rate: ClassVar[float | None] = 5e-5
    trainable: ClassVar[Any] = nnx.Param
    keeps_backbone: ClassVar[bool] = False

    @classmethod
    def check(cls, experiment: Experiment) -> None:
        """Reject quantized matrices, which have no gradient."""
        if kind := experiment.compute.quantize:
            raise ValueError(f"method: full cannot train {kind} matrices; lora can")

    def adapt(self, backbone: Backbone, key: jax.Array | None = None) -> Backbone:
        """Return a view of the backbone that says that its layers are trained."""
        view = nnx.merge(*nnx.split(backbone))
        view.trained = True
        return view

    def arrays(self, backbone: Backbone) -> dict[str, jax.Array]:
        """Return the parameters of the backbone by their paths."""
        return parameters_of(backbone)

    def description(self, arrays: Mapping[str, jax.Array]) -> dict[str, Any]:
        """Return nothing: the base model determines names and shapes."""
        return {}

    @classmethod
    def saved_form(cls, description: Mapping[str, Any], backbone: Backbone) -> dict[str, Any]:
        """Return the parameters of the base model, which the saved ones replace."""
        return dict(parameters_of(backbone))

    def restore(self, backbone: Backbone, arrays: Mapping[str, jax.Array]) -> Backbone:
        """Return a backbone with the trained parameters."""
        return with_parameters(backbone, arrays)

    def merge_into(self, backbone: Backbone, adapted: Backbone) -> tuple[Backbone, np.ndarray]:
        """Return the trained backbone and no vectors."""
        return adapted, np.zeros((0, backbone.arch.hidden_size), np.float32)
