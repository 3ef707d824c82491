"""Run cases, and judge what happened."""

import dataclasses
import re
import shlex
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

from attack.cases import Case, cases
from attack.sandbox import Sandbox
from attack.worker import LIMIT_BYTES, LIMIT_SECONDS, Outcome, Worker

_LONGEST_LINE = 3000  # characters of an error message
_MOST_LINES = 21
# An experiment reports all its mistakes together, one line each, and the first 20 of many.
_SEVERAL_LINES = ("experiment", "overrides", "sweep", "run folder")


@dataclasses.dataclass(frozen=True)
class Fault:
    """A case that the product handled wrongly.

    Attributes:
      case: the case.
      name: the kind of fault, such as `traceback`.
      detail: what is worth reading.
    """

    case: Case
    name: str
    detail: str

    def __str__(self) -> str:
        return (
            f"{self.name} [{self.case.kind}] {shlex.join(self.case.arguments)[:300]}\n{self.detail}"
        )


def attack(
    kind: str,
    count: int,
    seed: int,
    good: Path,
    place: Path,
    worker: Worker,
) -> list[tuple[Outcome, Fault | None]]:
    """Run `count` cases of one kind, and return what happened to each.

    Args:
      kind: a key of `KINDS`.
      count: the number of cases.
      seed: of the random choices.
      good: the folder of the good input.
      place: a folder to work in; its content is replaced.
      worker: runs the commands.
    """
    sandbox = Sandbox(good, place)
    results: list[tuple[Outcome, Fault | None]] = []

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases(kind, good))
    def one(case: Case) -> None:
        sandbox.prepare(case.files)
        outcome = worker.run(case.arguments, sandbox.folder)
        results.append((outcome, judge(case, outcome, sandbox.changes(case.arguments))))

    one()
    return results


def judge(case: Case, outcome: Outcome, changes: list[str]) -> Fault | None:
    """Return the fault of a case, or None.

    Args:
      case: the case.
      outcome: what its command did.
      changes: files that changed outside of the folder for output.
    """
    lines = [line for line in outcome.errors.splitlines() if line.strip()]
    end = "\n".join(lines[-6:])[-1500:]
    if outcome.failure:
        return Fault(case, outcome.failure, f"after {outcome.seconds:.1f} s")
    if "Traceback" in outcome.errors or "panicked" in outcome.errors:
        return Fault(case, "traceback", end)
    if outcome.seconds > LIMIT_SECONDS:
        return Fault(case, "hang", f"{outcome.seconds:.1f} s; {end}")
    if outcome.peak > LIMIT_BYTES:
        return Fault(case, "memory", f"{outcome.peak / 2**30:.1f} GiB; {end}")
    if outcome.status not in (0, 1):
        return Fault(case, "status", f"{outcome.status}; {end}")
    not_numbers = set(re.findall(r"\b(NaN|nan|Infinity)\b", outcome.output))
    if outcome.status == 0 and not_numbers - set(case.arguments):  # a folder may be called nan
        return Fault(case, "NaN", outcome.output[:500])
    if outcome.status == 1 and not lines:
        return Fault(case, "silence", "status 1 without a message")
    if outcome.status == 1 and len(lines) > (_MOST_LINES if case.kind in _SEVERAL_LINES else 1):
        return Fault(case, "several lines", end)
    if any(len(line) > _LONGEST_LINE for line in lines):
        return Fault(case, "long line", end[:500])
    if changes:
        return Fault(case, "changed files", ", ".join(changes[:10]))
    return None
