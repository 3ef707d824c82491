"""The generation engine: from inputs to texts, in batches of few shapes.

The device decodes tokens. The host pads inputs, packs prefixes and looks for stop texts.

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
from softprompt.backbones.prefix import MAX_PACKED_TOKENS
from softprompt.data.datasets import log_truncated
from softprompt.data.records import Record
from softprompt.data.task import Task
from softprompt.errors import UserError
from softprompt.experiment.schema import GenerationSettings
from softprompt.generation import beams, decoding
from softprompt.generation.sampling import Sampling
from softprompt.generation.text import AnswerText
from softprompt.runtime.finite import model_not_finite
from softprompt.runtime.memory import run_batches
from softprompt.runtime.progress import Progress, silent

_CHUNK = 8  # the host looks for stop texts after this many tokens


@dataclasses.dataclass(frozen=True)
class Request:
    """An input to continue.

    Attributes:
      tokens: its ids, at least one.
      prefix: what it attends to first, or None.
      opening: the ids of the tokens in the prefix, to which the repetition penalty applies.
        Virtual tokens have negative ids.
      seed: replaces the seed of the settings, so that equal inputs get different texts.
    """

    tokens: Sequence[int]
    prefix: Prefix | None
    opening: Sequence[int] = ()
    seed: int | None = None


@dataclasses.dataclass(frozen=True)
class Generated:
    """The texts generated for one input.

    Attributes:
      texts: one text per sample. Beam search returns the best text first.
      ended: for each text, whether it ended with the end-of-text token or a stop text. False
        if it was cut off at `max_new_tokens`.

    Examples:
      >>> prompt = load_prompt("runs/summarize")
      >>> result = prompt.generate(["A tool that shows manuals."], max_new_tokens=8)[0]
      >>> len(result.texts), len(result.ended)
      (1, 1)
      >>> result.text == result.texts[0]
      True
    """

    texts: Sequence[str]
    ended: Sequence[bool]

    @property
    def text(self) -> str:
        """The first text."""
        return self.texts[0]


def requests_of(
    records: Sequence[Record], task: Task, prefix: Prefix | None, settings: GenerationSettings
) -> list[Request]:
    """Encode records as requests, and log how many inputs were truncated.

    Args:
      records: the inputs.
      task: encodes them.
      prefix: the prefix of all inputs, or None.
      settings: `max_new_tokens` limits the length of the inputs.

    Raises:
      UserError: if a record does not fit the template, or the context window is too short.
    """
    task = task.for_generation(settings.max_new_tokens, prefix.length if prefix else 0)
    examples = list(task.examples(records, with_answer=False))
    log_truncated(sum(e.truncated for e in examples), task, "inputs")
    return [Request(example.input, prefix, task.opening) for example in examples]


class Engine:
    """Generates texts with one backbone and one `GenerationSettings`.

    Programs are compiled per shape. The number of rows, the input length and the capacity are
    rounded up, so there are few shapes. The text of an input depends on the input, its prefix,
    the settings and their seed. The rest of its batch has no effect but rounding errors.

    Args:
      backbone: the model.
      tokenizer: its tokenizer.
      settings: for all inputs.

    Raises:
      UserError: if the tokenizer has no end-of-text token.
    """

    def __init__(
        self, backbone: Backbone, tokenizer: PreTrainedTokenizerFast, settings: GenerationSettings
    ):
        if tokenizer.eos_token_id is None:
            raise UserError("the base model's tokenizer has no end-of-text token to stop at")
        self._backbone, self._tokenizer, self._settings = backbone, tokenizer, settings
        self._answer, self._end = AnswerText(tokenizer, settings.stop), tokenizer.eos_token_id
        self._capacity = _power_of_two(max(settings.max_new_tokens, 16))

    def generate(
        self,
        requests: Sequence[Request],
        batch_size: int,
        label: str = "generate",
        progress: Progress = silent,
    ) -> list[Generated]:
        """Generate texts for all requests. Requests of similar length share a batch.

        Args:
          requests: in any order.
          batch_size: the maximum number of inputs in a batch; reduced if the device runs out
            of memory.
          label: the label of the progress bar.
          progress: shows how many inputs are done.

        Returns:
          The texts, in the order of the requests.

        Raises:
          UserError: see `memory.run_batches`.
        """
        results: dict[int, Generated] = {}
        with progress(label, len(requests), "texts") as bar:
            for indices, generated in run_batches(
                _mixable_groups(requests),
                batch_size,
                lambda indices, most: self._run_batch([requests[i] for i in indices], most),
            ):
                results.update(zip(indices, generated, strict=True))
                bar.advance(len(indices))
        return [results[i] for i in range(len(requests))]

    def stream(self, request: Request) -> Iterator[str]:
        """Generate a text and yield pieces of it as soon as they are final.

        Raises:
          UserError: for beam search or several samples, whose text is final only at the end;
            see also `memory.run_batches`.
        """
        settings = self._settings
        if settings.beams > 1 or settings.samples > 1:
            raise UserError("streaming supports neither beam search nor several samples")
        yielded = 0
        started = run_batches([[0]], 1, lambda indices, most: self._start([request], 1))
        ((_, (prefix, state)),) = started
        while True:
            ids, done = self._ids(state)[0], bool(state.done[0])
            text, ended = self._answer.text(ids)
            finished = done or ended or len(ids) >= settings.max_new_tokens
            final = text if finished else self._answer.final(text)
            if len(final) > yielded:
                yield final[yielded:]
                yielded = len(final)
            if finished:
                return
            state = self._continue(prefix, state, len(ids) + 1)

    def _run_batch(self, requests: Sequence[Request], batch_size: int) -> list[Generated]:
        count = self._settings.samples
        rows = min(_power_of_two(len(requests)), batch_size)
        if self._settings.beams > 1:
            texts = self._search(requests, rows)
        else:
            texts = self._decode(requests, rows)
        each = [texts[i * count : (i + 1) * count] for i in range(len(requests))]
        return [Generated(*map(list, zip(*samples, strict=True))) for samples in each]

    def _decode(self, requests: Sequence[Request], rows: int) -> list[tuple[str, bool]]:
        """Text and whether it ended, for every sample of every row."""
        settings = self._settings
        chunk = _CHUNK if settings.stop else settings.max_new_tokens
        prefix, state = self._start(requests, rows)
        until = 1
        while True:
            done = np.array(state.done)
            if settings.stop:
                for row, ids in enumerate(self._ids(state)):
                    done[row] |= self._answer.text(ids)[1]
                state = dataclasses.replace(state, done=jnp.asarray(done))
            if done.all() or until >= settings.max_new_tokens:
                return [self._answer.text(ids) for ids in self._ids(state)]
            until = min(until + chunk, settings.max_new_tokens)
            state = self._continue(prefix, state, until)

    def _start(self, requests: Sequence[Request], rows: int) -> tuple[Any, decoding.State]:
        """Generate the first token of each sample; also return the prefix of all samples."""
        samples = self._settings.samples
        prefix, tokens, lengths = _pad_batch(requests, rows)
        state = decoding.start(
            self._backbone,
            prefix,
            tokens,
            lengths,
            self._seeds(requests, rows),
            self._seen(requests, rows, samples),
            Sampling.from_settings(self._settings, rows * samples),
            self._ends(rows * samples),
            capacity=self._capacity,
            samples=samples,
        )
        return prefix and prefix.repeated(samples), state

    def _continue(self, prefix, state: decoding.State, until: int) -> decoding.State:
        limits = np.full(len(state.lengths), until, np.int32)
        return decoding.continue_decoding(self._backbone, prefix, state, limits)

    def _search(self, requests: Sequence[Request], rows: int) -> list[tuple[str, bool]]:
        settings = self._settings
        prefix, tokens, lengths = _pad_batch(requests, rows)
        arguments = (
            Sampling.from_settings(settings, rows * settings.beams).repetition_penalty,
            self._ends(rows),
            np.float32(settings.length_penalty),
            np.array(settings.max_new_tokens),
        )
        seen = self._seen(requests, rows, settings.beams)
        shape = {"capacity": self._capacity, "beams": settings.beams}
        state = beams.start(self._backbone, prefix, tokens, lengths, seen, *arguments, **shape)
        state = beams.continue_search(
            self._backbone, prefix and prefix.repeated(settings.beams), state, *arguments
        )
        if np.isnan([state.running.scores, state.finished.scores]).any():
            raise model_not_finite("logits")
        ids, counts = np.asarray(state.finished.tokens), np.asarray(state.finished.lengths)
        return [
            self._answer.text(ids[row, i, : counts[row, i]].tolist())
            for row in range(len(requests))
            for i in range(settings.samples)
        ]

    def _ids(self, state: decoding.State) -> list[list[int]]:
        """The generated ids of each row."""
        tokens, lengths = np.asarray(state.tokens), np.asarray(state.lengths)
        if (tokens < 0).any():
            raise model_not_finite("logits")
        return [ids[:length].tolist() for ids, length in zip(tokens, lengths, strict=True)]

    def _ends(self, rows: int) -> np.ndarray:
        return np.full((rows, 1), self._end, np.int32)

    def _seeds(self, requests: Sequence[Request], rows: int) -> np.ndarray:
        """For each sample a hash of the input, the seed and its index, `[B * samples]`."""
        samples = self._settings.samples
        seeds = np.zeros((rows, samples), np.uint32)
        for row, request in zip(seeds, requests, strict=False):
            seed = self._settings.seed if request.seed is None else request.seed
            row[:] = [sample_seed(request.tokens, seed, i) for i in range(samples)]
        return seeds.reshape(-1)

    def _seen(self, requests: Sequence[Request], rows: int, copies: int) -> np.ndarray | None:
        """The tokens that were read, `[B * copies, V]`; None without a repetition penalty."""
        if self._settings.repetition_penalty is None:
            return None
        seen = np.zeros((rows, self._backbone.arch.vocab_size), bool)
        if not self._backbone.separate_targets:  # there only generated tokens are penalized
            for row, request in zip(seen, requests, strict=False):
                row[[token for token in (*request.opening, *request.tokens) if token >= 0]] = True
        return seen.repeat(copies, axis=0)


def sample_seed(tokens: Sequence[int], seed: int, sample: int) -> int:
    """Return the random seed of a sample: a hash of the input's ids, a seed and its number."""
    return zlib.crc32(np.array(tokens, np.int32).tobytes() + f"{seed} {sample}".encode())


def _mixable_groups(requests: Sequence[Request]) -> Iterator[list[int]]:
    """Group the indices of requests by prefixes that can be packed into one batch."""
    lengths = {id(r.prefix): r.prefix.length for r in requests if r.prefix is not None}
    order = list(lengths) if sum(lengths.values()) > MAX_PACKED_TOKENS else []

    def rank(index: int) -> tuple[int, int]:
        """Sort by length; if the prefixes do not all fit into one batch, by prefix first."""
        key = id(requests[index].prefix)
        return order.index(key) if key in order else -1, len(requests[index].tokens)

    group: list[int] = []
    packed: dict[int, int] = {}  # the lengths of the group's prefixes, by identity
    for index in sorted(range(len(requests)), key=rank):
        prefix = requests[index].prefix
        own = {} if prefix is None else {id(prefix): prefix.length}
        together = packed | own
        fits = len(together) == 1 or sum(together.values()) <= MAX_PACKED_TOKENS
        if group and not fits:
            yield group
            group, together = [], own
        group.append(index)
        packed = together
    if group:
        yield group


def _pad_batch(requests: Sequence[Request], rows: int) -> tuple[Any, np.ndarray, np.ndarray]:
    """The packed prefix, tokens `[B, T]` and lengths `[B]`; rows without a request have length 0.

    Args:
      requests: at most `rows`.
      rows: B.
    """
    width = _rounded(max(len(request.tokens) for request in requests))
    tokens, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
    for row, request in enumerate(requests):
        lengths[row] = len(request.tokens)
        tokens[row, : lengths[row]] = request.tokens
    prefixes = {id(r.prefix): r.prefix for r in requests if r.prefix is not None}
    if not prefixes:
        return None, tokens, lengths
    index_of = {key: i for i, key in enumerate(prefixes)}
    indices = [index_of.get(id(request.prefix)) for request in requests]
    indices += [indices[0]] * (rows - len(requests))
    all_prefixes: list[Any] = list(prefixes.values())
    return type(all_prefixes[0]).packed(all_prefixes, indices), tokens, lengths


def _power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()


def _rounded(length: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, … that is at least `length`."""
    power = max(_power_of_two(length), 16)
    return 3 * power // 4 if power > 16 and length <= 3 * power // 4 else power
