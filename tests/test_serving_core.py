"""The service without HTTP: fairness, the bank, and prompts that change while requests wait."""

import dataclasses
import itertools
import threading

import numpy as np
import pytest
from compilation import compiled_programs
from servers import LABELS, LIMITS, save_huge_prefix, save_prompt

from softprompt import UserError, load_prompt
from softprompt.serving.device import Device
from softprompt.serving.prompts import ServedPrompt
from softprompt.serving.scheduler import Removed
from softprompt.serving.service import Service, TooLong


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    return {
        "letters": save_prompt(folder / "l", tiny, 0, "{text} is", LABELS),
        "texts": save_prompt(folder / "t", tiny, 1),
        "twin": save_prompt(folder / "w", tiny, 1),
        "other": save_prompt(folder / "o", tiny, 2, length=9),
    }


@pytest.fixture(scope="module")
def service(tiny, folders):
    limits = dataclasses.replace(LIMITS, bank_tokens=40)
    service = Service(tiny, "tiny", limits)
    service.start(labels=True)
    service.prompts.load("texts", folders["texts"])
    yield service
    service.stop(drain=False)


class Asked:
    """A job and what it reported."""

    def __init__(self, service: Service, prompt: ServedPrompt, text: str, new: int = 6, **more):
        self.updates: list = []
        self.done = threading.Event()
        reading = prompt.reading("own")
        settings = prompt.generation.model_copy(update={"max_new_tokens": new} | more)
        tokens = reading.example(text, "test").input
        self.job = service.submit(prompt, "own", tokens, settings, self._receive)

    def _receive(self, update):
        self.updates.append(update)
        if update.is_last:
            self.done.set()

    @property
    def text(self) -> str:
        assert self.done.wait(60)
        if self.updates[-1].error is not None:
            raise self.updates[-1].error
        return "".join(update.text for update in self.updates)


def offline(folder, base, text, new=6):
    return load_prompt(folder, base).generate([text], max_new_tokens=new)[0].text


@pytest.fixture
def calls(service, monkeypatch):
    """The calls on the device in their order, with their numbers of rows or steps."""
    device, calls = service._device, []

    def recorded(name, real):
        def call(first, *others):
            calls.append((name, first))
            return real(first, *others)

        return call

    for name in ("read", "decode"):
        monkeypatch.setattr(device, name, recorded(name, getattr(device, name)))
    return calls


def test_a_long_input_does_not_stop_others(service, calls):
    """Between two chunks of a long input, a request that generates gets a token."""
    prompt = service.prompts.get("texts")
    service._device.chunk, whole = 32, service._device.chunk
    try:
        first = Asked(service, prompt, "ab", 100)
        while not first.updates:
            pass
        calls.clear()
        second = Asked(service, prompt, "a" * 110, 1)
        assert second.text is not None
        assert first.text is not None
    finally:
        service._device.chunk = whole
    reads = [i for i, (name, _) in enumerate(calls) if name == "read"]
    assert len(reads) == 4
    for before, after in itertools.pairwise(reads):
        assert ("decode", 1) in calls[before:after]


def test_adding_and_removing_prompts_compiles_nothing(service, folders):
    with compiled_programs() as compiled:
        for name in ("letters", "other"):
            service.prompts.load(name, folders[name])
        letters, other = map(service.prompts.get, ("letters", "other"))
        jobs = [Asked(service, prompt, "ab" * 9) for prompt in (letters, other, letters, other)]
        assert all(job.text is not None for job in jobs)
        reading = letters.reading("own")
        scored = service.score(letters, [reading.example(t, "x") for t in ("ab", "c" * 60)])
        assert len(service.predict(letters, scored)) == 2
        for name in ("letters", "other"):
            assert service.prompts.remove(name)
        assert not compiled


def test_equal_prefixes_share_their_places(service, folders, tiny):
    used = service.bank.used
    service.prompts.load("twin", folders["twin"])
    assert service.bank.used == used
    service.prompts.remove("twin")
    assert service.bank.used == used
    prompt = service.prompts.get("texts")
    assert Asked(service, prompt, "ab").text == offline(folders["texts"], tiny, "ab")


def test_a_replaced_prompt_does_not_change_waiting_requests(service, folders, tiny):
    service.prompts.load("changing", folders["other"])
    prompt = service.prompts.get("changing")
    busy = [Asked(service, service.prompts.get("texts"), "ab", 100) for _ in range(3)]
    waiting = Asked(service, prompt, "cd")
    service.prompts.load("changing", folders["twin"])
    assert waiting.text == offline(folders["other"], tiny, "cd")
    new = Asked(service, service.prompts.get("changing"), "cd")
    assert new.text == offline(folders["twin"], tiny, "cd")
    assert all(job.text is not None for job in busy)
    with pytest.raises(Removed):
        Asked(service, prompt, "cd")
    service.prompts.remove("changing")
    assert service.bank.used == 4


def test_a_full_bank_leaves_everything_as_it_was(service, tiny, tmp_path):
    large = save_prompt(tmp_path / "large", tiny, 3, length=60)
    with pytest.raises(UserError, match=r"prefix has 60 tokens, but the bank has room for only 36"):
        service.prompts.load("large", large)
    assert service.prompts.get("large") is None
    assert service.bank.used == 4


def test_a_request_that_is_too_long_is_rejected(service):
    prompt = service.prompts.get("texts")
    with pytest.raises(TooLong, match="needs 129: 4 in the prefix, 25 in the input and 100 new"):
        Asked(service, prompt, "a" * 24, 100)


def test_not_finite_logits_fail_one_request(service, tiny, tmp_path, folders):
    service.prompts.load("huge", save_huge_prefix(tmp_path / "huge", tiny))
    huge, good = map(service.prompts.get, ("huge", "texts"))
    jobs = [Asked(service, prompt, "ab") for prompt in (good, huge, good)]
    expected = offline(folders["texts"], tiny, "ab")
    assert [jobs[0].text, jobs[2].text] == [expected] * 2
    with pytest.raises(UserError, match="infinite or NaN logits"):
        _ = jobs[1].text
    service.prompts.remove("huge")
    for _ in range(4):  # in every slot
        assert Asked(service, good, "ab").text == expected


def test_a_stop_text_ends_the_tokens_too(service, tiny, folders):
    """A call generates several tokens, but those after the stop text do not count."""
    prompt = service.prompts.get("texts")
    whole = Asked(service, prompt, "ab", 30)
    text = whole.text
    stop = next(text[i] for i in range(3, len(text)) if text[i] not in text[:i])
    short = Asked(service, prompt, "ab", 30, stop=[stop])
    assert short.text == text[: text.index(stop)]
    tokens = [token.id for update in short.updates for token in update.tokens]
    assert tokens == [t.id for update in whole.updates for t in update.tokens][: len(tokens)]
    decoded = str(tiny.tokenizer.decode(tokens))
    assert decoded.endswith(stop)
    assert decoded.count(stop) == 1


def test_labels_that_fit_no_program_are_rejected(service, folders, monkeypatch):
    """They must not fail the requests of others."""
    service.prompts.load("letters", folders["letters"])
    prompt = service.prompts.get("letters")
    shortest = service._device.scoring_shapes[:1]
    monkeypatch.setattr(Device, "scoring_shapes", shortest)
    good, long = (prompt.reading("own").example(text, "input 1") for text in ("a", "a" * 70))
    with pytest.raises(UserError, match="input 1: the input and the labels have 77 tokens"):
        service.score(prompt, [good, long])
    (scored,) = service.score(prompt, [good])
    assert np.isfinite(scored.result()).all()
    service.prompts.remove("letters")


def test_a_prompt_whose_labels_are_too_long_leaves_nothing(service, folders, monkeypatch):
    used = service.bank.used
    monkeypatch.setattr("softprompt.serving.scorer.MOST_TARGETS", 1)
    with pytest.raises(UserError, match="its labels have 6 tokens together"):
        service.prompts.load("letters", folders["letters"])
    assert service.prompts.get("letters") is None
    assert service.bank.used == used
