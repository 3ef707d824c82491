"""Prefixes on their way into the bank: each is computed in a free slot, chunk by chunk."""

import collections
import concurrent.futures
import dataclasses
import heapq

from softprompt.errors import UserError
from softprompt.serving.bank import Bank, Content, Stored
from softprompt.serving.device import Device

Loaded = concurrent.futures.Future[Stored]
"""A prefix, when it is in the bank. Whoever waits for it has one use of it."""


@dataclasses.dataclass(eq=False)
class _Load:
    """A prefix in a slot."""

    content: Content
    done: list[Loaded]  # of all who wait for it
    stored: Stored
    row: int
    read: int = 0  # tokens of the opening


class Loader:
    """Puts prefixes into the bank. A prefix that is already there is used again.

    Args:
      device: is used by the thread that calls `begin` and `run`.
      bank: keeps account of its prefixes.
      free: the numbers of the free slots, a heap.
    """

    def __init__(self, device: Device, bank: Bank, free: list[int]):
        self._device, self._bank, self._free = device, bank, free
        self._waiting: collections.deque[tuple[str, Content, Loaded]] = collections.deque()
        self._loads: list[_Load] = []

    @property
    def pending(self) -> int:
        """The number of prefixes that wait or are in a slot."""
        return len(self._waiting) + len(self._loads)

    @property
    def running(self) -> int:
        """The number of prefixes in a slot."""
        return len(self._loads)

    def add(self, digest: str, content: Content) -> Loaded:
        """Load a prefix, whose content has a digest, in one of the next rounds."""
        done: Loaded = concurrent.futures.Future()
        self._waiting.append((digest, content, done))
        return done

    def begin(self) -> None:
        """Give free slots to the prefixes that wait."""
        while self._waiting and self._free:
            digest, content, done = self._waiting.popleft()
            stored = self._bank.find(digest)
            loading = [load for load in self._loads if load.stored is stored]
            if loading:
                loading[0].done.append(done)
            elif stored is not None:
                done.set_result(stored)
            else:
                self._place(digest, content, done)

    def _place(self, digest: str, content: Content, done: Loaded) -> None:
        try:
            stored = self._bank.add(digest, content)
        except UserError as error:
            done.set_exception(error)
            return
        load = _Load(content, [done], stored, heapq.heappop(self._free))
        self._loads.append(load)  # first, so that `fail` knows it
        self._device.place(load.row, content)

    def run(self) -> None:
        """Read one chunk of the oldest prefix in a slot."""
        if not self._loads:
            return
        load = self._loads[0]
        if load.read < len(load.content.tokens):
            load.read = self._device.read_opening(load.row, load.content, load.read)
        if load.read == len(load.content.tokens):
            self._device.store(load.row, load.stored)
            self._loads.remove(load)
            heapq.heappush(self._free, load.row)
            for done in load.done:
                done.set_result(load.stored)

    def fail(self, error: Exception) -> None:
        """Report an error for all prefixes that wait or are in a slot. The slots stay taken."""
        loads, self._loads = self._loads, []
        for load in loads:
            for done in load.done:
                self._bank.release(load.stored)
                done.set_exception(error)
        while self._waiting:
            _, _, done = self._waiting.popleft()
            done.set_exception(error)
