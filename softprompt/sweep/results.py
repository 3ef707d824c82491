"""What a sweep gave, as a table."""

from collections.abc import Sequence

from softprompt.metrics.named import merit
from softprompt.report.tables import aligned
from softprompt.storage.run_folder import read_summary
from softprompt.sweep.outcome import Outcome, validation_at
from softprompt.sweep.space import Trial, format_value


def measured(trial: Trial) -> dict[str, float] | None:
    """The best validation metrics of a finished trial, or those at which one was left."""
    outcome = Outcome.read(trial.folder)
    if outcome is None or outcome.step is None:
        return None
    if outcome.state == "finished":
        values = (read_summary(trial.folder) or {}).get("validation", {})
    else:
        values = validation_at(trial.folder, outcome.step) or {}
    return values if trial.experiment.evaluation.metric in values else None


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """The trials, the best one first; behind the finished ones, those that came further first."""

    def key(trial: Trial) -> tuple[bool, int, tuple[float, float]]:
        outcome, values = Outcome.read(trial.folder), measured(trial)
        if outcome is None or values is None:
            return False, -1, (0.0, 0.0)
        finished = outcome.state == "finished"
        how_good = merit(values, trial.experiment.evaluation.metric)
        return finished, 0 if finished else outcome.step or 0, how_good

    return sorted(trials, key=key, reverse=True)


def results_table(trials: Sequence[Trial]) -> str:
    """A line for each trial: its parameters, its end, and the deciding metric."""
    metric = trials[0].experiment.evaluation.metric
    names = list(dict.fromkeys(name for trial in trials for name in trial.parameters))
    rows = [["trial", *names, "end", "step", f"validation {metric}"]]
    for trial in ranked(trials):
        outcome, values = Outcome.read(trial.folder), measured(trial)
        given = [format_value(trial.parameters[n]) if n in trial.parameters else "-" for n in names]
        rows.append(
            [
                str(trial.number),
                *given,
                outcome.state if outcome else "running",
                str(outcome.step) if outcome and outcome.step is not None else "-",
                f"{values[metric]:.4f}" if values else "-",
            ]
        )
    return "\n".join("  ".join(line).rstrip() for line in aligned(rows))
