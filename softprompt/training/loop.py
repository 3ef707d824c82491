"""The main loop: train one experiment in one folder, from its data to a prompt."""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax

from softprompt.data.records import Rows
from softprompt.errors import Stopped, UserError
from softprompt.experiment.schema import Experiment
from softprompt.methods.saved import read_description
from softprompt.objectives.model import Objective
from softprompt.parallel.hosts import (
    Agreement,
    divide_rows,
    is_main,
    result_of_main,
    wait_for_all,
)
from softprompt.runtime.bars import bars_in_notebooks
from softprompt.runtime.memory import is_out_of_memory
from softprompt.runtime.progress import Progress
from softprompt.runtime.signals import StopSignals
from softprompt.storage.run_folder import open_run, read_summary
from softprompt.training.callbacks import Callback, CallbackError, Callbacks
from softprompt.training.custom import Custom
from softprompt.training.forecast import Forecast
from softprompt.training.preparation import Preparation
from softprompt.training.reporting import log_data
from softprompt.training.session import Session
from softprompt.training.step import train_step

_log = logging.getLogger(__name__)


def train(
    experiment: Experiment,
    folder: str | Path,
    *,
    records: Mapping[str, Rows] | None = None,
    objective: Objective | None = None,
    optimizer: optax.GradientTransformation | None = None,
    callbacks: Sequence[Callback] = (),
    progress: Progress = bars_in_notebooks,
) -> dict[str, Any]:
    """Train an experiment in a run folder, or resume it there, and return its summary.

    A run that is finished is not trained again.

    Args:
      experiment: what to train; see `load_experiment`.
      folder: the run folder, which is created if it does not exist.
      records: by split (`train`, `validation`, `test`) a sequence of dictionaries, which
        replaces the source that the experiment names.
      objective: replaces the loss of the section `objective`. A `RowObjective` is also measured on
        the validation and test data.
      optimizer: an Optax optimizer, which replaces the section `optimizer`.
      callbacks: called after steps and evaluations. They may end the run; see `Callback`.
      progress: shows progress; by default with bars in a notebook, and not at all elsewhere.

    Returns:
      What `summary.json` in the folder holds: steps, times, validation and test metrics.

    Raises:
      UserError: if the experiment, its data or its base model is invalid, if the folder
        holds another run, or if the loss is not finite.
      Stopped: on Ctrl-C, SIGTERM or SIGHUP while it trains, after the state is saved. A second
        signal has its usual effect.
      Exception: any exception that a callback raises, after the state is saved.

    Examples:
      >>> experiment = load_experiment("experiments/sentiment.yaml", ["training.steps=20"])
      >>> summary = train(experiment, "runs/example")
      >>> summary["test"]["accuracy"]
    """
    custom = Custom(objective, optimizer)
    experiment = custom.marked(experiment)
    try:
        return _train(experiment, Path(folder), records, custom, Callbacks(callbacks), progress)
    except CallbackError as failed:
        error = failed.error
    raise error


def _train(
    experiment: Experiment,
    folder: Path,
    records: Mapping[str, Rows] | None,
    custom: Custom,
    callbacks: Callbacks,
    progress: Progress,
) -> dict[str, Any]:
    with _opened(folder, experiment) as experiment:
        if summary := result_of_main(lambda: finished_summary(folder)):
            _log.info(f"{folder}: this run is finished; choose another folder to train again")
            return summary
        prepared = Preparation(progress).prepare(experiment, records, folder, custom)
        if is_main():
            log_data(prepared)
        agreement = Agreement() if jax.process_count() > 1 else None
        with (
            StopSignals(agreement) as stop,
            Session(
                experiment, folder, prepared, stop, callbacks=callbacks, progress=progress
            ) as session,
        ):
            try:
                _make_steps(session, stop, progress)
            except jax.errors.JaxRuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise UserError(
                    f"step {session.run.step + 1}: the device runs out of memory; set a smaller "
                    "training.batch_size, and raise training.accumulate to keep the number of "
                    "examples per step"
                ) from None
        if stop.requested:
            raise Stopped(
                stop.requested,
                f"stopped at step {session.run.step}, all saved; start it again to resume",
            ) from callbacks.error
        return session.finish()


@contextlib.contextmanager
def _opened(folder: Path, experiment: Experiment) -> Iterator[Experiment]:
    """Open a run as `open_run` does. Of several processes, the main one opens it for all."""
    with contextlib.ExitStack() as stack:

        def open_here() -> str:
            nonlocal experiment
            experiment = stack.enter_context(open_run(folder, experiment))
            return experiment.evaluation.metric

        metric = result_of_main(open_here)
        yield experiment if is_main() else experiment.with_metric(metric)
        wait_for_all("the run is complete")


def _make_steps(session: Session, stop: StopSignals, progress: Progress) -> None:
    """Make all steps, or save the state when a signal stops the work."""
    done, forecast = session.run.step, Forecast(session)
    with progress("train", session.steps, "steps", done=done) as bar:
        while not stop.check() and session.run_due_work() and not stop.requested:
            batch, key = session.next_inputs()
            divided = divide_rows(batch, session.base.backbone.mesh)
            forecast.before_step(divided, key)
            results = train_step(*session.state.arrays, divided, key, **session.state.program)
            session.accept(*results, padding=batch.padding)
            bar.advance(note=session.reporter.note)
            forecast.after_step()
        if stop.requested:
            session.save()


def finished_summary(folder: Path) -> dict[str, Any] | None:
    """Return the summary of a finished run whose prompt is intact, or None."""
    try:
        read_description(folder / "prompt")
        return read_summary(folder)
    except UserError:
        return None
