"""The results of a sweep: its trials, ranked by the deciding metric."""

from collections.abc import Sequence
from typing import Any

from softprompt.metrics.named import merit
from softprompt.storage.run_folder import read_summary
from softprompt.sweep.outcome import Outcome, validation_at
from softprompt.sweep.space import Trial, format_value


def measured(trial: Trial) -> dict[str, float] | None:
    """The validation metrics of an ended trial, or None if there are none.

    For a finished trial these are the best of the run; for a pruned trial, those at the step
    where it was pruned.
    """
    outcome = Outcome.read(trial.folder)
    if outcome is None or outcome.step is None:
        return None
    if outcome.state == "finished":
        values = (read_summary(trial.folder) or {}).get("validation", {})
    else:
        values = validation_at(trial.folder, outcome.step) or {}
    return values if trial.experiment.evaluation.metric in values else None


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """The trials, best first.

    Finished trials come before the others. Pruned trials with more steps come before those
    with fewer steps.
    """

    def key(trial: Trial) -> tuple[bool, int, tuple[float, float]]:
        outcome, values = Outcome.read(trial.folder), measured(trial)
        if outcome is None or values is None:
            return False, -1, (0.0, 0.0)
        finished = outcome.state == "finished"
        quality = merit(values, trial.experiment.evaluation.metric)
        return finished, 0 if finished else outcome.step or 0, quality

    return sorted(trials, key=key, reverse=True)


def results_rows(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """One row per trial, best first: its parameters, how it ended, and the deciding metric.

    Values that do not exist are None: a parameter of other trials, the step and the metric of
    a trial that is running or has failed.
    """
    metric = trials[0].experiment.evaluation.metric
    names = list(dict.fromkeys(name for trial in trials for name in trial.parameters))
    rows = []
    for trial in ranked(trials):
        outcome, values = Outcome.read(trial.folder), measured(trial)
        parameters = {
            name: format_value(trial.parameters[name]) if name in trial.parameters else None
            for name in names
        }
        rows.append(
            {
                "trial": trial.number,
                **parameters,
                "end": outcome.state if outcome else "running",
                "step": outcome.step if outcome else None,
                f"validation {metric}": values[metric] if values else None,
            }
        )
    return rows
