"""The section `data` of an experiment: where the records of each split come from."""

from typing import Annotated, Any, Self

import pydantic
from pydantic import Field

from softprompt.experiment.sections import Section, require_path


def _require_source(value: Any) -> str | list[str]:
    """Reject what is neither a path nor a list of paths."""
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError("a source is a path or a list of paths")
    for text in texts:
        require_path(text)
        if not text:
            raise ValueError("the path is empty")
    return value


def _require_source_or_share(value: Any) -> str | list[str] | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _require_source(value)
    if not 0 < value < 1:
        raise ValueError("a share of the training data is a number between 0 and 1")
    return value


Source = Annotated[str | list[str], pydantic.BeforeValidator(_require_source)]
_Share = Annotated[float, Field(gt=0, lt=1)]
SourceOrShare = Annotated[
    str | list[str] | _Share, pydantic.BeforeValidator(_require_source_or_share)
]


class DataSettings(Section):
    """Where the data comes from.

    A source is a file: `.jsonl` with one JSON object per line, `.csv` with a header, `.parquet`
    (needs `pyarrow`), or `.txt`, which is one record with the field `text`. It can also be a folder
    of such files, a pattern such as `data/*.jsonl`, a folder that `save_to_disk` of `datasets`
    wrote, or `hub:NAME#SPLIT` for a dataset on the Hugging Face Hub. A list of sources is read one
    after another.

    Validation and test data can be a share of the training data, such as `0.1`. The seed of the
    experiment chooses it. Records with the same fields are never in two splits.
    """

    train: Source = Field(description="Training data.")
    validation: SourceOrShare = Field(
        description="Validation data, by which the best prompt is chosen."
    )
    test: SourceOrShare | None = Field(
        default=None, description="Test data, on which the best prompt is evaluated at the end."
    )

    @property
    def sources(self) -> dict[str, str | list[str]]:
        """The sources of the splits that have one of their own."""
        return {split: value for split, value in self if isinstance(value, str | list)}

    @property
    def shares(self) -> dict[str, float]:
        """The shares of the training data that are other splits."""
        return {split: value for split, value in self if isinstance(value, float)}

    @pydantic.model_validator(mode="after")
    def _check_shares(self) -> Self:
        if sum(self.shares.values()) >= 1:
            raise ValueError("the shares of validation and test must be less than 1 together")
        return self
