"""How a trial ended: `trial.json` in the folder of its run."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import pydantic

from softprompt.errors import UserError
from softprompt.storage.files import write_file
from softprompt.storage.run_folder import read_metrics

_FILE = "trial.json"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The end of a trial, that is not run again.

    Attributes:
      state: `finished`; `pruned`, worse than others at a rung; or `failed`.
      step: of the end; None if it failed before the first.
      error: why it failed.
    """

    state: Literal["finished", "pruned", "failed"]
    step: int | None
    error: str | None = None

    def write(self, folder: Path) -> None:
        """Keep it in a trial's folder."""
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / _FILE, json.dumps(dataclasses.asdict(self)) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Outcome | None":
        """That of a trial, or None if it has not ended.

        Raises:
          UserError: if the file is damaged.
        """
        path = folder / _FILE
        try:
            return _OUTCOME.validate_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError):
            raise UserError(f"{path}: damaged; delete it to go on with the trial") from None


_OUTCOME = pydantic.TypeAdapter(Outcome)


def validation_at(folder: Path, step: int) -> dict[str, float] | None:
    """What a run's evaluation after a step measured, or None if there was none."""
    for record in read_metrics(folder):
        if record["step"] == step and record["split"] == "validation":
            return record
    return None
