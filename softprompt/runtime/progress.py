"""Progress reports: a callback that the library calls when a piece of work begins.

The library never prints. A caller that wants to show progress passes a `Progress`, such as
`ProgressBar`. See `bars` for what a notebook shows.
"""

from types import TracebackType
from typing import Protocol, Self


class Bar(Protocol):
    """The progress of one piece of work, used as a context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count units as done; `note` is a short status, such as the loss."""

    def drop(self, count: int) -> None:
        """Subtract units that will not be done from the total."""

    def close(self) -> None:
        """Stop showing the work."""


class Progress(Protocol):
    """Called at the beginning of each piece of work."""

    def __call__(
        self, label: str, total: int, unit: str, *, done: int = 0, part: bool = False
    ) -> Bar:
        """Start showing a piece of work.

        Args:
          label: the name of the work, such as `train`.
          total: number of units.
          unit: the name of the units, such as `steps`.
          done: number of units that were done earlier.
          part: whether it is part of a larger piece of work that is also shown.

        Returns:
          The object that receives the progress.
        """


def duration(seconds: float) -> str:
    """Format a time as minutes and seconds, with hours if there are any: `04:34`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return (f"{hours}:" if hours else "") + f"{minute:02}:{second:02}"


class _SilentBar:
    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def advance(self, count: int = 1, note: str = "") -> None:
        pass

    def drop(self, count: int) -> None:
        pass

    def close(self) -> None:
        pass


def silent(label: str, total: int, unit: str, *, done: int = 0, part: bool = False) -> Bar:
    """Show nothing."""
    return _SilentBar()
