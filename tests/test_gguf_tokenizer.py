"""Tokenizers of GGUF files agree with llama.cpp, whose ids are in tests/golden."""

import json
import sys

import pytest
from conftest import GOLDEN

from softprompt import UserError
from softprompt.backbones.formats.gguf import GGUFFile
from softprompt.backbones.loading import find_model

sys.path.append(str(GOLDEN))

from vocabularies import write_vocabulary

SMALL = json.loads((GOLDEN / "small_tokens.json").read_text())
# For these, llama.cpp only approximates the model's patterns. Two of the texts show the difference.
APPROXIMATE = ("tekken", "gpt-4o")


def tokenizer_of(folder, kind, pre, **flags):
    path = folder / "vocabulary.gguf"
    write_vocabulary(path, kind, pre, **flags)
    return GGUFFile(path).tokenizer()


def assert_same_ids(tokenizer, texts, expected):
    for text, ids in zip(texts, expected, strict=True):
        assert tokenizer(text, add_special_tokens=False).input_ids == ids, text


@pytest.mark.parametrize(
    "pre", ["gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", *APPROXIMATE, "default"]
)
def test_byte_level_ids_agree_with_llama_cpp(tmp_path, pre):
    tokenizer = tokenizer_of(tmp_path, "gpt2", pre)
    differing = []
    for text, expected in zip(SMALL["texts"], SMALL[pre], strict=True):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
        differing += [text] if ids != expected else []
    assert len(differing) == (2 if pre in APPROXIMATE else 0)
    assert not any(text.isascii() for text in differing)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids_agree_with_llama_cpp(tmp_path, prefix):
    tokenizer = tokenizer_of(tmp_path, "llama", "default", add_space_prefix=prefix)
    assert_same_ids(tokenizer, SMALL["texts"], SMALL[f"llama {prefix}"])
    for text in SMALL["texts"]:
        if not any(special in text for special in ("<mark>", "<unk>", "</s>")):
            assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_phi3_drops_a_space_after_special_tokens_as_llama_cpp_does(tmp_path):
    tokenizer = tokenizer_of(
        tmp_path, "llama", "default", name="Phi3", control_tokens=["<|endoftext|>"]
    )
    assert_same_ids(tokenizer, SMALL["space behind"], SMALL["phi3"])


@pytest.mark.parametrize(("pre", "like"), [("smaug-bpe", "dbrx"), ("falcon3", "llama-bpe")])
def test_aliases_of_pre_tokenizers_are_equivalent(tmp_path, pre, like):
    assert_same_ids(tokenizer_of(tmp_path, "gpt2", pre), SMALL["texts"], SMALL[like])


@pytest.mark.parametrize(("pre", "adds_bos"), [("llama3", True), ("tekken", True), ("dbrx", False)])
def test_some_pre_tokenizers_add_a_bos_token_by_default(tmp_path, pre, adds_bos):
    ids = tokenizer_of(tmp_path, "gpt2", pre)("a").input_ids
    assert (ids[0] == 1) == adds_bos


def test_gemma_ids_agree_with_llama_cpp():
    try:
        path = find_model("gemma3-270m")
    except UserError as error:
        pytest.skip(str(error))
    tokenizer = GGUFFile(path).tokenizer()
    lines = (GOLDEN / "gemma3_tokens.jsonl").read_text().splitlines()
    cases = list(map(json.loads, lines))
    assert_same_ids(tokenizer, *zip(*((c["text"], c["ids"]) for c in cases), strict=True))
    for case in cases:
        assert tokenizer.decode(case["ids"]) == case["text"]
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id == 2


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, [1, "a"]),
        ({"add_bos_token": False}, ["a"]),
        ({"add_eos_token": True}, [1, "a", 2]),
    ],
)
def test_bos_and_eos_are_added_as_the_file_says(tmp_path, flags, expected):
    tokenizer = tokenizer_of(tmp_path, "llama", "default", add_space_prefix=False, **flags)
    letter = tokenizer.convert_tokens_to_ids("a")
    assert tokenizer("a").input_ids == [letter if part == "a" else part for part in expected]


@pytest.mark.parametrize(("kind", "pre"), [("gpt2", "kimi-k2"), ("bert", "default")])
def test_the_error_about_an_unsupported_tokenizer_names_it(tmp_path, kind, pre):
    path = tmp_path / "vocabulary.gguf"
    write_vocabulary(path, "gpt2", pre)
    if kind != "gpt2":
        path.write_bytes(path.read_bytes().replace(b"gpt2", kind.encode()))
    with pytest.raises(UserError) as error:
        GGUFFile(path).tokenizer()
    assert f"tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported" in str(error.value)
    assert "'llama-bpe'" in str(error.value)


def test_a_damaged_vocabulary_is_rejected(tmp_path):
    path = tmp_path / "vocabulary.gguf"
    write_vocabulary(path, "gpt2", "gpt-2")
    whole = path.read_bytes()
    for end in (3, 20, 200, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError, match="not a readable GGUF file"):
            GGUFFile(path)


@pytest.mark.parametrize(
    ("kind", "key", "value", "message"),
    [
        ("gpt2", "tokens", None, "tokens: Input should be a valid list"),
        ("gpt2", "tokens", ["a", 5], r"tokens\.1: Input should be a valid string"),
        ("gpt2", "token_type", [1], "token_type: 1 values for "),
        ("gpt2", "merges", None, "merges: missing"),
        ("gpt2", "merges", ["a b c"], "its tokenizer cannot be read"),
        ("llama", "scores", None, "scores: missing"),
        ("llama", "scores", [0.5], "scores: 1 values for "),
        ("llama", "eos_token_id", 10**6, "eos_token_id: 1000000, but there are "),
        (
            "llama",
            "unknown_token_id",
            -1,
            "unknown_token_id: Input should be greater than or equal",
        ),
        ("llama", "padding_token_id", True, "padding_token_id: Input should be a valid integer"),
    ],
)
def test_wrong_metadata_are_named(tmp_path, kind, key, value, message):
    path = tmp_path / "vocabulary.gguf"
    write_vocabulary(path, kind, "gpt-2" if kind == "gpt2" else "default")
    file = GGUFFile(path)
    file._fields[f"tokenizer.ggml.{key}"] = value
    with pytest.raises(UserError, match=f"vocabulary.gguf: .*{message}") as error:
        file.tokenizer()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [(["a" * 10**6], "a token has 1000000"), (["a" * 2000] * 300, "long tokens")],
)
def test_merges_of_very_long_tokens_are_not_searched(tmp_path, tokens, message):
    path = tmp_path / "vocabulary.gguf"
    write_vocabulary(path, "llama", "default")
    file = GGUFFile(path)
    changes = {"tokens": tokens, "token_type": [1] * len(tokens), "scores": [0.0] * len(tokens)}
    file._fields |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    for name in ("bos", "eos", "unknown"):
        file._fields[f"tokenizer.ggml.{name}_token_id"] = None
    with pytest.raises(UserError, match=message):
        file.tokenizer()
