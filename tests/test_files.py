"""Files from outside: only regular files, only up to a limit, only valid text and JSON."""

import errno
import os

import numpy as np
import pydantic
import pytest
from safetensors.numpy import save_file

from softprompt.errors import UserError, shortened
from softprompt.files.json_files import checked, parse_json, read_json
from softprompt.files.reading import open_file, read_bytes, read_text
from softprompt.files.tensors import SafetensorsFile, read_npy
from softprompt.files.writing import require_writable, write_errors, write_file


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
    for name in ("validation.jsonl", "test.jsonl", "training.csv"):  # not a typing mistake
        with pytest.raises(UserError, match=r"no such file$"):
            open_file(tmp_path / name)
    with pytest.raises(UserError, match=r"no such file; there is no folder .*nowhere$"):
        open_file(tmp_path / "nowhere" / "train.jsonl")


def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: not a regular file"):
        read_text(tmp_path / "pipe")


def test_a_large_file_is_not_read(tmp_path):
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)  # a terabyte of zeros that takes no space
    for read in (read_text, read_bytes):
        with pytest.raises(UserError, match="larger than 16 MiB"):
            read(tmp_path / "large")


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
        ("[-1e999]", "the number '-1e999' is too large"),
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


class Numbers(pydantic.BaseModel):
    """Numbers by names that a file chooses."""

    numbers: dict[str, int]


def test_field_names_of_any_form_stay_on_one_line():
    with pytest.raises(UserError) as raised:
        checked(Numbers, {"numbers": {"a\nb": "x", "c" * 10_000: "x"}}, "a.json")
    message = str(raised.value)
    assert r"a.json: numbers.a\nb: Input should be a valid integer" in message
    assert "numbers.ccc" in message
    assert "\n" not in message
    assert len(message) < 500


def test_long_values_are_shortened():
    assert shortened("x" * 100) == "'" + "x" * 56 + "..."


def test_a_file_that_cannot_be_written_is_found_before_the_work(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "none" / "a", "No such file or directory"),
        (tmp_path / "folder", "not a regular file"),
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path / "a\0b", "null byte"),
        (tmp_path / ("a" * 300), "File name too long"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            require_writable(path)
        assert "\n" not in str(raised.value)
    (tmp_path / "a").write_text("old")
    require_writable(tmp_path / "a")
    require_writable(tmp_path / "new")
    assert (tmp_path / "a").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "folder", "pipe"]


def test_a_failed_write_keeps_the_old_content_and_names_the_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_file(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(UserError, match="a: cannot be written"),
        write_errors(tmp_path / "a"),
    ):
        write_file(tmp_path / "a", "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "old")]


def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / f".a.{os.getpid()}.new").symlink_to(tmp_path / "mine")
    write_file(tmp_path / "a", "text")
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "a").read_text() == "text"


def npy(header, data=b"", version=1):
    """Make a `.npy` file with any header."""
    length = len(header).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + header.encode() + data


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<f2"])
def test_a_npy_file_is_read_as_numpy_reads_it(tmp_path, order, dtype):
    array = np.asarray(np.arange(6).reshape(2, 3), dtype, order=order)
    np.save(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(read_npy(tmp_path / "a.npy"), array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an array of numbers"),
        (npy("((((("), "not an array of numbers"),
        (npy("(" * 3000), "not an array of numbers"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (True, 3)}"), "shape .True, 3"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 3)}"), "shape .-1, 3"),
        (
            npy("{'descr': '<f4', 'fortran_order': False, 'shape': (106, 3)}"),
            "promises .106, 3. numbers of 4 bytes, but 0 bytes follow",
        ),
        (
            npy("{'descr': '<f4', 'fortran_order': True, 'shape': (1000000000000, 1)}", b"12"),
            "but 2 bytes follow",
        ),
        (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}"), "floating-point numbers"),
        (npy("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}"), "floating-point"),
    ],
)
def test_a_damaged_npy_file_is_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        read_npy(tmp_path / "a.npy")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}', "stored as F8_E4M3"),
        (b'{"a": {"dtype": "I8", "shape": [2], "data_offsets": [0, 2]}}', "stored as I8"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2]}}', "not a readable"),
        (b'{"a": {"dtype": "F32", "shape": [9999999], "data_offsets": [0, 39999996]}}', "not a re"),
        (b'{"a":' * 10_000, "not a readable"),
        (b"\xff", "not a readable"),
    ],
)
def test_a_damaged_safetensors_file_is_refused_in_one_line(tmp_path, header, message):
    content = len(header).to_bytes(8, "little") + header + b"12"
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        SafetensorsFile(tmp_path / "a").read("a")
    assert "\n" not in str(raised.value)


def test_a_safetensors_file_is_checked_before_its_header_is_read(tmp_path):
    (tmp_path / "a").write_bytes((2**40).to_bytes(8, "little"))
    with pytest.raises(UserError, match="a header of 1099511627776 bytes"):
        SafetensorsFile(tmp_path / "a")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a regular file"):
        SafetensorsFile(tmp_path / "pipe")
    save_file({"x": np.ones((2, 3), np.float32)}, tmp_path / "b")
    file = SafetensorsFile(tmp_path / "b")
    assert (file.names, file.shape("x")) == (["x"], (2, 3))
    np.testing.assert_array_equal(file.read("x"), np.ones((2, 3)))
