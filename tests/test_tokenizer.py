"""Tokenizers of model directories: equal to those of transformers, and safe to load and call."""

import base64
import json
import shutil
import time

import pytest
from conftest import GOLDEN
from transformers import PreTrainedTokenizerFast

from softprompt import TemplateSettings, UserError, make_task
from softprompt.backbones.formats import tokenizer_files
from softprompt.backbones.formats.gguf import GGUFFile
from softprompt.backbones.formats.tokenizer import GuardedTokenizer
from softprompt.backbones.formats.tokenizer_files import read_tokenizer_files
from softprompt.backbones.loading import find_model

PLAIN = json.loads((GOLDEN / "llama-grouped" / "tokenizer.json").read_text())
VOCABULARY = PLAIN["model"]["vocab"]


def added(content, **changes):
    rules = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return {"__type": "AddedToken", "content": content, "special": True} | rules | changes


def folder_with(folder, content=None, **files):
    """Write `tokenizer.json` with some changed sections, and other files."""
    text = json.dumps(PLAIN | (content or {}))
    (folder / "tokenizer.json").write_text(text)
    for name, value in files.items():
        if isinstance(value, str):
            (folder / f"{name}.jinja").write_text(value)
        else:
            (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


FOLDERS = {
    "nothing else": {},
    "settings of transformers 4": {
        "tokenizer_config": {
            "tokenizer_class": "GPT2Tokenizer",
            "auto_map": {"AutoTokenizer": ["code.Tokenizer", None]},
            "added_tokens_decoder": {
                "0": added("<|endoftext|>"),
                "2": added("<|pad|>", special=False),
                "300": added("<new>", special=False),
            },
            "eos_token": "<|endoftext|>",
            "pad_token": "<|pad|>",
            "extra_special_tokens": {"boi_token": "<boi>"},
            "add_bos_token": True,
        },
        "chat_template": "Hi!\n",
    },
    "settings with rules": {
        "tokenizer_config": {
            "bos_token": "<|start|>",
            "eos_token": added("<|endoftext|>"),
            "pad_token": "<new>",
            "unk_token": added("<u>", rstrip=True),
            "additional_special_tokens": ["<a>", added("<b>", lstrip=True)],
            "image_token": "<image>",
            "chat_template": "Hello",
            "model_max_length": 5,
            "padding_side": "left",
            "clean_up_tokenization_spaces": True,
            "split_special_tokens": True,
        }
    },
    "files of transformers 3": {
        "tokenizer_config": {"eos_token": "<|pad|>"},
        "special_tokens_map": {
            "eos_token": {"content": "<|endoftext|>", "normalized": False},
            "pad_token": "<|pad|>",
            "additional_special_tokens": ["<k>"],
        },
        "added_tokens": {"<k>": 300, "<j>": 299, "<|pad|>": 2},
    },
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_tokenizer_equals_the_one_that_transformers_loads(name, tmp_path):
    folder_with(tmp_path, **FOLDERS[name])
    theirs, ours = PreTrainedTokenizerFast.from_pretrained(tmp_path), read_tokenizer_files(tmp_path)
    for attribute in (
        "special_tokens_map",
        "all_special_ids",
        "added_tokens_decoder",
        "extra_special_tokens",
        "chat_template",
        "model_max_length",
        "padding_side",
        "clean_up_tokenization_spaces",
    ):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    text = " A joy . <a> <b> <|start|>é<u>  <new>"
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))


def test_a_tokenizer_neither_truncates_nor_pads_by_itself(tmp_path, capfd):
    settings = {
        "truncation": {
            "direction": "Right",
            "max_length": 3,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        "padding": {
            "strategy": {"Fixed": 10**6},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 2,
            "pad_type_id": 0,
            "pad_token": "<|pad|>",
        },
    }
    tokenizer = read_tokenizer_files(
        folder_with(tmp_path, settings, tokenizer_config={"model_max_length": 1})
    )
    assert tokenizer.backend_tokenizer.truncation is None
    assert tokenizer.backend_tokenizer.padding is None
    assert len(tokenizer("abcdef").input_ids) == 6
    assert capfd.readouterr().err == ""


def replaced(old, new):
    return {"type": "Replace", "pattern": old, "content": new}


def normalizers(*steps):
    return {"normalizer": {"type": "Sequence", "normalizers": list(steps)}}


DOUBLED = [replaced({"String": "a"}, "aa")] * 33
CHARSMAP = base64.b64encode(b"\x04\0\0\0\0\0\0\0" + b"a" * 999 + b"\0").decode()
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
UNIGRAM = {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 7, "byte_fallback": False}
HOSTILE = {
    "replacement bomb": (normalizers(*DOUBLED), "normalizer: step 'Replace' and those before it"),
    "inserting bomb": (
        normalizers(replaced({"Regex": ""}, "a" * 20), replaced({"Regex": "x*"}, "a" * 20)),
        "normalizer: step 'Replace'",
    ),
    "prepending bomb": (
        normalizers(*[{"type": "Prepend", "prepend": "a" * 20}] * 2),
        "normalizer: step 'Prepend'",
    ),
    "byte bomb": (
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [PLAIN["pre_tokenizer"] | {"use_regex": False}] * 33,
            }
        },
        "pre_tokenizer: step 'ByteLevel'",
    ),
    "charsmap bomb": (
        normalizers({"type": "Precompiled", "precompiled_charsmap": CHARSMAP}),
        "step 'Precompiled'",
    ),
    "charsmap that panics": (
        normalizers({"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "step 'Precompiled'",
    ),
    "decoding bomb": (
        {"decoder": {"type": "Sequence", "decoders": DOUBLED}},
        "decoder: step 'Replace'",
    ),
    "copying bomb": (
        {
            "post_processor": PLAIN["post_processor"]
            | {"single": [{"Sequence": {"id": "A", "type_id": 0}}] * 999}
        },
        "step 'TemplateProcessing'",
    ),
    "long token": (
        {"added_tokens": [*PLAIN["added_tokens"], added("a" * 9999, id=300)]},
        "token 'aaaaaaaaaaaaaaaaaaaa'... has 9999 characters",
    ),
    "large id": (
        {"model": PLAIN["model"] | {"vocab": VOCABULARY | {"far": 2**31}}},
        "token 'far' has the id 2147483648",
    ),
    "slow pattern": (
        {"pre_tokenizer": SPLIT | {"pattern": {"Regex": "(a|aa)+b"}}},
        r"retry-limit-in-match over",
    ),
    "token that panics": (
        {
            "post_processor": PLAIN["post_processor"]
            | {"single": [{"SpecialToken": {"id": "none", "type_id": 0}}]}
        },
        "the tokenizer cannot be used",
    ),
    "wrong type": ({"model": 5}, "the tokenizer cannot be used"),
    "pieces of a wrong type": (
        {"post_processor": PLAIN["post_processor"] | {"single": 0.5}},
        "the tokenizer cannot be used",
    ),
    "missing unknown token": (
        {"model": UNIGRAM},
        "the tokenizer cannot be used",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tokenizer_is_one_line(name, tmp_path, capfd):
    content, message = HOSTILE[name]
    with pytest.raises(UserError, match=f"tokenizer.json: .*{message}") as error:
        read_tokenizer_files(folder_with(tmp_path, content))
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_a_tokenizer_that_takes_too_long_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_files, "TRIAL_SECONDS", 1)
    content = normalizers(*[{"type": "NFKC"}] * 20_000)
    begin = time.monotonic()
    with pytest.raises(UserError, match="takes more than 1 seconds of CPU time"):
        read_tokenizer_files(folder_with(tmp_path, content))
    assert time.monotonic() - begin < 15


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", {"chat_template": 5}, "chat_template: Input should be a valid"),
        ("tokenizer_config.json", {"eos_token": ["a"]}, "eos_token: Input should be"),
        ("tokenizer_config.json", {"extra_special_tokens": 1}, "extra_special_tokens"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"a": {}}}, "added_tokens_decoder"),
        ("special_tokens_map.json", {"pad_token": {"content": 1}}, "pad_token.content"),
        ("added_tokens.json", {"a": "b"}, "a: Input should be a valid integer"),
        ("tokenizer_config.json", b"\xff", "not UTF-8"),
        ("tokenizer.json", b"[" * 10**6, "nested too deeply"),
        ("chat_template.jinja", b"\xff", "not UTF-8"),
    ],
)
def test_a_wrong_value_next_to_a_tokenizer_is_named(file, content, message, tmp_path):
    folder_with(tmp_path)
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=f"{file}: .*{message}") as error:
        read_tokenizer_files(tmp_path)
    assert "\n" not in str(error.value)


def test_texts_and_tokens_that_the_library_refuses_are_one_line(tmp_path):
    words = {"type": "WordLevel", "vocab": VOCABULARY, "unk_token": "none"}
    tokenizer = read_tokenizer_files(folder_with(tmp_path, {"model": words}))
    with pytest.raises(UserError, match=r"cannot encode this text \(WordLevel error: Missing"):
        tokenizer("hello")
    with pytest.raises(UserError, match="cannot decode these tokens"):
        tokenizer.decode([-1])
    for text in ("a\ud800", ["a", "\udcff"]):
        with pytest.raises(UserError, match=r"\\ud[8c].*' is not valid Unicode"):
            tokenizer(text)


def test_a_very_long_text_is_refused_before_it_grows(tmp_path):
    content = normalizers(replaced({"String": "a"}, "b" * 100))
    tokenizer = read_tokenizer_files(folder_with(tmp_path, content))
    assert len(tokenizer("a").input_ids) == 100
    with pytest.raises(UserError, match="a text of 200000 characters is too long"):
        tokenizer("a" * 200_000)


def test_signals_and_interrupts_pass_through_the_guard(tiny, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedTokenizerFast, "_decode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tiny.tokenizer.decode([5])


@pytest.mark.parametrize(
    "settings", [{"input": "\ud800{text}"}, {"input": "{text}", "target": "\ud800{label}"}]
)
def test_half_of_a_surrogate_pair_in_a_template_is_one_line(settings, tiny):
    template = TemplateSettings(**{"target": "{label}"} | settings)
    with pytest.raises(UserError, match="not valid Unicode"):
        make_task(tiny, template, {"a": "b"}).content_free("N/A")


def test_gguf_files_have_guarded_tokenizers_too():
    tokenizer = GGUFFile(find_model("smollm2-135m-instruct")).tokenizer()
    assert isinstance(tokenizer, GuardedTokenizer)


@pytest.fixture
def trials(tmp_path, monkeypatch):
    """The tokenizers that were tried in a process of their own; the cache folder is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = []

    class Recorded(tokenizer_files.ConfinedProcess):
        def ask(self, request, where):
            asked.append(request)
            return super().ask(request, where)

    monkeypatch.setattr(tokenizer_files, "ConfinedProcess", Recorded)
    return asked


def test_a_tokenizer_is_tried_once(tmp_path, trials):
    folders = [shutil.copytree(GOLDEN / "llama-grouped", tmp_path / name) for name in ("a", "b")]
    first, second = (read_tokenizer_files(folder) for folder in folders)
    assert len(trials) == 1
    assert first.get_vocab() == second.get_vocab()
    changed = folders[1] / "tokenizer.json"
    changed.write_text(changed.read_text() + "\n")
    read_tokenizer_files(folders[1])
    assert len(trials) == 2


def test_a_tokenizer_that_fails_is_tried_again(tmp_path, trials):
    folder = shutil.copytree(GOLDEN / "llama-grouped", tmp_path / "model")
    (folder / "tokenizer.json").write_text('{"model": {}}')
    for _ in range(2):
        with pytest.raises(UserError, match="the tokenizer cannot be used"):
            read_tokenizer_files(folder)
    assert len(trials) == 2


def test_without_a_cache_folder_a_tokenizer_is_tried_again(tmp_path, trials):
    (tmp_path / "cache").write_text("a file where the folder should be")
    for _ in range(2):
        read_tokenizer_files(GOLDEN / "llama-grouped")
    assert len(trials) == 2


def test_a_tokenizer_that_changes_during_its_trial_is_not_remembered(tmp_path, trials, monkeypatch):
    folder = shutil.copytree(GOLDEN / "llama-grouped", tmp_path / "model")
    ask = tokenizer_files.ConfinedProcess.ask

    def changed(self, request, where):
        answer = ask(self, request, where)
        path = folder / "tokenizer.json"
        path.write_text(path.read_text() + "\n")
        return answer

    monkeypatch.setattr(tokenizer_files.ConfinedProcess, "ask", changed)
    read_tokenizer_files(folder)
    assert not list((tmp_path / "cache").rglob("tokenizers/*"))
