"""SIGTERM and Ctrl-C: stop long work at a point where its state can be saved."""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

from softprompt.errors import Stopped

_log = logging.getLogger(__name__)


class StopSignals:
    """Handle SIGTERM and SIGINT while the context is active.

    A signal raises `Stopped` at once. Inside `deferred`, the first signal only sets
    `requested`, and the work checks it between steps; a second signal always raises.
    Outside the main thread, which alone can handle signals, the context has no effect.

    Attributes:
      requested: number of the signal that arrived, or None.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._deferring = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
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

    @contextlib.contextmanager
    def deferred(self, on: bool = True) -> Iterator[None]:
        """Let the first signal only set `requested`; with `on=False`, let it raise again."""
        before, self._deferring = self._deferring, on
        try:
            yield
        finally:
            self._deferring = before

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.requested = self.requested is not None, number
        if again or not self._deferring:
            raise Stopped(number, "stopped")
        _log.info("stopping after this step; send the signal again to stop at once")
