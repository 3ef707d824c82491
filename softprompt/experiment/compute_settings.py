"""The section `compute` of an experiment: how the base model is stored, run and divided.

The descriptions are also the configuration reference of the documentation.
"""

from typing import Any, Literal, Self

import pydantic
from pydantic import Field

from softprompt.errors import shortened
from softprompt.experiment.sections import Section

Quantization = Literal["int8", "int4"]


class MeshSettings(Section):
    """How many devices the work is divided over, along three axes.

    One of them may be -1, for all remaining devices.
    """

    data: int = Field(default=1, ge=-1, le=100_000, description="Devices that divide the rows.")
    fsdp: int = Field(
        default=1,
        ge=-1,
        le=100_000,
        description="Devices that divide the rows and the weights. Each layer gathers its weights "
        "when it runs.",
    )
    model: int = Field(
        default=1,
        ge=-1,
        le=100_000,
        description="Devices that divide attention heads, feed-forward layers and the vocabulary.",
    )

    @pydantic.model_validator(mode="after")
    def _check_sizes(self) -> Self:
        sizes = dict(self)
        for name, size in sizes.items():
            if size == 0:
                raise ValueError(f"{name}: must be 1 or more, or -1 for all remaining devices")
        if [*sizes.values()].count(-1) > 1:
            raise ValueError("only one axis can be -1")
        return self


class ComputeSettings(Section):
    """How the frozen base model is stored and run."""

    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Type of parameters and activations. Norms, softmax and loss are always "
        "computed in float32.",
    )
    quantize: Quantization | None = Field(
        default=None,
        description="Store the weight matrices in fewer bits: `int8` with one scale per output "
        "channel, `int4` with a scale and an offset per group of 32 inputs.",
    )
    attention: Literal["auto", "xla", "cudnn", "pallas"] = Field(
        default="auto",
        description="Implementation of attention: by XLA, or by a kernel that never stores all "
        "scores, `cudnn` on one NVIDIA GPU or `pallas` on TPUs. `auto` selects the kernel if a "
        "test run agrees with XLA, and `xla` otherwise.",
    )
    mesh: MeshSettings | None = Field(
        default=None,
        description="The devices to use, such as `{data: 4, model: 2}`; `null` for one device.",
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _read_former_key(cls, values: Any) -> Any:
        """Read `int8: true`, which earlier versions wrote, as `quantize: int8`."""
        if not isinstance(values, dict) or not isinstance(values.get("int8"), bool):
            return values
        kept = {key: value for key, value in values.items() if key != "int8"}
        if values["int8"]:
            if kept.get("quantize", "int8") not in ("int8", None):
                raise ValueError(f"int8: true and quantize: {shortened(kept['quantize'])} differ")
            kept["quantize"] = "int8"
        return kept
