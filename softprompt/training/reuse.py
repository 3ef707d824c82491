"""Results that consecutive experiments can share, such as tokenized examples."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Result = TypeVar("Result")


class LastResults:
    """Keeps the last result of each kind, and returns it while its inputs are the same."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[Any, Sequence[Any], Any]] = {}

    def get(
        self,
        name: str,
        key: Any,
        objects: Sequence[Any],
        make: Callable[[], Result],
        fits: Callable[[Result], bool] = lambda _: True,
    ) -> tuple[Result, bool]:
        """Return the last result of a kind if it can be used, and otherwise make it.

        The last result is deleted first, so that two results are never in memory together.

        Args:
          name: the kind.
          key: inputs that must be equal.
          objects: inputs that must be the same objects, such as records.
          make: makes the result.
          fits: tells whether the last result can be used if its inputs are the same.

        Returns:
          The result, and whether it was made now.
        """
        if self._same(name, key, objects) and fits(self._last[name][2]):
            return self._last[name][2], False
        self._last.pop(name, None)
        result = make()
        self._last[name] = key, objects, result
        return result, True

    def clear(self) -> None:
        """Forget all results."""
        self._last.clear()

    def _same(self, name: str, key: Any, objects: Sequence[Any]) -> bool:
        last_key, last_objects, _ = self._last.get(name, (None, (), None))
        same = len(objects) == len(last_objects) and all(
            one is other for one, other in zip(objects, last_objects, strict=True)
        )
        return name in self._last and last_key == key and same
