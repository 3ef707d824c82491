"""The state on the device: the slots, the bank of prefixes, and the programs that use them.

`compile` compiles all programs. Later calls pad their arrays to the same shapes.

Axis letters: B slots, S cache slots of a row, M targets of a batch, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.backbones.batch import Batch
from softprompt.data.layout import Layout, PackedShape
from softprompt.generation import banked
from softprompt.generation import slots as programs
from softprompt.generation.sampling import Sampling
from softprompt.generation.slots import ENDS, Generated, Occupant, Read
from softprompt.runtime.progress import Progress, silent
from softprompt.serving.bank import Content, Stored

MOST_TARGETS = 64
"""The maximum number of tokens of all labels of a prompt together."""

SHORT_CHUNK = 32
"""The maximum number of tokens of a chunk that is read together with others."""

_USUAL_CHUNK = 16  # tokens: a call that reads N tokens can read N / 16 chunks
_FIRST_WIDTH = 128  # smallest padded number of attended tokens, and of tokens of a prefix


class Chunk(NamedTuple):
    """A part of the input of a slot.

    Attributes:
      row: the number of the slot.
      tokens: the ids.
      following: the id after each of them; -1 if it is not scored. May be shorter.
      complete: whether the chunk ends the input.
    """

    row: int
    tokens: Sequence[int]
    following: Sequence[int]
    complete: bool


class ReadShape(NamedTuple):
    """The size of a call that reads chunks.

    Attributes:
      tokens: the maximum number of tokens of all chunks together.
      rows: the maximum number of chunks.
      longest: the maximum number of tokens of each chunk.
    """

    tokens: int
    rows: int
    longest: int

    def fits(self, needed: "ReadShape") -> bool:
        """Return whether chunks with a size fit."""
        return all(have >= need for have, need in zip(self, needed, strict=True))


class Device:
    """The arrays on the device.

    Args:
      backbone: a causal model.
      slots: B, the number of requests that generate at the same time.
      length: S, the maximum number of tokens of a request: prefix, input and new tokens.
      bank_tokens: the number of places for tokens of prefixes.
      chunk: the maximum number of tokens that one call reads, a power of two, at least
        `SHORT_CHUNK`.
    """

    def __init__(self, backbone, slots: int, length: int, bank_tokens: int, chunk: int = 128):
        self.slots, self.length, self.chunk = slots, length, chunk
        self._backbone = backbone
        self._vocabulary = backbone.arch.vocab_size
        self._hidden = backbone.arch.hidden_size
        self._state = programs.empty_slots(backbone, slots, length)
        layers, _, heads, size = backbone.prefix_shape(0)
        shape = layers, bank_tokens, heads, size
        dtype = backbone.embedding.table.dtype
        self._bank = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
        self._bank_tokens = bank_tokens
        self._widths = list(_widths(length))
        # Few requests should not compute all slots.
        self._decoded_rows = sorted({1, -(-slots // 4), -(-slots // 2), slots})
        self._few_widths = list(dict.fromkeys([self._widths[0], length]))  # for large programs
        self._scoring_programs: dict[Any, Any] = {}
        self._nothing = Stored("", np.zeros(0, np.int32), ())
        self._unseen = np.zeros(self._vocabulary, bool)

    @property
    def read_shapes(self) -> list[ReadShape]:
        """What one call can read, from small to large: several short chunks or one long chunk."""
        shapes, tokens = [], _USUAL_CHUNK
        while tokens <= min(self.chunk, self.slots * SHORT_CHUNK):
            rows = min(tokens // _USUAL_CHUNK, self.slots)
            shapes.append(ReadShape(tokens, rows, min(tokens, SHORT_CHUNK)))
            tokens *= 2
        return [*shapes, ReadShape(self.chunk, 1, self.chunk)]

    @property
    def largest_shared_read(self) -> ReadShape:
        """The largest of `read_shapes` for several chunks."""
        return self.read_shapes[-2]

    def compile(self, *, labels: bool, progress: Progress = silent) -> None:
        """Compile all programs, most of them by a call on empty slots.

        Args:
          labels: whether labels will be scored.
          progress: shows how many programs are compiled.
        """
        calls = [*self._all_calls(), *(self._scoring_calls() if labels else ())]
        with progress("compile", len(calls), "programs") as bar:
            for call, *arguments in calls:
                call(*arguments)
                jax.block_until_ready(self._state.last)
                bar.advance()
        self.reset()

    def reset(self) -> None:
        """Empty all slots.

        Raises:
          RuntimeError: if a call that failed has lost the bank.
        """
        if any(array.is_deleted() for array in self._bank):
            raise RuntimeError("the bank of prefixes is lost")
        self._state = programs.empty_slots(self._backbone, self.slots, self.length)

    def _all_calls(self) -> Iterator[tuple[Any, ...]]:
        for width in self._widths:
            tokens = np.zeros(width, np.int32)
            prefix = np.zeros(self._backbone.prefix_shape(width), np.float32)
            yield self.place, 0, Content(keys=prefix, values=prefix)
            yield self.store, 0, Stored("", np.minimum(tokens, 0), ())
            yield self.occupy, 0, Stored("", tokens, ()), occupant(self._unseen)
            for rows in self._decoded_rows:
                yield self._decode, 1, rows, width
        for width in self._few_widths:
            for shape in self.read_shapes:
                yield self._read, [Chunk(0, [0], [0], False)], shape, width
        yield self.read_opening, 0, Content([~0], np.zeros((1, self._hidden), np.float32))
        yield self.release, []

    def _scoring_calls(self) -> Iterator[tuple[Any, ...]]:
        layout = Layout(separate_targets=False, branching=True)
        for width in self._few_widths:
            prefix = Stored("", np.zeros(width, np.int32), ())
            for shape in self.scoring_shapes:
                yield self._scoring, prefix, layout.lay_out([[]], shape)

    # Labels.

    @property
    def scoring_shapes(self) -> list[PackedShape]:
        """The shapes of the batches that `score` takes, from small to large."""
        most = self.length
        sizes = [  # rows, tokens, tokens of a row, targets of a row
            (1, 64, 64, 8),
            (8, 256, 64, 8),
            (32, 512, 64, 8),
            (32, 1024, 64, 8),
            (8, 1024, 256, 8),
            (1, most, most, 8),
            (8, 1024, 256, MOST_TARGETS),
            (1, most, most, MOST_TARGETS),
        ]
        return [
            PackedShape(1, rows, tokens, rows * targets, length, targets)
            for rows, tokens, length, targets in sizes
        ]

    def score(self, prefix: Stored, batch: Batch) -> np.ndarray:
        """Return the log-probability of each target of a batch, `[1, M]`.

        Args:
          prefix: the prefix of all rows.
          batch: has one of the `scoring_shapes`.
        """
        program, arguments = self._scoring(prefix, batch)
        return np.asarray(program(*arguments))

    def _scoring(self, prefix: Stored, batch: Batch) -> tuple[Any, tuple[Any, ...]]:
        """Return the program for a batch, and its arguments.

        It is compiled without running, because a run on padding would take seconds.
        """
        width = _smallest(self._few_widths, prefix.length)
        entries = np.zeros(width, np.int32)
        entries[: prefix.length] = prefix.entries
        arguments = self._backbone, self._bank, entries, np.int32(prefix.length), batch
        key = jax.tree.structure(batch), *(array.shape for array in jax.tree.leaves(arguments[2:]))
        if key not in self._scoring_programs:
            self._scoring_programs[key] = banked.score.lower(*arguments).compile()
        return self._scoring_programs[key], arguments

    # Requests.

    def occupy(self, row: int, prefix: Stored | None, new: Occupant) -> None:
        """Put a request into a slot. Copy its prefix from the bank, if it has one."""
        prefix = prefix or self._nothing
        entries = self._padded(prefix.entries, fill=0)
        length = np.int32(prefix.length)
        self._state = programs.occupy(self._state, np.int32(row), self._bank, entries, length, new)

    def read(self, chunks: Sequence[Chunk], attended: int) -> Read:
        """Read chunks of the inputs of some slots.

        Args:
          chunks: fit one of `read_shapes`.
          attended: the maximum number of tokens that one of the slots has read before.
        """
        lengths = [len(chunk.tokens) for chunk in chunks]
        needed = ReadShape(sum(lengths), len(chunks), max(lengths))
        shape = next(shape for shape in self.read_shapes if shape.fits(needed))
        return self._read(chunks, shape, _smallest(self._few_widths, attended))

    def _read(self, chunks: Sequence[Chunk], shape: ReadShape, width: int) -> Read:
        rows, lengths = np.full(shape.rows, self.slots, np.int32), np.zeros(shape.rows, np.int32)
        tokens, following = np.zeros(shape.tokens, np.int32), np.full(shape.tokens, -1, np.int32)
        complete, start = np.zeros(shape.rows, bool), 0
        for i, chunk in enumerate(chunks):
            rows[i], lengths[i], complete[i] = chunk.row, len(chunk.tokens), chunk.complete
            tokens[start : start + len(chunk.tokens)] = chunk.tokens
            following[start : start + len(chunk.following)] = chunk.following
            start += len(chunk.tokens)
        packed = programs.Chunks(rows, lengths, tokens, following, complete)
        sizes = {"longest": shape.longest, "attended": width}
        self._state, read = programs.read(self._backbone, self._state, packed, **sizes)
        return read

    def decode(self, steps: int, rows: int, longest: int) -> Generated:
        """Generate tokens in all active slots.

        Args:
          steps: the number of tokens, at most `STEPS`.
          rows: all active slots are among the first `rows` slots.
          longest: the maximum number of tokens that an active slot has read.
        """
        width = _smallest(self._widths, min(longest + steps, self.length))
        return self._decode(steps, _smallest(self._decoded_rows, rows), width)

    def _decode(self, steps: int, rows: int, width: int) -> Generated:
        self._state, generated = programs.decode(
            self._backbone, self._state, np.int32(steps), rows=rows, attended=width
        )
        return generated

    def release(self, rows: Sequence[int]) -> None:
        """Stop generating in some slots."""
        chosen = np.zeros(self.slots, bool)
        chosen[list(rows)] = True
        self._state = programs.release(self._state, chosen)

    def unseen(self) -> np.ndarray:
        """Return `[V]` booleans for a request that has seen no token."""
        return self._unseen

    # Prefixes.

    def place(self, row: int, content: Content) -> None:
        """Put the keys and values of a content into a slot. They become its only tokens."""
        shape = self._backbone.prefix_shape(0)
        keys = np.zeros(shape, np.float32) if content.keys is None else content.keys
        values = np.zeros(shape, np.float32) if content.values is None else content.values
        length = keys.shape[1]
        more = [(0, 0), (0, _smallest(self._widths, length) - length), (0, 0), (0, 0)]
        self._state = banked.place(
            self._state, np.int32(row), np.pad(keys, more), np.pad(values, more), np.int32(length)
        )

    def read_opening(self, row: int, content: Content, begin: int = 0) -> int:
        """Read a chunk of a content's opening in a slot. Return the number of the next token."""
        part = np.array(content.tokens[begin : begin + self.chunk], np.int32)
        tokens = np.zeros(self.chunk, np.int32)
        tokens[: len(part)] = part
        vectors = np.zeros((self.chunk, self._hidden), np.float32)
        virtual = part < 0
        if content.vectors is not None:
            vectors[: len(part)][virtual] = content.vectors[~part[virtual]]
        self._state = banked.read_opening(
            self._backbone, self._state, np.int32(row), tokens, vectors, np.int32(len(part))
        )
        return begin + len(part)

    def store(self, row: int, stored: Stored) -> None:
        """Copy the first tokens of a slot to the places of a prefix in the bank."""
        entries = self._padded(stored.entries, fill=self._bank_tokens)
        self._bank = banked.store(self._bank, self._state, np.int32(row), entries)

    def _padded(self, entries: np.ndarray, fill: int) -> np.ndarray:
        padded = np.full(_smallest(self._widths, len(entries)), fill, np.int32)
        padded[: len(entries)] = entries
        return padded


def occupant(
    seen: np.ndarray,
    *,
    limit: int = 1,
    seed: int = 0,
    temperature: float = 0,
    top_k: int = 0,
    top_p: float = 1,
    min_p: float = 0,
    repetition_penalty: float = 1,
    ends: Sequence[int] = (),
    scored: bool = False,
) -> Occupant:
    """Return the values that a request sets in its slot, in the types of the programs.

    Args:
      seen: `[V]` booleans, the tokens to which the repetition penalty applies.
      limit: the number of tokens to generate.
      seed: of the random key, below 2**32.
      temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`.
      ends: the ids that end the row.
      scored: whether log-probabilities are wanted.
    """
    padded = np.full(ENDS, -1, np.int32)
    padded[: len(ends)] = ends
    floats = map(np.float32, (temperature, top_p, min_p, repetition_penalty))
    warmth, nucleus, least, penalty = floats
    values: list[Any] = [warmth, np.int32(top_k), nucleus, least, penalty]
    sampling = Sampling(*values)
    return Occupant(np.int32(limit), np.uint32(seed), sampling, padded, seen, np.bool_(scored))


def _smallest(widths: Sequence[int], needed: int) -> int:
    """Return the smallest width that is at least `needed`."""
    return next(width for width in widths if width >= needed)


def _widths(length: int) -> Iterator[int]:
    """Yield the powers of two from `_FIRST_WIDTH` on, up to a length, and the length."""
    width = _FIRST_WIDTH
    while width < length:
        yield width
        width *= 2
    yield length
