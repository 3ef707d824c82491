"""The training of one experiment, from its data to a prompt."""

import logging
from pathlib import Path
from typing import Any

from softprompt.errors import Stopped, UserError
from softprompt.experiment.schema import Experiment
from softprompt.methods.saved import read_description
from softprompt.runtime.progress import Progress, silent
from softprompt.runtime.signals import StopSignals
from softprompt.storage.run_folder import open_run, read_summary
from softprompt.training.preparation import Preparation
from softprompt.training.run import Run
from softprompt.training.step import train_step

_log = logging.getLogger(__name__)


def train(
    experiment: Experiment, folder: str | Path, *, progress: Progress = silent
) -> dict[str, Any]:
    """Run an experiment in a folder, or go on with it, and return its summary.

    Raises:
      UserError: if the experiment, its data or its base model will not do, or the loss
        is not finite.
      Stopped: on SIGTERM or Ctrl-C, once the state is saved.
    """
    folder = Path(folder)
    with StopSignals() as stop, open_run(folder, experiment):
        if summary := finished(folder):
            _log.info(
                f"{folder}: this run is finished; for another one set --run-dir (make: RUN=DIR)"
            )
            return summary
        prepared = Preparation(progress).prepare(experiment)
        run = Run(experiment, folder, stop, prepared, progress=progress)
        _train(run, stop, progress)
        return run.finish()


def finished(folder: Path) -> dict[str, Any] | None:
    """The summary of a finished run whose prompt is intact."""
    try:
        read_description(folder / "prompt")
        return read_summary(folder)
    except UserError:
        return None


def _train(run: Run, stop: StopSignals, progress: Progress) -> None:
    """Steps, evaluations and checkpoints, up to the last step or an early stop."""
    try:
        with stop.deferred(), progress("train", run.steps, "steps", done=run.progress.step) as bar:
            while not stop.requested and run.run_due_work() and not stop.requested:
                batch, key = run.inputs()
                results = train_step(
                    run.trainable, run.opt_state, run.frozen, batch, key, **run.program
                )
                run.take(*results, padding=batch.padding)
                bar.advance(note=run.note)
            if stop.requested:
                run.save()
    finally:
        run.close()
    if stop.requested:
        raise Stopped(
            stop.requested,
            f"stopped at step {run.progress.step}, all saved; the same command goes on from there",
        )
