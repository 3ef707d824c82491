"""The bank: the places of prefixes in one device array.

Prefixes are identified by their content. Two prompts with equal prefixes share their places, and a
prompt that is replaced under its name never changes what earlier requests read.

Axis letters: P tokens of a prefix, D hidden, L layers, K key-value heads, h head size.
"""

import dataclasses
import hashlib
import threading
from collections.abc import Sequence

import numpy as np

from softprompt.errors import UserError


@dataclasses.dataclass(frozen=True)
class Content:
    """The input from which a prefix is computed.

    Attributes:
      tokens: the ids of the opening. Virtual token i has the id `~i`.
      vectors: `[P, D]`, the embeddings of the virtual tokens; None if there are none.
      keys, values: `[L, P, K, h]`, a prefix before the opening; None if there is none.
    """

    tokens: Sequence[int] = ()
    vectors: np.ndarray | None = None
    keys: np.ndarray | None = None
    values: np.ndarray | None = None

    @property
    def length(self) -> int:
        """The number of tokens of the prefix."""
        return len(self.tokens) + (0 if self.keys is None else self.keys.shape[1])

    @property
    def digest(self) -> str:
        """The SHA-256 of the content."""
        digest = hashlib.sha256()
        for array in (np.array(self.tokens, np.int32), self.vectors, self.keys, self.values):
            if array is not None:
                digest.update(f"{array.dtype} {array.shape} ".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
            digest.update(b"|")
        return digest.hexdigest()


@dataclasses.dataclass
class Stored:
    """A prefix in the bank.

    Attributes:
      digest: of its content.
      entries: `[P]`, its places.
      tokens: the ids of the opening, to which the repetition penalty applies.
      uses: the number of prompts and waiting requests that need it.
    """

    digest: str
    entries: np.ndarray
    tokens: Sequence[int]
    uses: int = 1

    @property
    def length(self) -> int:
        """The number of tokens."""
        return len(self.entries)


class Bank:
    """Records which places are in use. The device array itself belongs to `Device`.

    It is thread-safe.

    Args:
      capacity: the number of places, each for one token.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._free = list(range(capacity))
        self._stored: dict[str, Stored] = {}
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """The number of places that hold a prefix."""
        return self.capacity - len(self._free)

    def find(self, digest: str) -> Stored | None:
        """Return a stored prefix and count one more use of it; None if it is not stored."""
        with self._lock:
            stored = self._stored.get(digest)
            if stored is not None:
                stored.uses += 1
            return stored

    def add(self, digest: str, content: Content) -> Stored:
        """Reserve places for a prefix that is not stored.

        Args:
          digest: of the content.
          content: what the prefix is computed from.

        Raises:
          UserError: if there are too few free places.
        """
        with self._lock:
            if content.length > len(self._free):
                raise UserError(
                    f"the prefix has {content.length} tokens, but the bank has room for only "
                    f"{len(self._free)} more; remove prompts, or start with a larger --bank-tokens"
                )
            entries = np.array([self._free.pop() for _ in range(content.length)], np.int32)
            stored = Stored(digest, entries, content.tokens)
            self._stored[stored.digest] = stored
            return stored

    def retain(self, stored: Stored) -> bool:
        """Count one more use of a prefix. Return False if it has lost its places."""
        with self._lock:
            stored.uses += stored.uses > 0
            return stored.uses > 0

    def release(self, stored: Stored) -> None:
        """End one use of a prefix. After the last one, its places are free."""
        with self._lock:
            stored.uses -= 1
            if not stored.uses:
                del self._stored[stored.digest]
                self._free += stored.entries.tolist()
