"""Sections of an experiment that belong to one method each: keys, defaults and limits.

The descriptions are also the configuration reference of the documentation.
"""

from typing import Literal, Self

import pydantic
from pydantic import Field

from softprompt.experiment.sections import LARGEST_FLOAT32, PathText, Section


class InitializationSettings(Section):
    """Initial values of virtual tokens."""

    init: Literal["vocabulary", "random", "text", "labels", "teacher", "prompts"] = Field(
        default="vocabulary",
        description="Initial vectors. `vocabulary`: embeddings of tokens drawn from the `init_top` "
        "lowest ids. `random`: normal, with the mean of the embedding table and `init_scale` times "
        "its standard deviation. `text`: embeddings of `init_text`, repeated or truncated. "
        "`labels`: one vector per label, then as `vocabulary`. `teacher`: embeddings of the first "
        "tokens that the teacher of `objective: distill` reads. `prompts`: the mean of "
        "`init_prompts`.",
    )
    init_top: int = Field(
        default=5000,
        ge=1,
        le=10_000_000,
        description="For `init: vocabulary`: number of token ids to draw from.",
    )
    init_scale: float = Field(
        default=1.0,
        ge=0,
        le=1_000_000,
        description="For `init: random`: factor of the embedding table's standard deviation.",
    )
    init_text: str | None = Field(default=None, description="For `init: text`: the text.")
    init_prompts: list[PathText] | None = Field(
        default=None,
        min_length=1,
        max_length=1000,
        description="For `init: prompts`: run folders of trained soft prompts of the same length.",
    )

    @pydantic.model_validator(mode="after")
    def _check_init(self) -> Self:
        for init in ("text", "prompts"):
            if (self.init == init) != bool(getattr(self, f"init_{init}")):
                raise ValueError(f"init: {init} and init_{init} must be set together")
        return self


class PromptSettings(InitializationSettings):
    """The soft prompt of `method: prompt` and `method: dept`."""

    length: int = Field(default=20, ge=1, le=100_000, description="Number of virtual tokens.")
    reparametrization: Literal["mlp", "lstm", "residual", "low_rank", "multitask"] | None = Field(
        default=None,
        description="Network that produces the vectors during training: `mlp` or `lstm` "
        "(P-tuning), `residual`, `low_rank`, or `multitask` (a shared prompt times a matrix of "
        "rank 1 per task). `null` trains the vectors themselves.",
    )
    size: int | None = Field(
        default=None,
        ge=1,
        le=100_000,
        description="Size of the network's hidden layer, or the rank of `low_rank`. The default is "
        "128 for `mlp` and `lstm`, 800 for `residual` and 10 for `low_rank`.",
    )
    tasks: list[str] | None = Field(
        default=None,
        min_length=1,
        max_length=10_000,
        description="For `multitask`: the names of the tasks.",
    )
    task_field: str = Field(
        default="task", description="For `multitask`: the field of a record that names its task."
    )

    @pydantic.model_validator(mode="after")
    def _check_reparametrization(self) -> Self:
        if (self.reparametrization == "multitask") != bool(self.tasks):
            raise ValueError("reparametrization: multitask and tasks must be set together")
        if self.tasks and len(set(self.tasks)) < len(self.tasks):
            raise ValueError("tasks: a name is given twice")
        if self.size is not None and self.reparametrization in (None, "multitask"):
            raise ValueError("size needs reparametrization: mlp, lstm, residual or low_rank")
        return self


class PrefixSettings(InitializationSettings):
    """Prefix tuning. The model computes the initial keys and values from the initial vectors."""

    length: int = Field(default=20, ge=1, le=100_000, description="Number of virtual tokens.")
    frozen: int = Field(
        default=0,
        ge=0,
        le=100_000,
        description="Number of virtual tokens at the start that keep their initial keys and "
        "values.",
    )
    size: int | None = Field(
        default=None,
        ge=1,
        le=100_000,
        description="Size of the hidden layer of a network that produces the change in keys and "
        "values during training. `null` trains the keys and values themselves.",
    )

    @pydantic.model_validator(mode="after")
    def _check_frozen(self) -> Self:
        if self.frozen >= self.length:
            raise ValueError(
                f"frozen: {self.frozen} of {self.length} virtual tokens are frozen, so nothing is "
                f"trained; set frozen to at most {self.length - 1}"
            )
        return self


class DePTSettings(Section):
    """Offsets of the input embeddings for `method: dept`. `prompt` describes its short prompt."""

    rank: int = Field(default=8, ge=1, le=100_000, description="Rank of the matrix of offsets.")
    positions: int = Field(
        default=256,
        ge=1,
        le=1_000_000,
        description="Number of positions of an input that have an offset.",
    )
    learning_rate: float = Field(
        default=1e-3,
        gt=0,
        le=LARGEST_FLOAT32,
        description="Learning rate of the offsets. The prompt uses `optimizer.learning_rate`.",
    )


class LoRASettings(Section):
    """Low-rank additions to weight matrices for `method: lora`."""

    rank: int = Field(default=8, ge=1, le=100_000, description="Rank of the additions.")
    alpha: float = Field(
        default=16.0,
        gt=0,
        le=1_000_000,
        description="The additions are multiplied by `alpha` / `rank`.",
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Dropout rate of the additions' inputs in training."
    )
    targets: list[str] = Field(
        default=["attention.query", "attention.value"],
        min_length=1,
        max_length=1000,
        description="Matrices to adapt, as patterns of their paths in the backbone, such as "
        "`attention.query`, `feed_forward.*` or `*`. The beginning of a path may be omitted.",
    )
