"""Files from outside: only regular files, only up to a limit, only valid text and JSON."""

import os

import pydantic
import pytest

from softprompt.errors import UserError
from softprompt.files.json_files import checked, parse_json, read_json, shortened
from softprompt.files.reading import open_file, read_text


class Sizes(pydantic.BaseModel):
    """Two sizes, as a config may have them."""

    layers: int = pydantic.Field(ge=1, le=100)
    heads: int


def test_text_is_read_with_and_without_a_byte_order_mark(tmp_path):
    for content in (b"gr\xc3\xbcn", b"\xef\xbb\xbfgr\xc3\xbcn"):
        (tmp_path / "a").write_bytes(content)
        assert read_text(tmp_path / "a") == "grün"


def test_a_missing_file_a_folder_and_a_path_with_a_nul_are_named(tmp_path):
    with pytest.raises(UserError, match="missing: no such file"):
        read_text(tmp_path / "missing")
    with pytest.raises(UserError, match="not a regular file"):
        read_text(tmp_path)
    with pytest.raises(UserError, match="null byte"):
        open_file(tmp_path / "a\0b")
    with pytest.raises(UserError, match="File name too long"):
        open_file(tmp_path / ("a" * 5000))


def test_a_missing_file_is_named_with_a_similar_one_in_its_folder(tmp_path):
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(UserError, match=r"trian.jsonl: no such file; did you mean 'train.jsonl'\?"):
        open_file(tmp_path / "trian.jsonl")
    with pytest.raises(UserError, match=r"no such file; there is no folder .*nowhere$"):
        open_file(tmp_path / "nowhere" / "train.jsonl")


def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: not a regular file"):
        read_text(tmp_path / "pipe")


def test_a_large_file_is_not_read(tmp_path):
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)  # a terabyte of zeros that takes no space
    with pytest.raises(UserError, match="larger than 16 MiB"):
        read_text(tmp_path / "large")


def test_text_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"gr\xfcn")
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 2\)"):
        read_text(tmp_path / "a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("1" * 5000, "4300 digits"),
        ("NaN", "JSON has no number NaN"),
        ('["\\ud800"]', "half of a surrogate pair"),
        ('{"\\udc00": 1}', "half of a surrogate pair"),
    ],
)
def test_what_is_not_json_is_refused_in_one_line(text, message):
    with pytest.raises(UserError, match=message) as raised:
        parse_json(text, "here")
    assert str(raised.value).startswith("here: not valid JSON")
    assert "\n" not in str(raised.value)


def test_whole_surrogate_pairs_are_json():
    assert parse_json('"\\ud83d\\ude00"', "here") == "😀"


def test_a_json_file_must_hold_an_object(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(UserError, match=r"a\.json: not a JSON object"):
        read_json(tmp_path / "a.json")


def test_every_wrong_field_is_named_with_its_value():
    with pytest.raises(UserError) as raised:
        checked(Sizes, {"layers": 10**5000}, "config.json")
    message = str(raised.value)
    assert message.startswith("config.json: layers: ")
    assert "too long to show" in message
    assert "heads: Field required" in message
    assert "\n" not in message


def test_long_values_are_shortened():
    assert shortened("x" * 100) == "'" + "x" * 56 + "..."
