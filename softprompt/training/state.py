"""Where a run stands, as every checkpoint has it."""

import dataclasses
from typing import Any


@dataclasses.dataclass
class RunState:
    """Where a run stands, apart from its arrays; part of every checkpoint.

    Attributes:
      base, examples: digests of the base model and of all tokenised data, which must be
        the same when the run goes on.
      step: updates made.
      data: state of the iterator over training batches.
      evaluated: the last step whose prompt was evaluated; -1 if none was.
      best_step, best_metrics: of the best prompt so far.
      stale: evaluations since then.
      records: written to the metrics.
      losses, padding: of each step since the last record of the metrics.
      seconds: spent on this run; `step_seconds`, on its steps alone; `logged_seconds`,
        `step_seconds` at the last record of the metrics.
    """

    base: str
    examples: str
    step: int = 0
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    evaluated: int = -1
    best_step: int = 0
    best_metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    stale: int = 0
    records: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    padding: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    step_seconds: float = 0.0
    logged_seconds: float = 0.0
