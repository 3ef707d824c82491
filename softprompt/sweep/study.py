"""Trials that Optuna chooses, shared by all processes that work on one sweep.

Optuna keeps the trials and their results in a journal in the folder or in a database. If a
process dies, the next process that asks for a trial takes its trial over and resumes it from
its checkpoint.
"""

import contextlib
import json
import secrets
import time
from collections.abc import Mapping
from typing import Any

from softprompt.errors import UserError, reason_of
from softprompt.experiment.metric_names import lower_is_better
from softprompt.files.reading import read_text
from softprompt.files.writing import write_file
from softprompt.storage.locks import file_lock
from softprompt.sweep.outcome import Outcome
from softprompt.sweep.results import measured
from softprompt.sweep.scheduler import OpenedTrial
from softprompt.sweep.space import Range, Space, Trial, Value


class Study:
    """An Optuna study as a source of trials.

    TPE chooses the values (Bergstra et al. 2011). At a rung of `halving`, a trial continues
    if it is among the best n / factor (rounded up) of the n trials that have reached the
    rung so far.

    Args:
      space: the sweep.

    Raises:
      UserError: if Optuna is not installed, or its storage cannot be opened.
    """

    def __init__(self, space: Space):
        try:
            import optuna
        except ImportError:
            raise UserError(
                "how: tpe needs Optuna: pip install 'softprompt[search]' (in a clone: '.[search]')"
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._space = optuna, space
        experiment = space.file.experiment()
        self._metric, self._seed = experiment.evaluation.metric, experiment.seed
        named = space.folder / "study.txt"  # several folders can share a database
        with self._exclusive():
            name = f"{experiment.name}-{secrets.token_hex(4)}"
            self._study = optuna.create_study(
                storage=self._storage(),
                study_name=read_text(named).strip() if named.exists() else name,
                direction="minimize" if lower_is_better(self._metric) else "maximize",
                load_if_exists=True,
            )
            if not named.exists():
                write_file(named, f"{name}\n")

    def next(self) -> OpenedTrial | None:
        """Return an abandoned trial or a new one, or None if all trials have been started."""
        with self._exclusive():
            for frozen in self._study.get_trials(states=[self._optuna.trial.TrialState.RUNNING]):
                opened = self._opened(self._optuna.trial.Trial(self._study, frozen._trial_id))
                if opened is None:
                    continue
                if (outcome := Outcome.read(opened.trial.folder)) is None:
                    return opened
                self._tell(opened.trial, outcome)  # its process died before it could
                opened.close()
            if len(self._study.get_trials(deepcopy=False)) >= (self._space.sweep.trials or 0):
                return None
            return self._opened(self._study.ask())

    def _opened(self, asked: Any) -> OpenedTrial | None:
        """Choose the values of a trial that are not chosen yet, and lock its folder."""
        # A trial has the same seed in whatever process it runs.
        self._study.sampler = self._optuna.samplers.TPESampler(
            seed=(self._seed + asked.number) % 2**32, constant_liar=True
        )
        for name, values in self._space.sweep.parameters.items():
            _suggest(asked, name, values)
        try:
            return OpenedTrial.lock(self._trial(asked.number, asked.params))
        except UserError:
            self._study.tell(asked.number, state=self._optuna.trial.TrialState.FAIL)
            raise

    def continues(self, trial: Trial, step: int, measured: Mapping[str, float]) -> bool:
        """Report an evaluation. At a rung, return whether the trial is among the best."""
        halving, value = self._space.sweep.halving, measured[self._metric]
        with self._exclusive():
            frozen = self._study.get_trials(deepcopy=False)[trial.number]
            if step not in frozen.intermediate_values:  # otherwise a process that died reported it
                self._optuna.trial.Trial(self._study, frozen._trial_id).report(value, step)
            if halving is None or step not in halving.rungs:
                return True
            reached = [
                each.intermediate_values[step]
                for each in self._study.get_trials(deepcopy=False)
                if step in each.intermediate_values
            ]
        sign = 1 if lower_is_better(self._metric) else -1
        better = sum(sign * other < sign * value for other in reached)
        return better < -(-len(reached) // halving.factor)

    def ended(self, trial: Trial, outcome: Outcome) -> None:
        """Report the outcome to Optuna."""
        with self._exclusive():
            self._tell(trial, outcome)

    def trials(self) -> list[Trial]:
        """Return all trials whose values have been chosen, by any process."""
        found, names = self._study.get_trials(deepcopy=False), set(self._space.sweep.parameters)
        return [self._trial(each.number, each.params) for each in found if names <= {*each.params}]

    def steps_done(self) -> int:
        """Return the number of scheduled steps of all trials that have ended."""
        ended = [trial for trial in self.trials() if Outcome.read(trial.folder)]
        return sum(trial.experiment.training.steps for trial in ended)

    def _tell(self, trial: Trial, outcome: Outcome) -> None:
        states = self._optuna.trial.TrialState
        if outcome.state == "finished":
            values = measured(trial)
            assert values is not None
            self._study.tell(trial.number, values[self._metric], skip_if_finished=True)
        else:
            state = states.PRUNED if outcome.state == "pruned" else states.FAIL
            self._study.tell(trial.number, state=state, skip_if_finished=True)

    def _trial(self, number: int, chosen: Mapping[str, Any]) -> Trial:
        parameters = self._space.sweep.parameters
        parameter_values = {
            name: chosen[name] if isinstance(values, Range) else json.loads(chosen[name])
            for name, values in parameters.items()
        }
        return self._space.trial(number, parameter_values)

    def _storage(self) -> Any:
        url, optuna = self._space.sweep.storage, self._optuna
        if url is None:
            journal = optuna.storages.journal.JournalFileBackend(
                str(self._space.folder / "study.journal")
            )
            return optuna.storages.JournalStorage(journal)
        for last in (False, True):
            try:
                return optuna.storages.RDBStorage(url)
            except Exception as error:  # the database's driver decides what it raises
                if last:
                    raise UserError(f"sweep.storage: {url}: {reason_of(error)}") from None
                time.sleep(1)  # another sweep may be creating the same database

    def _exclusive(self) -> contextlib.AbstractContextManager[None]:
        """Keep other processes of the sweep from using the study."""
        return file_lock(self._space.folder / ".study.lock")


def _suggest(asked: Any, name: str, values: list[Value] | Range) -> None:
    if not isinstance(values, Range):
        asked.suggest_categorical(name, [json.dumps(value) for value in values])
    elif values.whole:
        asked.suggest_int(name, values.low, values.high, log=values.log)
    else:
        asked.suggest_float(name, float(values.low), float(values.high), log=values.log)
