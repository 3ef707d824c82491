"""Progress bars and log messages on standard error; standard output is for results."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator

from tqdm import tqdm

from softprompt.runtime.bars import ProgressBar
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


class Bar(ProgressBar):
    """A progress bar on a terminal. Elsewhere, a line is printed every ten seconds.

    Short work therefore prints no lines. The bar of a part of a larger piece of work has no rate
    and no remaining time, and prints no lines.
    """

    def __init__(self, label: str, total: int, unit: str, *, done: int = 0, part: bool = False):
        super().__init__(
            label,
            total,
            unit,
            done=done,
            part=part,
            delay=0,
            bar_format="{desc} |{bar:20}| {n_fmt}/{total_fmt}{postfix}" if part else None,
            disable=not sys.stderr.isatty(),
        )
        self._label, self._unit, self._part = label, unit, part
        self._done, self._total = done, total
        # When the first unit ended, and the number of units then. The rate is measured from
        # here, because the time before includes compilation.
        self._first: tuple[int, float] | None = None
        self._last_line = 0.0

    def drop(self, count: int) -> None:
        """Subtract units that will not be done from the total."""
        super().drop(count)
        self._total -= count

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count units as done, and show a note such as the loss at the end of the line."""
        super().advance(count, note)
        self._done += count
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
