"""How a trial ended: `trial.json` in its run folder."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import pydantic

from softprompt.errors import UserError
from softprompt.files.json_files import read_json
from softprompt.files.writing import write_file
from softprompt.storage.run_folder import read_metrics

_FILE = "trial.json"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The end of a trial. A trial with an outcome is not run again.

    Attributes:
      state: `finished`; `pruned`, because other trials were better; or `failed`.
      step: the last step; None if the trial failed before its first step.
      error: why it failed.
    """

    state: Literal["finished", "pruned", "failed"]
    step: Annotated[int, pydantic.Field(ge=0, lt=2**63)] | None
    error: str | None = None

    def write(self, folder: Path) -> None:
        """Write the outcome into the run folder of the trial."""
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / _FILE, json.dumps(dataclasses.asdict(self)) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Outcome | None":
        """Read the outcome of a trial. Return None if it has not ended.

        Raises:
          UserError: if the file is damaged.
        """
        path = folder / _FILE
        if not path.exists():
            return None
        try:
            return _OUTCOME.validate_python(read_json(path))
        except (UserError, pydantic.ValidationError):
            raise UserError(f"{path}: damaged; delete it to continue the trial") from None


_OUTCOME = pydantic.TypeAdapter(Outcome)


def validation_at(folder: Path, step: int) -> dict[str, float] | None:
    """Return the validation metrics of a run at a step, or None if there was no evaluation."""
    for record in read_metrics(folder):
        if record["step"] == step and record["split"] == "validation":
            return record
    return None
