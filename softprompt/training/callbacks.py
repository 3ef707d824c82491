"""Callbacks: Python code that is called after steps and evaluations and may end the run."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import jax

from softprompt.errors import UserError
from softprompt.parallel.hosts import Agreement, is_main

_GO_ON, _END, _FAIL = range(3)  # the processes agree on the largest number


class Callback(Protocol):
    """Called by `train(..., callbacks=[...])`. A subclass overrides one method or both.

    A method that returns `True` ends the run, as early stopping does: the last step is evaluated,
    and the prompt, the state and the summary are saved.

    Examples:
      >>> class StopWhenGood(Callback):
      ...     def on_evaluation(self, step, metrics):
      ...         return metrics["loss"] < 100
      >>> experiment = load_experiment("experiments/sentiment.yaml", ["evaluation.every=1"])
      >>> train(experiment, "runs/good", callbacks=[StopWhenGood()])["steps"]
      1
    """

    def on_step(self, step: int, measured: Mapping[str, float]) -> bool | None:
        """Receive the values that a step measured. Steps are counted from 1.

        Args:
          step: the step. The next one may already be running.
          measured: `loss`, `gradient_norm`, the metrics of the objective, and `learning_rate`.
            With a custom optimizer there is no `learning_rate`.
        """

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> bool | None:
        """Receive the metrics on the validation data after a step."""


class CallbackError(Exception):
    """A callback failed. It wraps errors such as `OSError`, which would seem to come from the run.

    Attributes:
      error: the exception of the callback. In other processes, an error that explains this.
    """

    def __init__(self, error: Exception):
        super().__init__()
        self.error = error


class Callbacks:
    """Calls the callbacks of a run in the main process, and shares the result with all processes.

    An exception in a callback is kept until the state of the run is saved. No callback is called
    after an exception.

    Args:
      callbacks: called in this order. All processes must pass the same number of them.

    Attributes:
      ends: whether a callback has ended the run. It is False in other processes.
      error: the exception of a callback; None in other processes.
    """

    def __init__(self, callbacks: Sequence[Callback] = ()):
        self._callbacks = callbacks
        self._agreement = Agreement() if callbacks and jax.process_count() > 1 else None
        self.ends = False
        self.error: Exception | None = None

    def on_step(self, step: int, measured: Mapping[str, float]) -> None:
        """Call `on_step` of all callbacks."""
        self._call(lambda callback: callback.on_step(step, measured))

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Call `on_evaluation` of all callbacks."""
        self._call(lambda callback: callback.on_evaluation(step, metrics))

    def decision(self, *, wait: bool) -> tuple[bool, CallbackError | None]:
        """Return whether the run ends, and the error to raise. All processes call this together.

        Args:
          wait: wait for the decision of the main process. If it is false, several processes get
            the decision of the previous call, so that no device waits.
        """
        number = _FAIL if self.error else _END if self.ends else _GO_ON
        if self._agreement:
            if wait:
                self._agreement(number)
            number = self._agreement(number)
        elsewhere = UserError("a callback failed in the main process; see the error there")
        failed = CallbackError(self.error or elsewhere) if number == _FAIL else None
        return number == _END, failed

    def _call(self, call: Callable[[Callback], bool | None]) -> None:
        if not is_main():
            return
        for callback in self._callbacks:
            if self.error is None:
                try:
                    self.ends |= bool(call(callback))
                except Exception as error:
                    self.error = error
