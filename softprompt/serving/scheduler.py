"""Continuous batching: the scheduler assigns slots, prefill and decoding between device calls.

One thread owns the device. In every round it fills free slots, reads a limited number of tokens of
new inputs (chunked prefill), and generates a few tokens in all slots. Therefore a long input does
not block other requests, and a slot that becomes free is filled in the next round.
"""

import collections
import dataclasses
import heapq
import itertools
import logging
import threading
import time
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerFast

from softprompt.data.examples import Example
from softprompt.errors import UserError
from softprompt.generation.slots import STEPS, Generated
from softprompt.generation.text import AnswerText
from softprompt.runtime.finite import model_not_finite
from softprompt.serving.bank import Bank, Content, Stored
from softprompt.serving.device import SHORT_CHUNK, Chunk, Device, occupant
from softprompt.serving.jobs import Job, ScoredToken, Update, scored_tokens
from softprompt.serving.loader import Loader
from softprompt.serving.scorer import Scored, Scorer

_log = logging.getLogger(__name__)

_DECODE_SECONDS = 0.15  # per round while a slot is free, so that a new request starts soon


class Busy(Exception):
    """Too many requests are waiting, or the server is stopping."""


class Removed(Exception):
    """The prompt of a request was removed before the request began."""


@dataclasses.dataclass
class _Request:
    """A job in a slot."""

    job: Job
    row: int
    answer: AnswerText
    read: int = 0  # tokens of the input
    ids: list[int] = dataclasses.field(default_factory=list)
    delivered: int = 0  # characters of the answer
    input: list[ScoredToken] = dataclasses.field(default_factory=list)

    @property
    def length(self) -> int:
        """The number of tokens in its row of the cache."""
        prefix = 0 if self.job.prefix is None else self.job.prefix.length
        return prefix + self.read + max(len(self.ids) - 1, 0)

    @property
    def left(self) -> int:
        """The number of tokens of the input that are still to be read."""
        return len(self.job.tokens) - self.read

    def chunk(self, size: int) -> Chunk:
        """Return the next tokens of the input, at most `size`."""
        tokens, end = self.job.tokens, self.read + size
        following = tokens[self.read + 1 : end + 1] if self.job.score_input else []
        return Chunk(self.row, tokens[self.read : end], following, end >= len(tokens))


class Scheduler:
    """Runs jobs on a device.

    Args:
      device: the device. No one else may use it while the thread runs.
      bank: the places of the prefixes on the device.
      tokenizer: the base model's.
      max_waiting: the maximum number of jobs that wait for a slot.
    """

    def __init__(
        self, device: Device, bank: Bank, tokenizer: PreTrainedTokenizerFast, max_waiting: int
    ):
        self._device, self._bank, self._tokenizer = device, bank, tokenizer
        self._free = list(range(device.slots))  # a heap, so that the active slots are the first
        self._loader, self._scorer = Loader(device, bank, self._free), Scorer(device)
        self._max_waiting = max_waiting
        self._changed = threading.Condition()
        self._waiting: collections.deque[Job] = collections.deque()
        self._reading: list[_Request] = []
        self._generating: list[_Request] = []
        self._step_seconds = 1.0  # of the last call that generated
        self._stopping = self._draining = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    # For other threads.

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, *, drain: bool) -> None:
        """Stop the thread. With `drain`, finish all jobs first; otherwise they fail."""
        with self._changed:
            self._draining = True
            self._stopping = not drain
            self._changed.notify()
        self._thread.join()

    def submit(self, job: Job) -> None:
        """Run a job.

        Raises:
          Busy: if too many jobs are waiting, or the scheduler is stopping.
          Removed: if the prefix of the job has been removed.
        """
        with self._changed:
            if self._draining or len(self._waiting) >= self._max_waiting:
                raise Busy
            if job.prefix is not None and not self._bank.retain(job.prefix):
                raise Removed
            self._waiting.append(job)
            self._changed.notify()

    def load(self, content: Content) -> Stored:
        """Compute a prefix, put it into the bank, and wait for it.

        A prefix with the same content in the bank is shared. Every `load` needs a `release`.

        Raises:
          UserError: if the bank is too full, or the prefix too long for a slot.
          Busy: if the scheduler is stopping.
        """
        if content.length >= self._device.length:
            raise UserError(
                f"the prefix has {content.length} tokens, but a request may have at most "
                f"{self._device.length}; start with a larger --max-tokens"
            )
        digest = content.digest  # takes a while, so that the other thread must not wait for it
        with self._changed:
            if self._draining:
                raise Busy
            done = self._loader.add(digest, content)
            self._changed.notify()
        return done.result()

    def score(self, prefix: Stored, examples: Sequence[Example]) -> list[Scored]:
        """Return futures of the log-probabilities of each example's candidates, `[C]`.

        Raises:
          Busy: as for `submit`.
          Removed: as for `submit`.
          UserError: if an example is too long.
        """
        for example in examples:
            self._scorer.require_fitting(prefix, example)
        with self._changed:
            if self._draining or self._scorer.pending >= self._max_waiting:
                raise Busy
            if not all([self._bank.retain(prefix) for _ in examples]):
                raise Removed
            scored = [self._scorer.add(prefix, example) for example in examples]
            self._changed.notify()
        for each in scored:
            each.add_done_callback(lambda _: self._bank.release(prefix))
        return scored

    def release(self, stored: Stored) -> None:
        """End one use of a prefix."""
        self._bank.release(stored)

    @property
    def is_running(self) -> bool:
        """Whether the thread runs. It ends by itself if the device cannot be used again."""
        return self._thread.is_alive()

    @property
    def length(self) -> int:
        """The maximum number of tokens of a request: prefix, input and new tokens."""
        return self._device.length

    @property
    def waiting(self) -> int:
        """The number of jobs that wait for a slot."""
        return len(self._waiting)

    @property
    def occupied(self) -> int:
        """The number of slots in use."""
        return self._device.slots - len(self._free)

    # The thread.

    def _run(self) -> None:
        try:
            while self._goes_on():
                try:
                    self._round()
                except Exception as error:  # the thread must continue for later requests
                    _log.exception("a call on the device failed")
                    self._fail_all(error)
                    self._device.reset()
        finally:
            with self._changed:
                self._draining = True  # nobody may wait for a thread that has ended
            self._fail_all(Busy())

    def _goes_on(self) -> bool:
        """Wait for work. Return False if the thread has to end."""
        with self._changed:
            self._changed.wait_for(self._has_work)
            return not self._stopping and self._has_jobs()

    def _has_work(self) -> bool:
        return self._draining or self._has_jobs()

    def _has_jobs(self) -> bool:
        running = self._reading or self._generating
        return bool(self._waiting or running or self._loader.pending or self._scorer.pending)

    def _round(self) -> None:
        self._drop_cancelled()
        self._fill_slots()
        self._loader.run()
        self._scorer.run()
        self._read()
        self._generate()

    def _drop_cancelled(self) -> None:
        with self._changed:
            dropped = [job for job in self._waiting if job.cancelled]
            for job in dropped:
                self._waiting.remove(job)
        for job in dropped:
            self._forget_prefix(job)
        running = [*self._reading, *self._generating]
        self._free_slots([each for each in running if each.job.cancelled])

    def _forget_prefix(self, job: Job) -> None:
        if job.prefix is not None:
            self._bank.release(job.prefix)

    def _free_slots(self, requests: Sequence[_Request]) -> None:
        if not requests:
            return
        self._device.release([each.row for each in requests])
        for each in requests:
            (self._reading if each in self._reading else self._generating).remove(each)
            heapq.heappush(self._free, each.row)

    # Requests.

    def _fill_slots(self) -> None:
        """Give free slots to prefixes that wait, and then to jobs."""
        self._loader.begin()
        while self._free:
            with self._changed:
                if not self._waiting:
                    return
                job = self._waiting.popleft()
            if job.cancelled:
                self._forget_prefix(job)
                continue
            answer = AnswerText(self._tokenizer, job.settings.stop)
            request = _Request(job, heapq.heappop(self._free), answer)
            self._reading.append(request)  # first, so that `_fail_all` knows it
            try:
                self._device.occupy(request.row, job.prefix, self._occupant(job))
            finally:
                self._forget_prefix(job)

    def _occupant(self, job: Job):
        settings, seen = job.settings, self._device.unseen()
        if settings.repetition_penalty is not None:
            opening = () if job.prefix is None else job.prefix.tokens
            seen = seen.copy()
            seen[[token for token in (*opening, *job.tokens) if token >= 0]] = True
        return occupant(
            seen,
            limit=settings.max_new_tokens,
            seed=job.seed,
            temperature=settings.temperature or 0,
            top_k=settings.top_k or 0,
            top_p=settings.top_p or 1,
            min_p=settings.min_p or 0,
            repetition_penalty=settings.repetition_penalty or 1,
            ends=[self._tokenizer.eos_token_id],
            scored=job.top is not None,
        )

    def _read(self) -> None:
        """Read a limited number of tokens of new inputs."""
        left = self._device.chunk
        while self._reading and left > 0:
            left -= max(self._read_chunks(), SHORT_CHUNK)  # a small call takes time, too
            self._fill_slots()  # with requests that have arrived meanwhile

    def _read_chunks(self) -> int:
        """Read a long chunk of the oldest request, or short ones of several. Return the tokens."""
        chunks, start = self._chunks(), 0
        chosen = self._reading[: len(chunks)]
        result = self._device.read(chunks, max(each.length for each in chosen))
        firsts, active = np.asarray(result.tokens), np.asarray(result.active)
        for i, (each, chunk) in enumerate(zip(chosen, chunks, strict=True)):
            end = start + len(chunk.tokens)
            each.read += len(chunk.tokens)
            where = slice(start, end)
            each.input += scored_tokens(chunk.following, result.input_scores, where, each.job.top)
            start = end
            if chunk.complete:
                self._reading.remove(each)
                self._generating.append(each)
                scored = scored_tokens([int(firsts[i])], result.scores, i, each.job.top)
                self._deliver(each, scored, bool(active[i]))
        return start

    def _chunks(self) -> list[Chunk]:
        """Return the chunks to read: of the oldest requests, in this order."""
        if self._reading[0].left > 2 * SHORT_CHUNK:
            return [self._reading[0].chunk(self._device.chunk)]
        largest, chunks, tokens = self._device.largest_shared_read, [], 0
        for each in self._reading[: largest.rows]:
            chunk = each.chunk(SHORT_CHUNK)
            tokens += len(chunk.tokens)
            if tokens > largest.tokens:
                break
            chunks.append(chunk)
        return chunks

    def _generate(self) -> None:
        """Generate a few tokens in all slots: fewer while inputs are read or slots are free."""
        if not self._generating:
            return
        steps = min(int(_DECODE_SECONDS / self._step_seconds), STEPS) if self._free else STEPS
        if self._reading or self._loader.running:
            steps = 1
        steps = max(steps, 1)
        longest = max(each.length for each in self._generating)
        rows = max(each.row for each in self._generating) + 1
        began = time.perf_counter()
        result: Generated = self._device.decode(steps, rows, longest)
        tokens, counts = np.asarray(result.tokens), np.asarray(result.counts)
        active = np.asarray(result.active)
        taken = max(int(counts.max()), 1)  # fewer if all rows end
        self._step_seconds = (time.perf_counter() - began) / taken
        for each in list(self._generating):
            ids = tokens[each.row, : counts[each.row]].tolist()
            scored = scored_tokens(ids, result.scores, each.row, each.job.top)
            self._deliver(each, scored, bool(active[each.row]))

    def _deliver(self, request: _Request, tokens: Sequence[ScoredToken], active: bool) -> None:
        """Report new tokens of a request. Free its slot if it has ended."""
        request.ids += [token.id for token in tokens]
        if request.ids and request.ids[-1] < 0:
            self._free_slots([request])
            request.job.deliver(Update(error=model_not_finite("logits")))
            return
        text, ended = request.answer.text(request.ids)
        if ended:  # a call may generate more tokens
            tokens = tokens[: request.answer.needed(request.ids, len(tokens))]
        finish = "stop" if ended else None if active else "length"
        final = request.answer.final(text) if finish is None else text
        new = final[request.delivered :]
        request.delivered = max(request.delivered, len(final))
        if finish is not None:
            self._free_slots([request])
        given, request.input = request.input, []
        request.job.deliver(Update(new, tokens, given, finish))

    def _fail_all(self, error: Exception) -> None:
        """Report an error to all jobs, and free all slots."""
        with self._changed:
            waiting, self._waiting = list(self._waiting), collections.deque()
        for job in waiting:
            self._forget_prefix(job)
        running = [*self._reading, *self._generating]
        for job in itertools.chain(waiting, (each.job for each in running)):
            job.deliver(Update(error=error))
        self._loader.fail(error)
        self._scorer.fail(error)
        self._reading, self._generating = [], []
        self._free[:] = range(self._device.slots)
