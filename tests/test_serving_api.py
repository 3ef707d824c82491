"""The server answers as the prompts do offline, in OpenAI's format."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest
from conftest import example_of
from servers import LABELS, save_prompt, serving, with_chat_template

from softprompt import load_prompt
from softprompt.evaluation.scoring import score
from softprompt.serving.token_texts import TokenTexts

WARM = {"temperature": 1.5, "seed": 3}


@pytest.fixture(scope="module")
def base(tiny):
    return with_chat_template(tiny)


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    return {
        "letters": save_prompt(folder / "l", base, 0, "{text} is", LABELS),
        "texts": save_prompt(folder / "t", base, 1),
        "warm": save_prompt(
            folder / "w", base, 2, "Say {text} {more}:", temperature=1.2, stop=["x"]
        ),
    }


@pytest.fixture(scope="module")
def server(base, folders):
    with serving(base, folders) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def offline(base, folders):
    return {name: load_prompt(folder, base) for name, folder in folders.items()}


def log_probabilities(base, ids: list[int], method) -> np.ndarray:
    """Return the log-probability of each next token, `[T, V]`, without cache and prefix."""
    embedded = method(base.backbone.embedding(jnp.array([ids])))
    logits = base.backbone.logits(base.backbone(embedded))[0, -len(ids) :]
    return np.asarray(jax.nn.log_softmax(logits, axis=-1))


def test_models_are_listed(server, client, folders):
    data = {model.id: model for model in client.models.list()}
    assert list(data) == ["tiny", *folders]
    assert data["letters"].parent == "tiny"
    assert data["letters"].root == "l"
    assert data["tiny"].parent is None
    assert client.models.retrieve("texts").id == "texts"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("absent")


@pytest.mark.parametrize(
    "settings", [{}, WARM, {**WARM, "top_p": 0.7}, {"stop": ["e", "i"]}], ids=str
)
def test_a_completion_is_what_the_prompt_generates(client, offline, settings):
    (expected,) = offline["texts"].generate(["hello"], **settings)
    answer = client.completions.create(model="texts", prompt="hello", **settings)
    assert answer.choices[0].text == expected.text
    assert answer.object == "text_completion"
    assert answer.choices[0].finish_reason == ("stop" if expected.ended[0] else "length")


def test_settings_that_are_ours(server, offline):
    settings = {**WARM, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.3}
    (expected,) = offline["texts"].generate(["hello"], **settings)
    answer = server.post("/v1/completions", model="texts", prompt="hello", **settings)
    assert answer.json["choices"][0]["text"] == expected.text


def test_the_defaults_are_those_of_the_run(client, offline):
    fields = {"text": "ab", "more": "cd"}
    (expected,) = offline["warm"].generate([fields])
    answer = client.completions.create(model="warm", prompt="", extra_body={"prompt": fields})
    assert answer.choices[0].text == expected.text
    (greedy,) = offline["warm"].generate([fields], temperature=0)
    answer = client.completions.create(
        model="warm", prompt="", temperature=0, top_p=0.5, extra_body={"prompt": fields}
    )
    assert answer.choices[0].text == greedy.text


def test_several_inputs_and_samples(client, offline):
    texts = ["hello", "a", "bcd"]
    expected = offline["texts"].generate(texts, samples=2, **WARM)
    answer = client.completions.create(model="texts", prompt=texts, n=2, **WARM)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == [
        t for each in expected for t in each.texts
    ]


def test_a_stream_is_the_same_text(client, offline):
    (expected,) = offline["texts"].generate(["hello"])
    parts = list(
        client.completions.create(
            model="texts", prompt="hello", stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(part.choices[0].text for part in parts[:-1]) == expected.text
    assert [part.choices[0].finish_reason for part in parts[:-1]][-1] in ("stop", "length")
    usage = parts[-1].usage
    assert parts[-1].choices == []
    assert (usage.prompt_tokens, usage.completion_tokens) == (6, 6)  # "hello:"
    assert usage.prompt_tokens_details.virtual_tokens == 4


def test_raw_text_and_ids_follow_only_the_prefix(client, offline, base):
    ids = base.tokenizer("hello:").input_ids
    (expected,) = offline["texts"].generate(["hello"])
    for prompt in ("hello:", ids, [ids]):
        answer = client.completions.create(model="texts", prompt=prompt, extra_body={"raw": True})
        assert answer.choices[0].text == expected.text
    plain = client.completions.create(model="tiny", prompt="hello:", max_tokens=6)
    assert plain.choices[0].text != expected.text
    assert plain.usage.prompt_tokens_details.virtual_tokens == 0


def test_logprobs_are_those_of_the_model(client, base, offline):
    ids = base.tokenizer("hello").input_ids
    prompt = offline["texts"]
    answer = client.completions.create(
        model="texts", prompt=ids, echo=True, logprobs=3, max_tokens=4
    )
    found = answer.choices[0].logprobs
    texts = TokenTexts(base.tokenizer)
    ids_of = {texts.text(token): token for token in range(base.backbone.arch.vocab_size)}
    assert "".join(found.tokens[: len(ids)]) == "hello"
    assert answer.choices[0].text.startswith("hello")
    all_ids = ids + [ids_of[text] for text in found.tokens[len(ids) :]]
    expected = log_probabilities(base, all_ids, prompt.method)
    assert found.token_logprobs[0] is None
    scores = [expected[i, token] for i, token in enumerate(all_ids[1:])]
    np.testing.assert_allclose(found.token_logprobs[1:], scores, atol=2e-4)
    best = np.sort(expected, axis=1)[:-1, ::-1]
    for row, top in zip(best, found.top_logprobs[1:], strict=True):
        np.testing.assert_allclose(sorted(top.values(), reverse=True)[:3], row[:3], atol=2e-4)
    assert found.text_offset[:3] == [0, 1, 2]


def test_streamed_logprobs_are_those_of_the_whole_answer(client):
    request = {"model": "texts", "prompt": "hello", "logprobs": 1, "echo": True, "max_tokens": 6}
    whole = client.completions.create(**request).choices[0]
    parts = [part.choices[0] for part in client.completions.create(stream=True, **request)]
    assert len(parts) > 1
    assert "".join(part.text for part in parts) == whole.text
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [value for part in parts for value in getattr(part.logprobs, name)]
        assert joined == getattr(whole.logprobs, name)


def test_no_token_is_generated_if_only_the_input_is_scored(client):
    whole = client.completions.create(
        model="tiny", prompt="hello", echo=True, logprobs=1, max_tokens=1
    )
    answer = client.completions.create(
        model="tiny", prompt="hello", echo=True, logprobs=1, max_tokens=0
    )
    assert answer.choices[0].text == "hello"
    assert answer.usage.completion_tokens == 0
    assert (
        answer.choices[0].logprobs.token_logprobs == whole.choices[0].logprobs.token_logprobs[:-1]
    )


def test_echo_is_streamed(server):
    body = {"model": "tiny", "prompt": "h", "max_tokens": 3, "echo": True, "stream": True}
    for more in ({}, {"logprobs": 1}):
        events = server.post("/v1/completions", **body, **more).events
        whole = server.post("/v1/completions", **(body | more | {"stream": False})).json
        choices = [event["choices"][0] for event in events]
        assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
        if more:
            scores = [score for each in choices for score in each["logprobs"]["token_logprobs"]]
            assert scores == whole["choices"][0]["logprobs"]["token_logprobs"]


def test_a_conversation_follows_the_chat_template(client, base):
    messages = [
        {"role": "system", "content": "ab"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    ]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8)
    text = "<|start|>sab<|pad|>\n<|start|>uhello<|pad|>\n<|start|>a"
    plain = client.completions.create(model="tiny", prompt=text, max_tokens=8, stop=["<|pad|>"])
    assert answer.choices[0].message.content == plain.choices[0].text
    assert answer.choices[0].message.role == "assistant"
    again = [*messages, answer.choices[0].message.model_dump(), messages[1]]
    assert client.chat.completions.create(model="tiny", messages=again, max_tokens=2).choices
    assert answer.usage.prompt_tokens == plain.usage.prompt_tokens


def test_a_message_fills_the_template_of_a_prompt(client, offline):
    messages = [{"role": "user", "content": "hello"}]
    (expected,) = offline["texts"].generate(["hello"])
    answer = client.chat.completions.create(model="texts", messages=messages)
    assert answer.choices[0].message.content == expected.text
    parts = list(client.chat.completions.create(model="texts", messages=messages, stream=True))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == expected.text
    with pytest.raises(openai.BadRequestError, match="trained on single inputs"):
        client.chat.completions.create(model="texts", messages=messages * 2)


def test_logprobs_of_conversations(client):
    answer = client.chat.completions.create(
        model="texts",
        messages=[{"role": "user", "content": "hello"}],
        logprobs=True,
        top_logprobs=7,
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for token in content:
        assert len(token.top_logprobs) == 7
        assert token.top_logprobs[0].logprob == token.logprob  # greedy
        assert math.exp(token.logprob) <= 1
    text = b"".join(bytes(token.bytes) for token in content)
    assert text.decode(errors="replace").startswith(answer.choices[0].message.content[:2])


def test_labels_are_those_that_the_prompt_predicts(server, offline):
    texts = ["abc", "zzz", "m" * 300]
    expected = offline["letters"].classify(texts[:2])
    answer = server.post("/v1/classify", model="letters", input=texts).json
    for found, prediction in zip(answer["data"], expected, strict=False):
        assert found["label"] == prediction.label
        assert found["probabilities"] == pytest.approx(dict(prediction.probabilities), abs=1e-5)
    assert [each["truncated"] for each in answer["data"]] == [False, False, True]
    one = server.post("/v1/classify", model="letters", input={"text": "abc"}).json
    assert one["data"][0]["probabilities"] == pytest.approx(
        answer["data"][0]["probabilities"], abs=1e-5
    )
    wrong = server.post("/v1/classify", model="texts", input="abc")
    assert (wrong.status, "has no labels" in wrong.json["error"]["message"]) == (400, True)


MISTAKES = [
    ({"model": "absent"}, 404, "the model 'absent' does not exist"),
    ({"prompt": []}, 400, "prompt: must be a text"),
    ({"prompt": [-1]}, 400, "prompt: must be a text"),
    ({"prompt": [999]}, 400, "no embedding"),
    ({"prompt": " "}, 400, "field 'text' is empty"),
    ({"prompt": {"txt": "a"}}, 400, "no field 'text'"),
    ({"prompt": "a" * 200, "model": "tiny"}, 400, "longer than the 128 tokens that fit"),
    ({"max_tokens": 125}, 400, "maximum context length is 128 tokens"),
    ({"max_tokens": 0}, 400, "max_tokens: 0 needs echo"),
    ({"n": 2}, 400, "several answers need a temperature"),
    ({"n": 100, "temperature": 1}, 400, "100 answers, but the limit is 32"),
    ({"top_p": 0.5}, 400, "top_p needs a temperature"),
    ({"logprobs": 6}, 400, "logprobs: Input should be less than or equal to 5"),
    ({"temprature": 1}, 400, "temprature: unknown parameter"),
    ({"suffix": "x"}, 400, "suffix is not supported"),
    ({"best_of": 2}, 400, "best_of is not supported"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias is not supported"),
    ({"temperature": "hot"}, 400, "temperature: Input should be a valid number"),
    ({"stop": "\ud800"}, None, None),
]


@pytest.mark.parametrize(
    ("change", "status", "message"), MISTAKES, ids=lambda value: str(value)[:30]
)
def test_mistakes_are_named(server, change, status, message):
    answer = server.post("/v1/completions", **({"model": "texts", "prompt": "ab"} | change))
    if status is None:
        assert answer.status < 500
        return
    assert (answer.status, answer.json["error"]["type"]) == (status, "invalid_request_error")
    assert message in answer.json["error"]["message"]


def test_parameters_without_effect_are_accepted(server):
    more = {"user": "me", "best_of": 1, "frequency_penalty": 0, "logit_bias": None, "top_p": 1}
    assert server.post("/v1/completions", model="texts", prompt="ab", **more).status == 200


def test_bodies_that_are_no_json(server):
    headers = {"Content-Type": "application/json"}
    for body in (b"{", b"[" * 5000, b'{"model": NaN}', b"\xff", b""):
        answer = server.ask("POST", "/v1/completions", body, headers)
        assert (answer.status, answer.json["error"]["param"]) != (500, None)
        assert answer.status == 400
    assert server.ask("GET", "/absent").json["error"]["type"] == "invalid_request_error"
    assert server.ask("GET", "/v1/completions").status == 405


def test_errors_of_the_client_library(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="absent", prompt="a")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="texts", prompt="a", max_tokens=1000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        client.chat.completions.create(
            model="texts",
            messages=[{"role": "user", "content": "a"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )


def test_a_long_input_of_a_template_is_truncated_and_says_so(client, offline):
    """The whole answer fits after it, as offline, because both have the same window here."""
    answer = client.completions.create(model="texts", prompt="a" * 200)
    assert answer.choices[0].truncated is True
    assert answer.choices[0].text == offline["texts"].generate(["a" * 200])[0].text
    assert answer.usage.completion_tokens > 1
    assert client.completions.create(model="texts", prompt="a").choices[0].truncated is False


def test_the_document_describes_all_routes(server):
    document = server.ask("GET", "/openapi.json").json
    assert {"/v1/completions", "/v1/chat/completions", "/v1/classify"} <= document["paths"].keys()
    text = json.dumps(document)
    assert "HTTPValidationError" not in text


def test_the_requests_of_lm_eval(server, offline, base):
    """lm-eval scores continuations of token ids like this. See tests/test_lm_eval.py."""
    pairs = [("hello", " you"), ("ab", "c"), ("x y", " zzz")]
    encoded = [
        [base.tokenizer(text, add_special_tokens=False).input_ids for text in pair]
        for pair in pairs
    ]
    payload = {
        "model": "texts",
        "prompt": [context + continuation for context, continuation in encoded],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    choices = server.post("/v1/completions", **payload).json["choices"]
    prompt = offline["texts"]
    examples = [example_of(context, [continuation], 0) for context, continuation in encoded]
    scores = np.empty(len(examples))
    for numbers, part in score(prompt.backbone, prompt.prefix, examples, 4):
        scores[numbers] = part[:, 0]
    for choice, (context, _), expected in zip(choices, encoded, scores, strict=True):
        found = choice["logprobs"]["token_logprobs"][len(context) : -1]
        assert sum(found) == pytest.approx(expected, abs=1e-3)
        best = choice["logprobs"]["top_logprobs"][len(context) : -1]
        assert all(score <= max(top.values()) for score, top in zip(found, best, strict=True))
