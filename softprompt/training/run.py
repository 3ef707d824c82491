"""One run: what it learns, where it stands, and the files that say so.

A run that was stopped at any moment goes on from its newest intact checkpoint and ends
as it would have ended without the stop, bit for bit: every batch is a function of the
seed and its number, and a checkpoint holds all else.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from softprompt.backbones.batch import Batch
from softprompt.backbones.loading import Backbone
from softprompt.data.batches import TrainingBatches
from softprompt.data.examples import Example, data_digest, same_data
from softprompt.errors import Stopped, UserError
from softprompt.evaluation.evaluate import EvaluationResult, evaluate
from softprompt.evaluation.scoring import prepare_model
from softprompt.experiment.schema import Experiment
from softprompt.inference.prompt import load_prompt
from softprompt.methods.saved import SavedPrompt, read_description, save_prompt, usage
from softprompt.methods.soft_prompt import SoftPrompt
from softprompt.metrics.named import is_better
from softprompt.runtime.memory import peak_memory
from softprompt.runtime.progress import Progress, silent
from softprompt.runtime.signals import StopSignals
from softprompt.storage.arrays import DamagedError
from softprompt.storage.checkpoints import Checkpoints
from softprompt.storage.run_folder import (
    MetricsLog,
    write_config,
    write_predictions,
    write_samples,
    write_summary,
)
from softprompt.training.curves import draw_curves
from softprompt.training.optimizers import UpdateRule, hyperparameters, learning_rate
from softprompt.training.preparation import Prepared
from softprompt.training.state import RunState
from softprompt.training.step import split

_log = logging.getLogger(__name__)


class Run:
    """One process's share of a run.

    Args:
      experiment: what to train.
      folder: opened by `open_run`.
      stop: what may cut an evaluation short.
      prepared: what `Preparation` made of the experiment.
      room: for how many virtual tokens there shall be room while it is trained, if more than
        its own: that changes nothing but shapes. Checkpoints and prompts are as without.
      name: what stands in front of the lines that it says.
    """

    def __init__(
        self,
        experiment: Experiment,
        folder: Path,
        stop: StopSignals,
        prepared: Prepared,
        *,
        room: int | None = None,
        name: str = "",
        progress: Progress = silent,
    ):
        self.experiment, self.folder, self.name = experiment, folder, name
        self.base, self.task, self.examples = prepared.base, prepared.task, prepared.examples
        self._progress = progress
        self.accumulate = experiment.training.accumulate
        self.stop, self.rows = stop, experiment.training.batch_size * self.accumulate
        if len(self.examples["train"]) < self.rows:
            raise UserError(
                f"{experiment.data.train}: {len(self.examples['train'])} examples do not fill a "
                f"batch of {self.rows}; set a smaller training.batch_size"
            )
        self.batches = TrainingBatches(
            self.examples["train"],
            self.rows,
            experiment.seed,
            separate_targets=self.base.backbone.separate_targets,
        )
        self.iterator = self.batches.iterate()

        offsets = experiment.dept.learning_rate if experiment.method == "dept" else None
        steps = experiment.training.steps
        self.optimizer = UpdateRule.of(experiment.optimizer)
        self.numbers = hyperparameters(experiment.optimizer, steps, offsets)
        method, backbone = prepared.method, self.base.backbone
        graphdef, trainable, frozen = split(method, backbone)
        # What is saved has the method's own shapes.
        self.own = graphdef, jax.eval_shape(lambda: trainable), frozen
        self.room = None
        if room is not None and isinstance(method, SoftPrompt) and method.can_be_padded(backbone):
            self.room = room
            graphdef, trainable, frozen = split(method.padded(room), backbone)
        self.graphdef, self.trainable, self.frozen = graphdef, trainable, frozen
        self.opt_state = self.optimizer.init(trainable, self.numbers)
        self.steps = steps if jax.tree.leaves(self.trainable) else 0
        self.key = jax.random.key(experiment.seed)

        write_config(folder, experiment)
        self.checkpoints = Checkpoints(folder / "checkpoints", experiment.checkpoints.keep)
        self.progress = RunState(self.base.fingerprint, data_digest(self.examples))
        self._resume()
        self.metrics = MetricsLog(folder, self.progress.step, self.progress.records)
        self.saved_step = self.progress.step
        self.pending: tuple[dict[str, jax.Array], float] | None = None  # of the last step
        self.began = time.monotonic() - prepared.seconds - self.progress.seconds
        self.mark = time.monotonic()
        self.beside = 1
        self.note = self.quality = ""  # the last loss, and the last deciding metric, in words

    @property
    def program(self) -> dict[str, Any]:
        """What its steps are compiled for: see `step.PROGRAM`."""
        return {
            "graphdef": self.graphdef,
            "optimizer": self.optimizer,
            "accumulate": self.accumulate,
        }

    def run_due_work(self) -> bool:
        """Do what is due before the next step: evaluate, save; whether there is a next one.

        Cut short by a signal, an evaluation leaves no trace.
        """
        progress, evaluation = self.progress, self.experiment.evaluation
        every, patience = self.experiment.checkpoints.every, evaluation.patience
        last = progress.step == self.steps
        due = progress.step and progress.step % evaluation.every == 0
        if progress.evaluated < progress.step and (last or due):
            self._evaluate()
        elif every and progress.step % every == 0 and self.saved_step < progress.step:
            self.save()
        stale = patience is not None and progress.stale >= patience
        if stale and not last:
            self._say(f"no better prompt in {progress.stale} evaluations: stopping early")
        return not (last or stale)

    def inputs(self) -> tuple[Batch, jax.Array]:
        """What the next step reads: its batch and its random key."""
        return next(self.iterator), jax.random.fold_in(self.key, self.progress.step)

    def take(
        self,
        trainable: nnx.State,
        opt_state: Any,
        measured: dict[str, jax.Array],
        *,
        padding: float,
        beside: int = 1,
    ) -> None:
        """Take over the results of a step, which may still be running.

        Meanwhile the measurements of the step before are taken in.

        Args:
          trainable, opt_state, measured: what `train_step` returned.
          padding: share of its batch.
          beside: how many runs made a step in that time, this one included.
        """
        self.trainable, self.opt_state = trainable, opt_state
        self._take_in()
        self.pending, self.beside = (measured, padding), beside
        self.progress.step += 1

    def save(self) -> None:
        """Save a checkpoint of the state after the last step, unless there is one."""
        if self.saved_step == self.progress.step:
            return
        self._take_in()
        progress = self.progress
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(self.trainable)):
            raise self._not_finite("the update made what is learned infinite")
        progress.data = self.iterator.get_state()
        progress.records = self.metrics.records
        progress.seconds = time.monotonic() - self.began
        arrays = resized((self.trainable, self.opt_state), self._saved_form())
        best = progress.best_step
        self.checkpoints.save(progress.step, arrays, dataclasses.asdict(progress), best)
        self.saved_step = progress.step

    def close(self) -> None:
        """Wait until all that was saved is written."""
        self.metrics.close()
        self.checkpoints.wait()

    def finish(self) -> dict[str, Any]:
        """Evaluate the best prompt on the test data and write the summary."""
        progress = self.progress
        test: dict[str, float] = {}
        intervals: dict[str, list[float]] = {}
        if "test" in self.examples:
            measured = self._measure(*self._best_model(), "test")
            test = measured.values()
            intervals = {name: list(bounds) for name, bounds in measured.intervals().items()}
            write_predictions(self.folder / "predictions.jsonl", measured.samples)
        seconds = time.monotonic() - self.began
        summary = {
            "experiment": self.experiment.name,
            "method": self.experiment.method,
            "trainable_parameters": sum(x.size for x in jax.tree.leaves(self.own[1])),
            "steps": progress.step,
            "best_step": progress.best_step,
            "wall_seconds": round(seconds, 1),
            "train_seconds": round(progress.step_seconds, 1),
            "examples_per_second": rate(progress.step * self.rows, progress.step_seconds),
            "peak_memory_bytes": peak_memory(),
            "validation": progress.best_metrics,
            "test": test,
            "test_intervals": intervals,
        }
        draw_curves(self.folder, self.experiment.evaluation.metric)
        write_summary(self.folder, summary)
        return summary

    def _resume(self) -> None:
        """Go on from the newest intact checkpoint whose best prompt is intact as well."""
        found = dict(self.checkpoints.read_descriptions())
        damage = [problem for problem in found.values() if isinstance(problem, DamagedError)]
        intact = {step: d for step, d in found.items() if not isinstance(d, DamagedError)}
        for problem in damage:
            _log.info(f"{problem}; not using this checkpoint")
        bests = {0, *intact, self._saved_prompt_step()}
        for step, description in intact.items():
            same = {
                "base model": description["base"] == self.progress.base,
                "data": same_data(description["examples"], self.examples),
            }
            for what, unchanged in same.items():
                if not unchanged:
                    raise UserError(
                        f"{self.folder}: its {what} has changed since the run began; put it back, "
                        "or choose another folder with --run-dir (make: RUN=DIR)"
                    )
            if description["best_step"] in bests:
                arrays = self.checkpoints.load(step, self._saved_form())
                self.trainable, self.opt_state = resized(arrays, (self.trainable, self.opt_state))
                self.progress = RunState(**description)
                self.iterator.set_state(self.progress.data)
                self._say(f"going on from step {step}")
                return
        if found:
            self._say("no checkpoint can be used: starting from the beginning")

    def _saved_form(self) -> tuple[nnx.State, Any]:
        """Shapes of the trainable part and the optimizer's state as they are saved."""
        return jax.eval_shape(lambda x: (x, self.optimizer.init(x, self.numbers)), self.own[1])

    def _take_in(self) -> None:
        """Wait for the pending step's measurements, check them, and log when it is time."""
        if self.pending is None:
            return
        measured, padding = self.pending
        self.pending = None
        loss, norm = float(measured["loss"]), float(measured["gradient_norm"])
        progress = self.progress
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._not_finite(f"the loss is {loss} and its gradient's norm {norm}")
        now = time.monotonic()
        progress.step_seconds += (now - self.mark) / self.beside
        self.mark = now
        progress.losses.append(loss)
        progress.padding.append(padding)
        training = self.experiment.training
        if progress.step % training.log_every == 0 or progress.step == self.steps:
            seconds = progress.step_seconds - progress.logged_seconds
            values = {
                "loss": float(np.mean(progress.losses)),
                "gradient_norm": norm,
                "learning_rate": float(
                    learning_rate(self.optimizer.schedule, self.numbers, progress.step - 1)
                ),
                "padding": float(np.mean(progress.padding)),
                "examples_per_second": rate(len(progress.losses) * self.rows, seconds),
                "seconds": round(progress.step_seconds, 3),
            }
            self.metrics.write(progress.step, "train", values)
            self.note = (
                f"loss {values['loss']:.4f}, {values['examples_per_second']:.1f} examples/s, "
                f"{values['padding']:.0%} padding"
            )
            progress.losses, progress.padding = [], []
            progress.logged_seconds = progress.step_seconds

    def _not_finite(self, what: str) -> UserError:
        self.checkpoints.wait()
        newest = self.checkpoints.steps[-1:]
        kept = f"checkpoint {self.checkpoints.path(newest[0])} is kept" if newest else ""
        where = "" if self.name else ", in another folder with --run-dir (make: RUN=DIR)"
        return UserError(
            f"step {self.progress.step}: {what}; lower optimizer.learning_rate{where}; "
            f"{kept or 'there is no checkpoint yet'}"
        )

    def _evaluate(self) -> None:
        """Evaluate the prompt as it is, keep it if it is the best so far, save the state."""
        self._take_in()
        method, backbone = nnx.merge(self.graphdef, self.trainable, *self.frozen)
        try:
            with self.stop.deferred(False):
                measured = self._measure(*prepare_model(method, backbone), "validation")
        except Stopped:
            return
        progress, key = self.progress, self.experiment.evaluation.metric
        metrics = measured.values()
        if not math.isfinite(metrics["loss"]):
            raise self._not_finite(f"the validation loss is {metrics['loss']}")
        best = not progress.best_metrics or is_better(metrics, progress.best_metrics, key)
        if best:
            progress.best_step, progress.best_metrics = progress.step, metrics
        progress.stale = 0 if best else progress.stale + 1
        progress.evaluated = progress.step
        self.metrics.write(progress.step, "validation", metrics)
        self.quality = f"{key} {metrics[key]:.4f}"
        if not self.task.labels:
            write_samples(self.folder, progress.step, measured.samples)
        shown = ", ".join(
            f"{name} {value:.4f}"
            for name, value in metrics.items()
            if name == key or "." not in name or name.endswith(".f1")
        )
        self._say(f"step {progress.step}: validation {shown}{' (the best so far)' if best else ''}")
        self.save()
        if best:
            self.checkpoints.wait()
            self._save_prompt(self.trainable)
        self.mark = time.monotonic()

    def _measure(self, backbone, prefix, split: str) -> EvaluationResult:
        settings = self.experiment.evaluation
        examples: Sequence[Example] = self.examples[split]
        written: int | None = settings.samples
        if split == "validation":
            examples = examples[: settings.examples]
        elif settings.samples:
            written = None
        label = f"{self.name}: {split}" if self.name else split
        return evaluate(
            backbone,
            prefix,
            self.task,
            examples,
            self.experiment,
            label,
            written=written,
            progress=self._progress,
        )

    def _save_prompt(self, trainable: nnx.State) -> None:
        graphdef, own, frozen = self.own
        method, backbone = nnx.merge(graphdef, resized(trainable, own), *frozen)
        about = {
            "experiment": self.experiment.name,
            "step": self.progress.best_step,
            "validation": self.progress.best_metrics,
            **usage(self.experiment),
        }
        save_prompt(
            self.folder / "prompt",
            method.folded(),
            backbone,
            self.experiment.method,
            self.base,
            self.task,
            about,
        )

    def _saved_prompt_step(self) -> int:
        """The step that `prompt/` is of; -1 if there is none, or it is damaged."""
        try:
            return read_description(self.folder / "prompt")["step"]
        except UserError:
            return -1

    def _best_model(self) -> tuple[Backbone, Any]:
        """Backbone and prefix of the best step, from `prompt/` or else from its checkpoint."""
        best = self.progress.best_step
        if self._saved_prompt_step() != best:
            self._save_prompt(self.checkpoints.load(best, self._saved_form())[0])
        if self.room is None:
            trained = load_prompt(self.folder / "prompt", self.base)
            return trained.backbone, trained.prefix
        saved = SavedPrompt.read(self.folder / "prompt")
        method, _ = saved.method(self.base, self.task.opening)
        assert isinstance(method, SoftPrompt)
        return prepare_model(method.padded(self.room), self.base.backbone)

    def _say(self, line: str) -> None:
        _log.info(f"{self.name}: {line}" if self.name else line)


def rate(count: int, seconds: float) -> float:
    """Units per second; 0 if there was no time."""
    return round(count / seconds, 2) if seconds else 0.0


def resized(tree: Any, like: Any) -> Any:
    """Arrays cut, or padded with zeros, at their ends, to the shapes of others."""

    def fit(array: jax.Array, shape: Any) -> jax.Array:
        if array.shape == shape.shape:
            return array
        # On the host: on a device every length would be a program of its own.
        cut = np.asarray(array)[tuple(map(slice, shape.shape))]
        more = [(0, want - have) for want, have in zip(shape.shape, cut.shape, strict=True)]
        return jnp.asarray(np.pad(cut, more))

    return jax.tree.map(fit, tree, like)
