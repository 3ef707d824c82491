"""The scheduler when a call on the device fails or the server stops: nobody waits forever.

The device computes nothing, so that a call can fail or wait when a test wants it.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from softprompt import UserError
from softprompt.data.examples import Example
from softprompt.data.layout import PackedShape
from softprompt.data.records import Record
from softprompt.experiment.schema import GenerationSettings
from softprompt.generation.slots import Read
from softprompt.serving.bank import Bank, Content
from softprompt.serving.device import ReadShape
from softprompt.serving.jobs import Job
from softprompt.serving.scheduler import Busy, Scheduler

SECONDS = 30


class Tokenizer:
    eos_token_id = 0

    def decode(self, ids, **_):
        return "a" * len(ids)


class Device:
    """A device with one slot. The calls named in `broken` fail, and all wait while it is paused."""

    slots, length, chunk = 1, 64, 128
    scoring_shapes = (PackedShape(1, 1, 64, 8, 64, 8),)
    largest_shared_read = ReadShape(32, 1, 32)

    def __init__(self):
        self.broken: set[str] = set()
        self.going, self.called, self.was_reset = (threading.Event() for _ in range(3))
        self.going.set()

    def _call(self, name):
        self.called.set()
        assert self.going.wait(SECONDS)
        if name in self.broken:
            raise RuntimeError(name)

    def place(self, row, content):
        self._call("place")

    def read_opening(self, row, content, begin):
        self._call("read_opening")
        return len(content.tokens)

    def store(self, row, stored):
        self._call("store")

    def occupy(self, row, prefix, new):
        self._call("occupy")

    def read(self, chunks, attended):
        self._call("read")
        return Read(np.array([5]), np.array([False]), None, None)

    def score(self, prefix, batch):
        self._call("score")
        return np.zeros((1, 8), np.float32)

    def unseen(self):
        return np.zeros(8, bool)

    def release(self, rows):
        pass

    def reset(self):
        self._call("reset")
        self.was_reset.set()


@pytest.fixture
def device():
    return Device()


@pytest.fixture
def bank():
    return Bank(16)


@pytest.fixture
def scheduler(device, bank):
    scheduler = Scheduler(device, bank, Tokenizer(), 8)
    scheduler.start()
    yield scheduler
    device.going.set()
    scheduler.stop(drain=False)


@pytest.fixture
def threads():
    with ThreadPoolExecutor(4) as threads:
        yield threads


def content(*tokens):
    return Content(tokens)


def test_a_prefix_gets_a_slot_while_jobs_keep_coming(scheduler, device, threads):
    """Each job frees the slot while inputs are read, and another job already waits for it."""
    loading = threading.Event()

    def submit():
        scheduler.submit(Job("a", None, [1, 2], GenerationSettings(), 0, again))

    def again(update):
        if not loading.is_set():
            submit()

    for _ in range(4):
        submit()
    assert device.called.wait(SECONDS)  # a job has the slot
    try:
        assert threads.submit(scheduler.load, content(1)).result(SECONDS).length == 1
    finally:
        loading.set()


@pytest.mark.parametrize("call", ["place", "read_opening", "store"])
def test_a_prefix_that_cannot_be_computed_leaves_nothing(scheduler, device, bank, threads, call):
    device.broken = {call}
    with pytest.raises(RuntimeError, match=call):
        threads.submit(scheduler.load, content(1, 2)).result(SECONDS)
    assert device.was_reset.wait(SECONDS)
    assert (bank.used, scheduler.occupied) == (0, 0)
    device.broken = set()
    assert threads.submit(scheduler.load, content(1, 2)).result(SECONDS).length == 2


def test_equal_prefixes_that_fail_together_leave_nothing(scheduler, device, bank, threads):
    device.going.clear()
    first = threads.submit(scheduler.load, content(9))
    assert device.called.wait(SECONDS)
    device.broken = {"store"}
    others = [threads.submit(scheduler.load, content(9)) for _ in range(2)]
    device.going.set()
    for each in (first, *others):
        with pytest.raises(RuntimeError, match="store"):
            each.result(SECONDS)
    assert bank.used == 0


def test_nobody_waits_for_a_scheduler_that_has_stopped(scheduler, device, bank, threads):
    device.going.clear()
    running = threads.submit(scheduler.load, content(1))
    assert device.called.wait(SECONDS)
    waiting = threads.submit(scheduler.load, content(2))
    while scheduler._loader.pending < 2:
        time.sleep(0.001)
    stopping = threads.submit(scheduler.stop, drain=False)
    while not scheduler._draining:
        time.sleep(0.001)
    device.going.set()
    stopping.result(SECONDS)
    stored = running.result(SECONDS)
    with pytest.raises(Busy):
        waiting.result(SECONDS)
    with pytest.raises(Busy):
        threads.submit(scheduler.load, content(3)).result(SECONDS)
    scheduler.release(stored)
    assert bank.used == 0


def test_a_request_whose_slot_cannot_be_filled_fails(scheduler, device, bank, threads):
    stored = threads.submit(scheduler.load, content(1)).result(SECONDS)
    device.broken, updates, done = {"occupy"}, [], threading.Event()

    def deliver(update):
        updates.append(update)
        done.set()

    scheduler.submit(Job("", stored, [1], GenerationSettings(), 0, deliver))
    assert done.wait(SECONDS)
    assert str(updates[0].error) == "occupy"
    assert device.was_reset.wait(SECONDS)
    scheduler.release(stored)
    assert (bank.used, scheduler.occupied) == (0, 0)


def test_cancelled_scores_do_not_end_the_thread(scheduler, device, bank, threads):
    stored = threads.submit(scheduler.load, content(1)).result(SECONDS)
    device.going.clear()
    device.called.clear()
    device.broken = {"score"}
    examples = [Example([1, 2], [[3], [4]], None, Record({}, "test"), False) for _ in range(2)]
    failing, cancelled = scheduler.score(stored, examples)
    assert device.called.wait(SECONDS)
    assert cancelled.cancel()
    device.going.set()
    with pytest.raises(RuntimeError, match="score"):
        failing.result(SECONDS)
    assert device.was_reset.wait(SECONDS)
    device.broken = set()
    (good,) = scheduler.score(stored, examples[:1])
    assert good.result(SECONDS).shape == (2,)
    scheduler.release(stored)
    assert bank.used == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_device_that_cannot_be_used_again_ends_everything(scheduler, device, threads):
    device.broken = {"place", "reset"}
    with pytest.raises(RuntimeError, match="place"):
        threads.submit(scheduler.load, content(1)).result(SECONDS)
    scheduler._thread.join(SECONDS)
    assert not scheduler.is_running
    with pytest.raises(Busy):
        threads.submit(scheduler.load, content(1)).result(SECONDS)


def test_a_prefix_longer_than_the_bank_is_an_error(scheduler, threads):
    with pytest.raises(UserError, match="the bank has room for only 16 more"):
        threads.submit(scheduler.load, content(*range(20))).result(SECONDS)


def test_a_job_that_is_cancelled_while_inputs_are_read_gets_no_slot(scheduler, device):
    """The slot becomes free within the round, and the cancelled job is the next one."""
    updates, ended = [], threading.Event()
    device.going.clear()
    jobs = [
        Job("a", None, [1], GenerationSettings(), 0, updates.append),
        Job("b", None, [1], GenerationSettings(), 0, updates.append),
        Job("c", None, [1], GenerationSettings(), 0, lambda _: ended.set()),
    ]
    jobs[0].deliver = lambda update: (updates.append(update), jobs[1].cancel())
    for job in jobs:
        scheduler.submit(job)
    device.going.set()
    assert ended.wait(SECONDS)
    assert len(updates) == 1
