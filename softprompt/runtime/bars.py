"""Progress bars of tqdm. They are widgets in a notebook and lines of text elsewhere."""

import sys
from types import TracebackType
from typing import Any, Self

from softprompt.runtime.progress import Bar, silent

_DELAY = 1.0  # seconds; shorter work shows no bar


class ProgressBar:
    """A progress bar with the rate, the time left, and a note such as the latest loss.

    The bar is removed when the work ends. Work that takes less than a second shows no bar.

    Args:
      label: the name of the work, such as `train`.
      total: number of units.
      unit: the name of the units, such as `steps`.
      done: number of units that were done earlier.
      part: whether this work is a part of other work that has its own bar.
      options: further arguments of `tqdm.auto.tqdm`.

    Examples:
      >>> experiment = load_experiment("experiments/sentiment.yaml", ["training.steps=20"])
      >>> summary = train(experiment, "runs/with-bars", progress=ProgressBar)
    """

    def __init__(
        self,
        label: str,
        total: int,
        unit: str,
        *,
        done: int = 0,
        part: bool = False,
        **options: Any,
    ):
        from tqdm.auto import tqdm  # imported here, because the import looks for a notebook

        text = {"desc": f"  {label}" if part else label, "unit": f" {unit}"}
        # The widths of a terminal and of a widget follow the window.
        settings = {"delay": _DELAY, "leave": False, "dynamic_ncols": True, **text, **options}
        self._bar: Any = tqdm(total=total, initial=done, **settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count units as done, and show a note such as the loss at the end of the bar."""
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)

    def drop(self, count: int) -> None:
        """Subtract units that will not be done from the total."""
        self._bar.total -= count
        self._bar.refresh()

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


def bars_in_notebooks(
    label: str, total: int, unit: str, *, done: int = 0, part: bool = False
) -> Bar:
    """Show a `ProgressBar` in a notebook, and nothing elsewhere.

    This is the default of the functions that Python users call. In a script, users decide what is
    printed.
    """
    show = ProgressBar if "ipykernel.zmqshell" in sys.modules else silent
    return show(label, total, unit, done=done, part=part)
