"""A forecast of the memory and the time that training needs, for the log."""

import logging
import statistics
import time

import jax

from softprompt.backbones.batch import Batch
from softprompt.runtime.memory import available_memory, gibibytes, memory_in_use
from softprompt.runtime.progress import duration
from softprompt.training.session import Session
from softprompt.training.step import train_step

_log = logging.getLogger(__name__)

_TIMED_STEPS = 3
_SHORT = 10.0  # seconds; a shorter time left is not worth a message


class Forecast:
    """Logs once how much memory training needs, and once how much time is left.

    Args:
      session: the run.
    """

    def __init__(self, session: Session):
        self._session = session
        self._ends: list[float] = []  # when the first steps ended

    def before_step(self, batch: Batch, key: jax.Array) -> None:
        """Log the parameters and the memory before the first step.

        The step is compiled for it, and training then uses the compiled program.
        """
        if self._ends:
            return
        state = self._session.state
        text = f"training {state.trainable_parameters:,} parameters"
        compiled = train_step.lower(*state.arrays, batch, key, **state.program).compile()
        analysis, available = compiled.memory_analysis(), available_memory()
        if analysis is None:  # not every device reports it
            _log.info(text)
            return
        # Temporary arrays grow with the size of the batch, and later ones may be larger.
        growth = self._session.batches.largest().tokens.size / batch.tokens.size
        results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        needed = int(analysis.temp_size_in_bytes * growth) + results
        _log.info(f"{text}, about {gibibytes(memory_in_use() + needed)} of memory at the peak")
        if needed > available:
            _log.warning(
                f"a step needs about {gibibytes(needed)} more, but {gibibytes(available)} are "
                "available; set a smaller training.batch_size (and raise training.accumulate) or "
                "template.max_tokens"
            )

    def after_step(self) -> None:
        """Log the time left after the first steps. The first of them is not timed: it compiles."""
        if len(self._ends) > _TIMED_STEPS:
            return
        self._ends.append(time.monotonic())
        if len(self._ends) > _TIMED_STEPS:
            ends = zip(self._ends, self._ends[1:], strict=False)
            steps = self._session.steps - self._session.run.step
            left = steps * statistics.median(end - begin for begin, end in ends)
            if left >= _SHORT:
                _log.info(f"about {duration(left)} left, plus evaluations")
