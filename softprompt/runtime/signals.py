"""SIGINT (Ctrl-C), SIGTERM and SIGHUP: stop long work at a point where its state can be saved."""

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from softprompt.errors import Stopped
from softprompt.runtime.progress import Bar, Progress

_log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """Handle SIGINT, SIGTERM and SIGHUP while the context is active.

    The first signal only sets `requested`, which the work checks between its parts. Nothing is
    interrupted in the middle. A second signal goes to the handler that was there before the
    context. By default, SIGINT then raises `KeyboardInterrupt`, and the others end the process.

    A signal that the process ignores, as after `nohup`, stays ignored. Outside the main thread,
    which alone can handle signals, the context has no effect.

    Args:
      agree: in a run of several processes, turns the number of the signal that arrived here, or 0,
        into a number that is the same in all processes; see `hosts.Agreement`. The signal counts
        from the `check` that returns it. By default, it counts at once.
    """

    def __init__(self, agree: Callable[[int], int] | None = None) -> None:
        self._agree, self._agreed = agree, 0
        self._arrived = 0
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> int | None:
        """The number of the signal that counts, or None."""
        return (self._agreed if self._agree else self._arrived) or None

    def check(self) -> int | None:
        """Return `requested`, after agreeing on it with the other processes."""
        if self._agree and not self._agreed:
            self._agreed = self._agree(self._arrived)
        return self.requested

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in handled_signals():
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def watched(self, progress: Progress) -> Progress:
        """Return a `Progress` whose bars raise `Stopped` after a signal, at their next advance."""

        def begin(
            label: str, total: int, unit: str, *, done: int = 0, part: bool = False
        ) -> "_WatchedBar":
            return _WatchedBar(progress(label, total, unit, done=done, part=part), self)

        return begin

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._arrived:
            self._arrived = number
            # In another thread, because this one may be in the middle of writing a message.
            threading.Thread(
                target=_log.info,
                args=["stopping after this step; send the signal again to stop at once"],
                daemon=True,
            ).start()
            return
        before = self._before[number]
        if callable(before):
            before(number, frame)
        else:
            signal.signal(number, before)
            signal.raise_signal(number)


def handled_signals() -> list[int]:
    """Return the numbers of the signals that stop work: all that the process does not ignore."""
    # None stands for a handler that was not installed from Python and cannot be restored.
    return [n for n in SIGNALS if signal.getsignal(n) not in (signal.SIG_IGN, None)]


class _WatchedBar:
    """A bar that raises `Stopped` when it advances after a signal."""

    def __init__(self, bar: Bar, stop: StopSignals):
        self._bar, self._stop = bar, stop

    def __enter__(self) -> Self:
        self._bar.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    def advance(self, count: int = 1, note: str = "") -> None:
        self._bar.advance(count, note)
        if number := self._stop.check():
            raise Stopped(number, "stopped")

    def drop(self, count: int) -> None:
        self._bar.drop(count)

    def close(self) -> None:
        self._bar.close()
