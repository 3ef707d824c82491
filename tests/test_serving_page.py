"""The page at `/`, in a browser, against a server with the same routes and fixed answers."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Page, open_browser

import softprompt.serving

pytest.importorskip("fastapi")
from fixed_server import EVIL, serving_fixed_answers
from servers import LABELS, save_prompt, serving, with_chat_template

from softprompt import load_prompt
from softprompt.serving.state import Options

HTML = Path(softprompt.serving.__file__).parent / "page.html"


@pytest.fixture(scope="module")
def started():
    """The server, which runs in a thread."""
    with serving_fixed_answers() as fixed:
        yield fixed


@pytest.fixture
def server(started):
    """The server, as at the start."""
    started.reset()
    return started


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A browser."""
    if CHROMIUM is None:
        pytest.skip("no browser is installed")
    with open_browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser, server) -> Iterator[Page]:
    """The page of the server. It must cause no problem that the test does not expect."""
    browser.show_as(1280, 800)
    browser.open(server.url)
    browser.wait("!document.querySelector('#send').disabled")
    yield browser
    assert browser.problems == []


def choose(page: Page, *names: str) -> None:
    """Choose the two models."""
    for index, name in enumerate(names):
        page.value(
            f"(select => {{ select.value = {json.dumps(name)};"
            "select.dispatchEvent(new Event('change')) })"
            f"(document.querySelectorAll('select')[{index}])"
        )


def column(page: Page, index: int, part: str) -> str:
    """Return the text of a part of a column."""
    return page.text(f"section:nth-child({index + 1}) {part}")


def ended(page: Page) -> None:
    """Wait until the answers have ended."""
    page.wait("document.querySelector('#stop').disabled")


def test_the_page_loads_nothing_and_treats_no_data_as_html():
    text = HTML.read_text()
    assert text.count("\n") <= 400
    assert not re.search(
        r"https?://|<(link(?! rel=\"icon\" href=\"data:,\")|img|iframe)|src=", text
    )
    assert not re.search(r"@import|url\(|innerHTML|outerHTML|insertAdjacent|eval\(|Storage", text)
    assert not re.search(r" style=| on[a-z]+=\"", text)  # the security policy would block these


def test_two_answers_stream_side_by_side(page, server):
    server.go_on.clear()
    page.type("textarea", "Which color?")
    page.press("Enter", control=True)
    page.wait("[...document.querySelectorAll('.answer')].every(e => e.textContent)")
    assert [column(page, i, ".answer").strip() for i in (0, 1)] == ["Deep", "A short"]
    assert "first token after" in column(page, 0, ".stats")
    assert page.value("document.querySelector('.answer').ariaBusy") == "true"
    assert page.value("document.querySelector('#send').disabled")
    server.go_on.set()
    ended(page)
    assert [column(page, i, ".answer") for i in (0, 1)] == ["Deep blue", "A short summary"]
    stats = r"first token after [\d.]+ m?s, 7 tokens, [\d.]+ tokens/s, ended at the limit"
    assert all(re.fullmatch(stats, column(page, i, ".stats")) for i in (0, 1))
    common = {"stream": True, "stream_options": {"include_usage": True}}
    messages = [{"role": "user", "content": "Which color?"}]
    assert sorted(server.requests, key=str) == [
        ("/v1/chat/completions", {"model": "tiny", **common, "messages": messages}),
        ("/v1/completions", {"model": "summarize", **common, "prompt": "Which color?"}),
    ]


def test_labels_are_shown_as_bars(page, server):
    choose(page, "sentiment", "tiny")
    page.type("textarea", "Great film")
    page.click("#send")
    ended(page)
    assert column(page, 0, ".answer").split() == [
        *("positive", "negative", "12.5%", "positive", "87.5%"),
    ]
    shares = page.value(
        "[...document.querySelectorAll('.track')].map("
        "track => track.firstChild.offsetWidth / track.offsetWidth)"
    )
    assert shares == pytest.approx([0.125, 0.875], abs=0.005)
    request = ("/v1/classify", {"model": "sentiment", "input": "Great film"})
    assert request in server.requests
    assert column(page, 0, ".stats").endswith("s, input truncated")
    assert column(page, 1, ".answer") == "Deep blue"


def test_settings_are_sent_and_raw_turns_the_templates_off(page, server):
    choose(page, "sentiment", "entailment")
    page.value("document.querySelector('details').open = true")
    for name, value in [("max_tokens", "5"), ("temperature", "0.5"), ("seed", "0")]:
        page.type(f"input[name={name}]", value)
    page.click("#raw")
    assert page.value("document.querySelectorAll('textarea').length") == 1
    page.type("textarea", "A question")
    page.click("#send")
    ended(page)
    assert [path for path, _ in server.requests] == ["/v1/completions"] * 2
    for _, body in server.requests:
        given = {key: body[key] for key in ("max_tokens", "temperature", "seed", "raw", "prompt")}
        assert given == {
            **{"max_tokens": 5, "temperature": 0.5, "seed": 0},
            **{"raw": True, "prompt": "A question"},
        }


def test_a_wrong_setting_is_shown_and_nothing_is_sent(page, server):
    page.value("document.querySelector('input[name=seed]').value = '-1'")
    page.type("textarea", "A question")
    page.press("Enter", control=True)
    assert page.value("document.querySelector('details').open")
    assert server.requests == []


def test_a_template_with_several_fields_has_a_box_for_each(page, server):
    page.type("textarea", "It rains")
    choose(page, "tiny", "entailment")
    assert page.value("[...document.querySelectorAll('textarea')].map(b => b.value)") == [
        *("It rains", ""),
    ]
    assert page.text("#fields").split() == ["premise", "hypothesis"]
    assert (
        column(page, 0, ".receives") == "Receives premise and hypothesis, joined by a line break."
    )
    page.type("label:nth-child(2) textarea", "It is wet")
    page.click("#send")
    ended(page)
    inputs = {body["model"]: body for _, body in server.requests}
    assert inputs["tiny"]["messages"] == [{"role": "user", "content": "It rains\nIt is wet"}]
    assert inputs["entailment"]["prompt"] == {"premise": "It rains", "hypothesis": "It is wet"}


def test_stop_ends_both_answers_and_closes_their_connections(page, server):
    server.go_on.clear()
    page.type("textarea", "A question")
    page.value("document.querySelector('#send').focus()")
    page.press("Tab")  # Stop is disabled, so the focus goes elsewhere
    page.click("#send")
    page.wait("[...document.querySelectorAll('.answer')].every(e => e.textContent)")
    assert server.open == 2
    assert page.value("document.activeElement.id") == "stop"
    page.click("#stop")
    ended(page)
    assert column(page, 0, ".answer").strip() == "Deep"
    assert column(page, 0, ".stats").endswith("stopped")
    assert page.value("document.activeElement.id") == "send"
    end = time.monotonic() + 10
    while server.open and time.monotonic() < end:
        time.sleep(0.01)
    assert server.open == 0


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("error", "a weight is not finite"),
        ("cut", "The connection ended before the answer was complete."),
    ],
)
def test_an_answer_that_fails_on_the_way_keeps_its_text(page, server, ending, message):
    server.ending = ending
    page.type("textarea", "A question")
    page.click("#send")
    ended(page)
    assert column(page, 1, ".error") == message
    assert column(page, 1, ".answer").strip() == "A short"


def test_a_refused_request_shows_the_message_of_the_server(page, server):
    server.error = (429, "too many requests wait")
    page.type("textarea", "A question")
    page.click("#send")
    ended(page)
    assert [column(page, i, ".error") for i in (0, 1)] == ["too many requests wait"] * 2
    server.error = None
    page.click("#send")
    ended(page)
    assert page.value("[...document.querySelectorAll('.error')].every(e => e.hidden)")
    assert ["429" in problem for problem in page.problems] == [True] * 2
    page.problems.clear()


def test_a_key_is_asked_for_only_when_the_server_wants_one(page, server):
    assert page.value("document.querySelector('#key-form').hidden")
    server.key = "secret"
    page.open(server.url)
    page.wait("!document.querySelector('#key-form').hidden")
    assert page.text("#problem") == "The server needs an API key."
    page.type("#key", "wrong")
    page.press("Enter")
    page.wait("document.querySelector('#problem').textContent.includes('not accept')")
    page.type("#key", "secret")
    page.press("Enter")
    page.wait("!document.querySelector('#send').disabled")
    page.type("textarea", "A question")
    page.click("#send")
    ended(page)
    assert column(page, 0, ".answer") == "Deep blue"
    assert page.value("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    assert ["401" in problem for problem in page.problems] == [True] * 2
    page.problems.clear()


def test_the_page_waits_for_a_server_that_is_starting(page, server):
    server.error = (503, "compiling")
    page.open(server.url)
    page.wait("document.querySelector('#problem').textContent === 'The server is starting.'")
    server.error = None
    page.wait("!document.querySelector('#send').disabled")
    assert page.value("document.querySelector('#problem').hidden")
    page.problems.clear()


def test_names_and_answers_are_not_html(page, server):
    choose(page, EVIL, EVIL)
    page.type("textarea", EVIL)
    page.click("#send")
    ended(page)
    assert column(page, 0, ".answer") == EVIL * 2
    assert page.value("document.querySelectorAll('img').length") == 0


def test_the_security_policy_blocks_other_scripts_and_addresses(page):
    for script in [
        "document.body.innerHTML = 'x'",
        "document.head.append(Object.assign(document.createElement('script'), {text: 'x'}))",
        "eval('1')",
    ]:
        with pytest.raises(AssertionError, match="exceptionDetails"):
            page.value(script)
    page.value("void fetch('http://127.0.0.1:9/').catch(() => { window.blocked = true })")
    page.wait("window.blocked")
    assert any("connect-src 'self'" in problem for problem in page.problems)
    page.problems.clear()


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_the_columns_below_each_other(page, server, tmp_path, dark):
    page.show_as(390, 844, dark=dark)
    choose(page, "sentiment", "tiny")
    page.type("textarea", "Great film")
    page.click("#send")
    ended(page)
    assert page.value("document.documentElement.scrollWidth") == 390
    tops = page.value(
        "[...document.querySelectorAll('section')].map(e => e.getBoundingClientRect().top)"
    )
    assert tops[1] > tops[0] + 150
    for selector in ("h1", "h1 + p", ".answer", ".stats", "#send", "#stop", "label", "textarea"):
        assert contrast(page, selector) >= 4.5, selector


def contrast(page: Page, selector: str) -> float:
    """Return the contrast of a text with its background, as WCAG 2 defines it."""
    colors = page.value(
        f"""(element => {{
            const ink = getComputedStyle(element).color;
            const back = element => getComputedStyle(element).backgroundColor;
            while (back(element) === 'rgba(0, 0, 0, 0)') element = element.parentElement;
            return [ink, back(element)].map(color => color.match(/\\d+/g).map(Number));
        }})(document.querySelector({json.dumps(selector)}))"""
    )
    lights = []
    for color in colors:
        parts = [c / 255 for c in color]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


@pytest.mark.slow
def test_the_page_shows_what_the_real_server_answers(browser, tiny, tmp_path):
    base = with_chat_template(tiny)
    folders = {
        "letters": save_prompt(tmp_path / "letters", base, 0, "{text} is", LABELS),
        "pairs": save_prompt(tmp_path / "pairs", base, 1, "Say {text} {more}:"),
    }
    offline = {name: load_prompt(folder, base) for name, folder in folders.items()}
    with serving(base, folders, Options(api_key="secret")) as running:
        browser.open(f"{running.url}/")
        browser.wait("!document.querySelector('#key-form').hidden")
        browser.type("#key", "secret")
        browser.press("Enter")
        browser.wait("!document.querySelector('#send').disabled")
        choose(browser, "letters", "pairs")
        browser.type("textarea", "hello")
        browser.type("label:nth-child(2) textarea", "you")
        browser.click("#send")
        ended(browser)
        (expected,) = offline["pairs"].generate([{"text": "hello", "more": "you"}])
        assert browser.value("document.querySelectorAll('.answer')[1].textContent") == expected.text
        assert "6 tokens, " in column(browser, 1, ".stats")
        (predicted,) = offline["letters"].classify(["hello\nyou"])
        shown = column(browser, 0, ".answer").split()
        percents = [f"{100 * p:.1f}%" for p in predicted.probabilities.values()]
        assert shown == [predicted.label, "low", percents[0], "high", percents[1]]

        choose(browser, "tiny", "letters")
        browser.click("#send")
        ended(browser)
        messages = [{"role": "user", "content": "hello"}]
        answer = running.ask(
            "POST",
            "/v1/chat/completions",
            {"model": "tiny", "messages": messages},
            {"Authorization": "Bearer secret"},
        )
        text = answer.json["choices"][0]["message"]["content"]
        assert browser.value("document.querySelector('.answer').textContent") == text
        assert len(browser.problems) == 1  # the request without the key
