"""From inputs to texts: batches of few shapes, and what of the end of a text the host decides.

Axis letters: B rows, T tokens of an input, V vocabulary.
"""

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerFast

from softprompt.backbones.loading import Backbone, Prefix
from softprompt.backbones.prefix import MOST_MIXED
from softprompt.data.records import Record
from softprompt.data.task import Task, log_truncated
from softprompt.errors import UserError
from softprompt.experiment.schema import GenerationSettings
from softprompt.generation import beams, decoding
from softprompt.generation.sampling import Sampling
from softprompt.runtime.memory import run_batches
from softprompt.runtime.progress import Progress, silent

_CHUNK = 8  # tokens after which the host looks for stop texts


@dataclasses.dataclass(frozen=True)
class Request:
    """An input to write on from.

    Attributes:
      tokens: ids of its row, at least one.
      prefix: what stands in front of it, or None.
      opening: ids of what that prefix begins every row with, for the repetition penalty.
    """

    tokens: Sequence[int]
    prefix: Prefix | None
    opening: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class Generated:
    """What was written behind one input.

    Attributes:
      texts: its samples, of beam search the best one first.
      ended: whether each has come to its end (the end-of-text token or a stop text), or
        else to `max_new_tokens`.
    """

    texts: Sequence[str]
    ended: Sequence[bool]

    @property
    def text(self) -> str:
        """The first of the texts."""
        return self.texts[0]


def requests_of(
    records: Sequence[Record], task: Task, prefix: Prefix | None, settings: GenerationSettings
) -> list[Request]:
    """Records as what to write behind; says how many were cut.

    Raises:
      UserError: if a record does not fit the template, or there is no room.
    """
    task = task.for_generation(settings.max_new_tokens, prefix.length if prefix else 0)
    examples = [task.example(record, with_answer=False) for record in records]
    log_truncated(examples, task, "inputs")
    return [Request(example.input, prefix, task.opening) for example in examples]


class Engine:
    """Writes on from inputs.

    Programs are compiled for rows, input lengths and room rounded up, so for few shapes.
    What is written behind an input depends, up to rounding, on the input, the settings and the
    seed in them, not on what else is in its batch.

    Args:
      backbone: what writes.
      tokenizer: its tokenizer.
      settings: how.

    Raises:
      UserError: if the tokenizer has no end-of-text token.
    """

    def __init__(
        self, backbone: Backbone, tokenizer: PreTrainedTokenizerFast, settings: GenerationSettings
    ):
        if tokenizer.eos_token_id is None:
            raise UserError("the base model's tokenizer has no end-of-text token to stop at")
        self._backbone, self._tokenizer, self._settings = backbone, tokenizer, settings
        self._end = tokenizer.eos_token_id
        self._sampling = Sampling.of(settings)
        self._room = _power_of_two(max(settings.max_new_tokens, 16))

    def generate(
        self,
        requests: Sequence[Request],
        batch_size: int,
        label: str = "write",
        progress: Progress = silent,
    ) -> list[Generated]:
        """Continue all requests, those of like length together.

        Args:
          requests: in any order, which the results are in too.
          batch_size: the most at a time; fewer if there is no memory for as many.
          label: what stands in front of the progress bar.
          progress: shows how many texts are done.

        Raises:
          UserError: see `memory.run_batches`.
        """
        results: dict[int, Generated] = {}
        with progress(label, len(requests), "texts") as bar:
            for numbers, written in run_batches(
                _groups(requests),
                batch_size,
                lambda numbers, most: self._write_batch([requests[i] for i in numbers], most),
            ):
                results.update(zip(numbers, written, strict=True))
                bar.advance(len(numbers))
        return [results[i] for i in range(len(requests))]

    def stream(self, request: Request) -> Iterator[str]:
        """Write on from one input; yields pieces of the text as soon as they are certain.

        Raises:
          UserError: for beam search or several samples, where nothing is certain before the
            end; and see `memory.run_batches`.
        """
        settings = self._settings
        if settings.beams > 1 or settings.samples > 1:
            raise UserError("a text cannot be shown as it is written with beams or samples")
        shown = 0
        started = run_batches([[0]], 1, lambda numbers, most: self._start([request], 1))
        ((_, (prefix, state)),) = started
        while True:
            ids, done = self._ids(state)[0], bool(state.done[0])
            text, ended = self._text(ids)
            finished = done or ended or len(ids) >= settings.max_new_tokens
            certain = text if finished else text[: len(text) - self._uncertain(text)]
            if len(certain) > shown:
                yield certain[shown:]
                shown = len(certain)
            if finished:
                return
            state = self._write_on(prefix, state, len(ids) + 1)

    def _write_batch(self, requests: Sequence[Request], batch_size: int) -> list[Generated]:
        count = self._settings.samples
        rows = min(_power_of_two(len(requests)), batch_size)
        if self._settings.beams > 1:
            texts = self._search(requests, rows)
        else:
            texts = self._draw(requests, rows)
        each = [texts[i * count : (i + 1) * count] for i in range(len(requests))]
        return [Generated(*map(list, zip(*samples, strict=True))) for samples in each]

    def _draw(self, requests: Sequence[Request], rows: int) -> list[tuple[str, bool]]:
        """Text and whether it ended, of every sample of every row."""
        settings = self._settings
        chunk = _CHUNK if settings.stop else settings.max_new_tokens
        prefix, state = self._start(requests, rows)
        until = 1
        while True:
            done = np.array(state.done)
            if settings.stop:
                for row, ids in enumerate(self._ids(state)):
                    done[row] |= self._text(ids)[1]
                state = dataclasses.replace(state, done=jnp.asarray(done))
            if done.all() or until >= settings.max_new_tokens:
                return [self._text(ids) for ids in self._ids(state)]
            until = min(until + chunk, settings.max_new_tokens)
            state = self._write_on(prefix, state, until)

    def _start(self, requests: Sequence[Request], rows: int) -> tuple[Any, decoding.State]:
        """The first token of each, and the prefix for every sample."""
        samples = self._settings.samples
        prefix, tokens, lengths = _laid_out(requests, rows)
        state = decoding.start(
            self._backbone,
            prefix,
            tokens,
            lengths,
            self._seeds(requests, rows),
            self._seen(requests, rows, samples),
            self._sampling,
            np.array([self._end]),
            room=self._room,
            samples=samples,
        )
        return prefix and prefix.repeated(samples), state

    def _write_on(self, prefix, state: decoding.State, until: int) -> decoding.State:
        ends = np.array([self._end])
        return decoding.continue_decoding(
            self._backbone, prefix, state, self._sampling, ends, np.array(until)
        )

    def _search(self, requests: Sequence[Request], rows: int) -> list[tuple[str, bool]]:
        settings = self._settings
        prefix, tokens, lengths = _laid_out(requests, rows)
        how = (
            self._sampling,
            np.array([self._end]),
            np.float32(settings.length_penalty),
            np.array(settings.max_new_tokens),
        )
        seen = self._seen(requests, rows, settings.beams)
        shape = {"room": self._room, "beams": settings.beams}
        state = beams.start(self._backbone, prefix, tokens, lengths, seen, *how, **shape)
        state = beams.search_on(
            self._backbone, prefix and prefix.repeated(settings.beams), state, *how
        )
        written, counts = np.asarray(state.finished.written), np.asarray(state.finished.lengths)
        return [
            self._text(written[row, i, : counts[row, i]].tolist())
            for row in range(len(requests))
            for i in range(settings.samples)
        ]

    def _ids(self, state: decoding.State) -> list[list[int]]:
        """What each row has written."""
        rows = zip(np.asarray(state.written), np.asarray(state.lengths), strict=True)
        return [ids[:length].tolist() for ids, length in rows]

    def _text(self, ids: Sequence[int]) -> tuple[str, bool]:
        """The text of what was written, and whether it has come to its end."""
        ended = bool(ids) and ids[-1] == self._end
        text = str(self._tokenizer.decode(ids[:-1] if ended else ids))
        places = [(text.find(stop), len(stop)) for stop in self._settings.stop]
        complete = [(place + size, place) for place, size in places if place >= 0]
        return (text[: min(complete)[1]], True) if complete else (text, ended)

    def _uncertain(self, text: str) -> int:
        """How many characters at the end of an unfinished text may still change."""
        longest = len(text) - len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
        for stop in self._settings.stop:
            for length in range(1, min(len(stop), len(text)) + 1):
                if text.endswith(stop[:length]):
                    longest = max(longest, length)
        return longest

    def _seeds(self, requests: Sequence[Request], rows: int) -> np.ndarray:
        """`[B]`, of an input and the number of its sample."""
        samples = self._settings.samples
        seeds = np.zeros((rows, samples), np.uint32)
        for row, request in zip(seeds, requests, strict=False):
            content = np.array(request.tokens, np.int32).tobytes()
            for i in range(samples):
                row[i] = zlib.crc32(content + f"{self._settings.seed} {i}".encode())
        return seeds.reshape(-1)

    def _seen(self, requests: Sequence[Request], rows: int, copies: int) -> np.ndarray | None:
        """`[B, V]`, which tokens have been read; None if there is no penalty for them."""
        if self._settings.repetition_penalty is None:
            return None
        seen = np.zeros((rows, self._backbone.arch.vocab_size), bool)
        if not self._backbone.separate_targets:  # whose penalty is for what it writes
            for row, request in zip(seen, requests, strict=False):
                row[[token for token in (*request.opening, *request.tokens) if token >= 0]] = True
        return seen.repeat(copies, axis=0)


def _groups(requests: Sequence[Request]) -> Iterator[list[int]]:
    """Numbers of the requests, in groups whose prefixes can be read together."""
    lengths = {id(r.prefix): r.prefix.length for r in requests if r.prefix is not None}
    order = list(lengths) if sum(lengths.values()) > MOST_MIXED else []

    def place(number: int) -> tuple[int, int]:
        """By length; but those of one prefix together if not all prefixes can be."""
        key = id(requests[number].prefix)
        return order.index(key) if key in order else -1, len(requests[number].tokens)

    group: list[int] = []
    prefixes: dict[int, int] = {}  # lengths, by identity
    for number in sorted(range(len(requests)), key=place):
        prefix = requests[number].prefix
        own = {} if prefix is None else {id(prefix): prefix.length}
        together = prefixes | own
        fits = len(together) == 1 or sum(together.values()) <= MOST_MIXED
        if group and not fits:
            yield group
            group, together = [], own
        group.append(number)
        prefixes = together
    if group:
        yield group


def _laid_out(requests: Sequence[Request], rows: int) -> tuple[Any, np.ndarray, np.ndarray]:
    """The prefix of so many rows, their tokens `[B, T]` and lengths `[B]`; some may be empty."""
    width = _rounded(max(len(request.tokens) for request in requests))
    tokens, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
    for row, request in enumerate(requests):
        lengths[row] = len(request.tokens)
        tokens[row, : lengths[row]] = request.tokens
    prefixes = {id(r.prefix): r.prefix for r in requests if r.prefix is not None}
    if not prefixes:
        return None, tokens, lengths
    number = {key: i for i, key in enumerate(prefixes)}
    of_rows = [number.get(id(request.prefix)) for request in requests]
    of_rows += [of_rows[0]] * (rows - len(requests))
    all_of_them: list[Any] = list(prefixes.values())
    return type(all_of_them[0]).packed(all_of_them, of_rows), tokens, lengths


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _rounded(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96 and so on."""
    power = max(_power_of_two(length), 16)
    return 3 * power // 4 if power > 16 and length <= 3 * power // 4 else power
