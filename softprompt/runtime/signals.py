"""SIGTERM and Ctrl-C: stop where it does no harm."""

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
    """Takes over SIGTERM and SIGINT, as a context manager.

    A signal raises `Stopped` where it strikes, except inside `deferred`, where the first
    one only sets `requested`; a second one always raises.
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
        """Within it, the first signal waits to be asked for; with `on` false, it does not."""
        before, self._deferring = self._deferring, on
        try:
            yield
        finally:
            self._deferring = before

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.requested = self.requested is not None, number
        if again or not self._deferring:
            raise Stopped(number, "stopped")
        _log.info("stopping after this step; once more to stop at once")
