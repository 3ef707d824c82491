"""Progress bars and log messages on standard error; standard output is for results."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from tqdm import tqdm

from softprompt.runtime.progress import duration

_INTERVAL = 10.0  # seconds between progress lines where there is no terminal


def print_line(line: str) -> None:
    """Print a line to standard error, above a progress bar if there is one."""
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()


@contextlib.contextmanager
def printed_log() -> Iterator[None]:
    """Print what the library logs, one line per message."""
    log, handler = logging.getLogger("softprompt"), _LineHandler()
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # libraries that we use add a handler to the root logger
    # Matplotlib works without a cache of its own, but warns about it.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


class _LineHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print_line(record.getMessage())


class Bar:
    """The progress of one piece of work, as a context manager.

    A terminal shows a bar with the rate and the remaining time. Elsewhere, a line is printed
    every ten seconds, so that short work prints nothing. See `softprompt.runtime.progress`.

    Args:
      label: the name of the work, such as `train`.
      total: number of units.
      unit: the name of the units, such as `steps`.
      done: number of units that were done earlier.
      part: whether another bar shows the work that this is a part of. The bar of a part has
        no rate and no remaining time, and prints no lines.
    """

    def __init__(self, label: str, total: int, unit: str, *, done: int = 0, part: bool = False):
        self._label, self._total, self._unit = label, total, unit
        self._part = part
        self._done = done
        # When the first unit ended, and the number of units then. The rate is measured from
        # here, because the time before includes compilation.
        self._first: tuple[int, float] | None = None
        self._last_line = 0.0
        self._bar = tqdm(
            desc=label,
            total=total,
            initial=done,
            unit=" " + unit,
            dynamic_ncols=True,
            leave=False,
            bar_format="  {desc} |{bar:20}| {n_fmt}/{total_fmt}{postfix}" if part else None,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the bar from the terminal."""
        self._bar.close()

    def drop(self, count: int) -> None:
        """Subtract units that will not be done from the total."""
        self._total -= count
        if not self._bar.disable:
            self._bar.total = self._total
            self._bar.refresh()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count units as done, and show a note such as the loss at the end of the line."""
        self._done += count
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)
        now = time.monotonic()
        if self._first is None:
            self._first, self._last_line = (self._done, now), now
        elif self._bar.disable and not self._part and now - self._last_line >= _INTERVAL:
            self._last_line = now
            first_done, first_time = self._first
            seconds_per_unit = (now - first_time) / (self._done - first_done)
            left = duration((self._total - self._done) * seconds_per_unit)
            line = f"{self._label} {self._done}/{self._total} {self._unit}"
            print_line(", ".join(filter(None, [line, f"{left} left", note])))
