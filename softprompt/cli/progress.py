"""Progress and log messages: bars on a terminal, plain lines elsewhere.

Everything goes to standard error; standard output is for results.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from tqdm import tqdm

_SECONDS = 10  # between plain lines


def print_line(line: str) -> None:
    """Print a line, above the bar if there is one."""
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()


@contextlib.contextmanager
def printed_log() -> Iterator[None]:
    """Print what the library logs, one line per message."""
    log, handler = logging.getLogger("softprompt"), _LineHandler()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


class _LineHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print_line(record.getMessage())


def duration(seconds: float) -> str:
    """Time as minutes and seconds, or hours in front of them: `04:34`."""
    return tqdm.format_interval(seconds)


class Bar:
    """Progress of `total` units, of which `done` were done before, as a context manager.

    On a terminal a bar with the rate and the time left; elsewhere, from the first unit on, a
    line every ten seconds, so that short work is silent. Of a `part` of the work that
    another bar is of, a bar with the note alone, and no lines.
    """

    def __init__(self, label: str, total: int, unit: str, *, done: int = 0, part: bool = False):
        self._label, self._total, self._unit = label, total, unit
        self._part = part
        self._done = done
        self._first: tuple[int, float] | None = None  # how many were done when, the first time
        self._said = 0.0
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
        """Take the bar off the terminal."""
        self._bar.close()

    def drop(self, count: int) -> None:
        """So many units will not be done."""
        self._total -= count
        if not self._bar.disable:
            self._bar.total = self._total
            self._bar.refresh()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count units as done; `note` stands behind the bar, or at the end of the line."""
        self._done += count
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)
        now = time.monotonic()
        if self._first is None:  # what comes before, such as compiling, is not done for each
            self._first, self._said = (self._done, now), now
        elif self._bar.disable and not self._part and now - self._said >= _SECONDS:
            self._said = now
            first, since = self._first
            left = (self._total - self._done) * (now - since) / (self._done - first)
            line = f"{self._label} {self._done}/{self._total} {self._unit}"
            print_line(", ".join(filter(None, [line, f"{duration(left)} left", note])))
