"""What a run reports: metrics, log messages, samples and the summary."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from softprompt.data.mistakes import data_mistakes, template_mistakes
from softprompt.data.showing import LEGEND, counts_of, shown_example
from softprompt.evaluation.evaluate import EvaluationResult
from softprompt.experiment.schema import Experiment
from softprompt.metrics.scores import Scores
from softprompt.parallel.hosts import is_main
from softprompt.runtime.memory import peak_memory
from softprompt.storage.run_folder import (
    MetricsLog,
    write_predictions,
    write_samples,
    write_summary,
)
from softprompt.training.curves import draw_curves
from softprompt.training.preparation import Prepared
from softprompt.training.state import RunState, TrainState

_log = logging.getLogger(__name__)

_LONGEST_EXAMPLE = 2000  # characters that are logged


class Reporter:
    """Reports one run to its folder and to the log.

    In a run of several processes, the main process alone writes to the folder.

    Args:
      experiment: the experiment of the run.
      folder: the run folder.
      run: the state of the run; the reporter updates its times, losses and padding.
      name: put before log messages; empty for none.

    Attributes:
      note: the latest training loss and speed as text.
      quality: the latest value of the deciding metric as text.
    """

    def __init__(self, experiment: Experiment, folder: Path, run: RunState, name: str = ""):
        self._experiment, self._folder, self._run, self._name = experiment, folder, run, name
        self._metrics = MetricsLog(folder, run.step, run.records) if is_main() else None
        self.note = self.quality = ""

    @property
    def records(self) -> int:
        """Number of records in `metrics.jsonl`."""
        return self._metrics.records if self._metrics else self._run.records

    def step(self, measured: Mapping[str, float], padding: float, seconds: float) -> None:
        """Count a finished step, and log every `training.log_every` steps.

        Args:
          measured: what `train_step` measured, and the learning rate.
          padding: share of padding in the batch.
          seconds: duration of the step.
        """
        run, training = self._run, self._experiment.training
        run.step_seconds += seconds
        run.losses.append(measured["loss"])
        run.padding.append(padding)
        if run.step % training.log_every and run.step != training.steps:
            return
        examples = len(run.losses) * training.batch_size * training.accumulate
        values = {
            "loss": float(np.mean(run.losses)),
            **{name: value for name, value in measured.items() if name != "loss"},
            "padding": float(np.mean(run.padding)),
            "examples_per_second": _rate(examples, run.step_seconds - run.logged_seconds),
            "seconds": round(run.step_seconds, 3),
        }
        self._write("train", values)
        self.note = (
            f"loss {values['loss']:.4f}, {values['examples_per_second']:.1f} examples/s, "
            f"{values['padding']:.0%} padding"
        )
        run.losses, run.padding = [], []
        run.logged_seconds = run.step_seconds

    def validation(self, result: EvaluationResult, *, best: bool, free_text: bool) -> None:
        """Report an evaluation on the validation data.

        Args:
          result: the evaluation.
          best: whether it is the best so far.
          free_text: whether its samples are generated texts, which are saved.
        """
        run, key = self._run, self._experiment.evaluation.metric
        metrics = result.values()
        self._write("validation", metrics)
        if free_text and is_main():
            write_samples(self._folder, run.step, result.samples)
        self.quality = f"{key} {metrics[key]:.4f}"
        shown = ", ".join(
            f"{name} {value:.4f}"
            for name, value in metrics.items()
            if name == key or "." not in name or name.endswith(".f1")
        )
        best_note = " (the best so far)" if best else ""
        log_message(self._name, f"step {run.step}: validation {shown}{best_note}")

    def summary(
        self,
        state: TrainState,
        seconds: float,
        test: EvaluationResult | None,
        forgetting: Scores | None,
    ) -> dict[str, Any]:
        """Write and return the summary of the finished run.

        Args:
          state: gives the number of trainable parameters.
          seconds: duration of the whole run.
          test: the evaluation on the test data; None if there is no test data.
          forgetting: the forgetting of the best prompt; None if it is not measured.
        """
        run, training = self._run, self._experiment.training
        if test and is_main():
            write_predictions(self._folder / "predictions.jsonl", test.samples)
        examples = run.step * training.batch_size * training.accumulate
        summary = {
            "experiment": self._experiment.name,
            "method": self._experiment.method,
            "trainable_parameters": state.trainable_parameters,
            "steps": run.step,
            "best_step": run.best_step,
            "wall_seconds": round(seconds, 1),
            "train_seconds": round(run.step_seconds, 1),
            "examples_per_second": _rate(examples, run.step_seconds),
            "peak_memory_bytes": peak_memory(),
            "validation": run.best_metrics,
            "test": test.values() if test else {},
            "test_intervals": {k: list(v) for k, v in test.intervals().items()} if test else {},
        }
        if forgetting:
            summary |= forgetting.values()
            summary["forgetting_interval"] = list(forgetting.intervals()["forgetting"])
        if is_main():
            draw_curves(self._folder, self._experiment.evaluation.metric)
            write_summary(self._folder, summary)
        return summary

    def _write(self, split: str, values: Mapping[str, float]) -> None:
        if self._metrics:
            self._metrics.write(self._run.step, split, values)

    def close(self) -> None:
        """Flush and close the metrics."""
        if self._metrics:
            self._metrics.close()


def log_data(prepared: Prepared) -> None:
    """Log one training example as the model reads it, and warn of likely mistakes."""
    task, training = prepared.task, prepared.examples["train"]
    example = training[0]
    text = shown_example(task, example)
    if len(text) > _LONGEST_EXAMPLE:
        half = _LONGEST_EXAMPLE // 2
        text = f"{text[:half]} … {text[-half:]}"
    lines = text.replace("\n", "\n  ")
    counts = counts_of(task, example)
    _log.info(f"example {example.record.where} ({counts}; {LEGEND}):\n  {lines}")
    for mistake in (*template_mistakes(task, training), *data_mistakes(task, training)):
        _log.warning(f"likely mistake: {mistake}")


def log_message(name: str, text: str) -> None:
    """Log a message about a run, with its name in front if it has one."""
    _log.info(f"{name}: {text}" if name else text)


def _rate(count: int, seconds: float) -> float:
    """Units per second; 0 if no time has passed."""
    return round(count / seconds, 2) if seconds else 0.0
