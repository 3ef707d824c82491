"""The section `optimizer` of an experiment: the update rule and its schedule.

The descriptions are also the configuration reference of the documentation.
"""

from typing import Any, Literal, Self

import pydantic
from pydantic import Field

from softprompt.experiment.sections import LARGEST_FLOAT32, Section


class OptimizerSettings(Section):
    """The update rule and its schedule."""

    name: Literal["adamw", "adafactor", "sgd", "lion", "custom"] = Field(
        default="adamw",
        description="Update rule. `sgd` has a momentum of 0.9. `custom` stands for an Optax "
        "optimizer that Python code passed to `train`; it has no other keys.",
    )
    learning_rate: float = Field(
        default=2e-2,
        gt=0,
        le=LARGEST_FLOAT32,
        description="Peak learning rate, reached after the warm-up. The default depends on the "
        "method.",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine",
        description="Learning rate after the warm-up: constant, or falling to 0 at the last step "
        "along a straight line or a cosine.",
    )
    warmup_steps: int = Field(
        default=0,
        ge=0,
        le=1_000_000_000,
        description="Steps in which the learning rate rises linearly to its peak.",
    )
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        le=1_000_000,
        description="Each update also shrinks the trained parameters by this factor times the "
        "learning rate.",
    )
    clip_norm: float | None = Field(
        default=1.0,
        gt=0,
        le=LARGEST_FLOAT32,
        description="Maximum norm of the whole gradient; `null` for no clipping.",
    )

    @pydantic.model_validator(mode="after")
    def _require_name_only(self) -> Self:
        if self.name == "custom" and (more := sorted(self.model_fields_set - {"name"})):
            raise ValueError(f"{more[0]} cannot be used with a custom optimizer; leave it out")
        return self

    @pydantic.model_serializer(mode="wrap")
    def _written(self, handler: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"name": self.name} if self.name == "custom" else handler(self)
