"""The session of a run: when to evaluate and save, and how a stopped run resumes.

A run that was stopped at any moment resumes from its newest intact checkpoint and ends
bit for bit as if it had never stopped: every batch is a function of the seed and its
number, and a checkpoint holds everything else.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
from flax import nnx

from softprompt.backbones.batch import Batch
from softprompt.data.examples import Example, data_digest
from softprompt.data.weights import example_weights
from softprompt.errors import Stopped
from softprompt.evaluation.evaluate import EvaluationResult
from softprompt.evaluation.forgetting import forgetting
from softprompt.evaluation.scoring import prepare_model
from softprompt.experiment.schema import Experiment
from softprompt.metrics.named import is_better
from softprompt.objectives.model import Model
from softprompt.parallel.hosts import is_main, result_of_main
from softprompt.runtime.finite import NotFiniteError
from softprompt.runtime.progress import Progress, silent
from softprompt.runtime.signals import StopSignals
from softprompt.storage.checkpoints import Checkpoints
from softprompt.storage.run_folder import write_config
from softprompt.training.best_prompt import BestPrompt
from softprompt.training.callbacks import Callbacks
from softprompt.training.custom import optimizer_record
from softprompt.training.measurement import measure
from softprompt.training.not_finite import step_not_finite, wrong_values
from softprompt.training.preparation import Prepared, training_batches
from softprompt.training.reporting import Reporter, log_message
from softprompt.training.resumption import newest_usable
from softprompt.training.state import RunState, TrainState


class Session:
    """One process's work on a run: everything but the steps, which the caller makes.

    See `loop.train` and `sweep.scheduler`. A session is a context manager, which waits for
    pending writes at the end.

    Args:
      experiment: what to train.
      folder: the run folder, opened by `open_run`.
      prepared: the base model, the data and the method.
      stop: a signal ends an evaluation early.
      callbacks: called after steps and evaluations. They may end the run.
      padded_length: see `TrainState`.
      name: put before log messages; empty for none.
      progress: shows evaluations.

    Attributes:
      state: the arrays.
      run: the state of the run apart from the arrays.
      reporter: logs the run and writes its metrics, samples and summary.
      batches: the training batches.
      rows: number of examples per step.
      steps: number of steps of the whole run; 0 if nothing is trained.

    Raises:
      UserError: if the data does not fill a batch, or if the base model or the data
        changed since the run began.
    """

    def __init__(
        self,
        experiment: Experiment,
        folder: Path,
        prepared: Prepared,
        stop: StopSignals,
        *,
        callbacks: Callbacks | None = None,
        padded_length: int | None = None,
        name: str = "",
        progress: Progress = silent,
    ):
        self.experiment, self.folder, self.name = experiment, folder, name
        self.base, self.task, self.examples = prepared.base, prepared.task, prepared.examples
        self._stop, self._progress = stop, progress
        self._prepared, self._callbacks = prepared, callbacks or Callbacks()
        weights = example_weights(self.examples["train"], experiment.objective.weights)
        self.rows = experiment.training.batch_size * experiment.training.accumulate
        self.batches = training_batches(experiment, prepared, weights)
        self._iterator = self.batches.iterate()
        frozen = self.base.backbone, prepared.teacher
        self.state = TrainState(
            experiment, prepared.method, *frozen, padded_length, prepared.custom
        )
        record = optimizer_record(prepared.custom.optimizer, self.state.trainable)
        self.steps = experiment.training.steps if jax.tree.leaves(self.state.trainable) else 0

        if is_main():
            write_config(folder, experiment)
        self._checkpoints = Checkpoints(folder / "checkpoints", experiment.checkpoints.keep)
        self._best = BestPrompt(experiment, folder, prepared, self.state)
        self.run = RunState(
            self.base.fingerprint,
            data_digest(self.examples),
            prepared.objective_digest(weights),
            record,
        )
        self._resume()
        if names := self.state.names_not_finite():
            raise NotFiniteError(
                f"the initial values of {names[0]} are infinite or NaN; change the settings of "
                f"method {experiment.method}, such as its initialization"
            )
        self.reporter = Reporter(experiment, folder, self.run, name)
        self._saved_step = self.run.step
        self._pending: tuple[dict[str, jax.Array], float] | None = None  # measured, padding
        self._began = time.monotonic() - prepared.seconds - self.run.seconds
        self._last_step_ended = time.monotonic()
        self._parallel_runs = 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def run_due_work(self) -> bool:
        """Evaluate and save if that is due, and return whether there is a next step.

        An evaluation that a signal interrupts leaves no trace.

        Raises:
          CallbackError: if a callback failed, after the state is saved.
        """
        run, evaluation = self.run, self.experiment.evaluation
        every, patience = self.experiment.checkpoints.every, evaluation.patience
        is_due = run.step > 0 and run.step % evaluation.every == 0
        saves = every and run.step % every == 0 and self._saved_step < run.step
        waits = bool(is_due or saves)  # the run waits for the device anyway
        if waits:
            self._finish_step()
        self._follow_callbacks(wait=waits)
        is_last = run.ended or run.step == self.steps
        if run.evaluated < run.step and (is_last or is_due):
            self._evaluate()
            self._follow_callbacks(wait=True)
        elif saves:
            self.save()
        stops_early = patience is not None and run.stale >= patience
        if stops_early and not is_last:
            log_message(self.name, f"no better prompt in {run.stale} evaluations: stopping early")
        if run.ended:
            log_message(self.name, f"a callback ended the run at step {run.step}")
        return not (is_last or stops_early or run.ended)

    def next_inputs(self) -> tuple[Batch, jax.Array]:
        """Return the batch and the random key of the next step."""
        return next(self._iterator), jax.random.fold_in(self.state.key, self.run.step)

    def accept(
        self,
        trainable: nnx.State,
        opt_state: Any,
        measured: dict[str, jax.Array],
        *,
        padding: float,
        parallel_runs: int = 1,
    ) -> None:
        """Accept the results of a step, which may still be running on the device.

        While it runs, the measurements of the previous step are checked and logged.

        Args:
          trainable, opt_state, measured: what `train_step` returned.
          padding: share of padding in the batch.
          parallel_runs: number of runs that made a step at the same time, this one included.

        Raises:
          UserError: if the previous step gave a loss or a gradient that is not finite.
        """
        self.state.trainable, self.state.opt_state = trainable, opt_state
        self._finish_step()
        self._pending, self._parallel_runs = (measured, padding), parallel_runs
        self.run.step += 1

    def save(self) -> None:
        """Save a checkpoint of the state after the last step, unless there is one.

        Raises:
          UserError: if that step gave a loss, a gradient or parameters that are not finite.
        """
        run = self.run
        if self._saved_step == run.step:
            return
        self._finish_step()
        if names := self.state.names_not_finite():
            raise self._not_finite(f"the update made {names[0]} infinite or NaN")
        run.data = self._iterator.get_state()
        run.records = self.reporter.records
        run.seconds = time.monotonic() - self._began
        description = dataclasses.asdict(run) | {"ended": run.ended or self._callbacks.ends}
        self._checkpoints.save(run.step, self.state.saved_arrays(), description, run.best_step)
        self._saved_step = run.step

    def close(self) -> None:
        """Close the metrics, and wait until everything saved is on disk."""
        try:
            self.reporter.close()
        finally:
            self._checkpoints.wait()

    def finish(self) -> dict[str, Any]:
        """Evaluate the best prompt on the test data, if any; write and return the summary."""
        test = forgotten = None
        settings, measures_test = self.experiment.evaluation, "test" in self.examples
        if measures_test or settings.forgetting:
            best = self._best.load(self.run, self._checkpoints)
        if measures_test:
            test = self._measure(best, "test", self._progress)
        if settings.forgetting:
            model, backbone, _ = best
            label = f"{self.name}: forgetting" if self.name else "forgetting"
            forgotten = forgetting(
                model.method,
                backbone,
                self.base,
                batch_size=settings.batch_size,
                label=label,
                progress=self._progress,
            )
        return self.reporter.summary(self.state, time.monotonic() - self._began, test, forgotten)

    def _resume(self) -> None:
        """Resume from the newest checkpoint that can be used."""
        checkpoints, began = self._checkpoints, self.run
        chosen = result_of_main(
            lambda: newest_usable(
                checkpoints, self.folder, began, self._prepared, self._best.step, self.name
            )
        )
        if chosen is not None:
            self.run = RunState(**chosen)
            if self.run.optimizer != began.optimizer:
                log_message(
                    self.name,
                    "the optimizer computes other updates than before; to get the result of an "
                    "uninterrupted run, pass the same optimizer and use the same version of Optax",
                )
            self.run.optimizer = began.optimizer
            shapes = self.state.saved_shapes()
            self.state.restore(self._checkpoints.load(self.run.step, shapes))
            self._iterator.set_state(self.run.data)
            log_message(self.name, f"resuming from step {self.run.step}")

    def _finish_step(self) -> None:
        """Wait for the pending step, check that its results are finite, and report them."""
        if self._pending is None:
            return
        arrays, padding = self._pending
        self._pending = None
        measured = {name: float(value) for name, value in arrays.items()}
        self._require_finite(measured)
        now = time.monotonic()
        seconds = (now - self._last_step_ended) / self._parallel_runs
        self._last_step_ended = now
        rate = self.state.learning_rate(self.run.step - 1)
        if rate is not None:
            measured["learning_rate"] = rate
        self.reporter.step(measured, padding, seconds)
        self._callbacks.on_step(self.run.step, measured)

    def _follow_callbacks(self, *, wait: bool) -> None:
        """End the run if a callback asks for it. If one failed, save the state and raise.

        Args:
          wait: see `Callbacks.decision`.
        """
        ends, error = self._callbacks.decision(wait=wait)
        self.run.ended |= ends
        if error:
            self.save()
            raise error

    def _evaluate(self) -> None:
        """Evaluate the current prompt, save the state, and keep the prompt if it is the best."""
        self._finish_step()
        try:
            model = self.state.model()
            adapted = model, *prepare_model(model.method, model.backbone)
            result = self._measure(adapted, "validation", self._stop.watched(self._progress))
        except Stopped:
            return
        except NotFiniteError as error:
            raise self._not_finite(f"validation: {error}") from None
        run, metric = self.run, self.experiment.evaluation.metric
        metrics = result.values()
        self._require_finite(metrics, "validation ")
        is_best = not run.best_metrics or is_better(metrics, run.best_metrics, metric)
        if is_best:
            run.best_step, run.best_metrics = run.step, metrics
        run.stale = 0 if is_best else run.stale + 1
        run.evaluated = run.step
        answers = not self.task.labels and not self.task.template.text
        self.reporter.validation(result, best=is_best, free_text=answers)
        self._callbacks.on_evaluation(run.step, metrics)
        self.save()
        if is_best:
            self._checkpoints.wait()
            self._best.save(self.state.trainable, run)
        self._last_step_ended = time.monotonic()

    def _measure(
        self, model: tuple[Model, Any, Any], split: str, progress: Progress
    ) -> EvaluationResult:
        """Measure a model on the validation or the test data."""
        settings = self.experiment.evaluation
        examples: Sequence[Example] = self.examples[split]
        generated: int | None = settings.samples
        if split == "validation":
            examples = examples[: settings.examples]
        elif settings.samples:
            generated = None
        taught = self._prepared.taught.get(split)
        return measure(
            self.experiment,
            self.task,
            examples,
            self.state.program["objective"],
            model,
            f"{self.name}: {split}" if self.name else split,
            progress,
            max_generated=generated,
            taught=taught,
        )

    def _require_finite(self, values: Mapping[str, float], kind: str = "") -> None:
        if wrong := wrong_values(values, kind):
            raise self._not_finite(wrong)

    def _not_finite(self, what: str) -> NotFiniteError:
        """The error about a value after a step, with what to change."""
        alone = not self.name
        return step_not_finite(self.experiment, self.run.step, what, self._checkpoints, alone=alone)
