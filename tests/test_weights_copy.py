"""The copy of dequantized weights: used for the same file only, and never if it is damaged."""

import errno
import fcntl
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from flax import nnx

from softprompt.backbones import loading
from softprompt.backbones.formats import digest, weights_copy
from softprompt.backbones.formats.gguf import GGUFFile
from softprompt.backbones.loading import load_backbone


@pytest.fixture(autouse=True)
def settings(monkeypatch, tmp_path):
    """Small models have copies too, and the user's cache folder is temporary."""
    monkeypatch.setattr(weights_copy, "_SMALLEST", 0)
    monkeypatch.setattr(digest, "_SMALL", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path):
    """A GGUF file that was not changed recently."""
    path = Path(shutil.copy(GOLDEN / "gguf" / "llama.gguf", tmp_path))
    os.utime(path, (1000, 1000))
    return path


@pytest.fixture
def conversions(monkeypatch):
    """The number of times that a model was read from its own file."""
    made = []

    def load_weights(*arguments):
        made.append(1)
        return original(*arguments)

    original = loading.load_weights
    monkeypatch.setattr(loading, "load_weights", load_weights)
    return made


def parameters(model: Path, **options) -> tuple[dict, str]:
    """Return the parameters of a model, and the digest of its weights."""
    backbone, weights = load_backbone(GGUFFile(model), **options)
    state = nnx.to_flat_state(nnx.state(backbone, nnx.Param))
    return {path: np.asarray(p.get_value()) for path, p in state}, weights


def copies(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "cache" / "softprompt" / "weights"
    return sorted(path for path in folder.glob("*") if path.name != ".lock")


def assert_equal(found: tuple[dict, str], expected: tuple[dict, str]) -> None:
    assert found[1] == expected[1]
    assert found[0].keys() == expected[0].keys()
    for path, array in expected[0].items():
        assert found[0][path].dtype == array.dtype, path
        np.testing.assert_array_equal(found[0][path], array, err_msg=str(path))


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "bfloat16"}, {"quantize": "int8"}, {"dtype": "bfloat16", "quantize": "int8"}],
    ids=str,
)
def test_the_copy_holds_the_same_parameters(model, tmp_path, conversions, options):
    first = parameters(model, **options)
    assert len(copies(tmp_path)) == len(conversions) == 1
    assert_equal(parameters(model, **options), first)
    assert len(conversions) == 1


def test_the_copy_is_mapped_and_not_read(model, tmp_path):
    parameters(model)
    backbone, _ = load_backbone(GGUFFile(model))
    (copy,) = copies(tmp_path)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [
        tuple(int(end, 16) for end in line[0].split("-")) for line in maps if str(copy) in line
    ]
    for array in jax.tree.leaves(nnx.state(backbone, nnx.Param)):
        pointer = array.unsafe_buffer_pointer()
        assert any(start <= pointer < end for start, end in ranges)


def test_a_donated_parameter_does_not_change_the_copy(model, tmp_path):
    parameters(model)
    (copy,) = copies(tmp_path)
    before = copy.read_bytes()
    backbone, _ = load_backbone(GGUFFile(model))
    state = nnx.state(backbone, nnx.Param)
    double = jax.jit(lambda s: jax.tree.map(lambda x: x.at[0].multiply(2), s), donate_argnums=0)
    jax.block_until_ready(double(state))
    assert copy.read_bytes() == before


def test_each_choice_of_dtypes_has_a_copy(model, tmp_path, conversions):
    for options in ({}, {"dtype": "bfloat16"}, {"quantize": "int8"}, {}):
        parameters(model, **options)
    assert len(copies(tmp_path)) == len(conversions) == 3


@pytest.mark.parametrize("place", ["first page", "last byte", "header", "shorter", "longer", "no"])
def test_a_damaged_copy_is_made_again(model, tmp_path, conversions, place):
    first = parameters(model)
    (copy,) = copies(tmp_path)
    content = bytearray(copy.read_bytes())
    if place == "first page":
        content[2**20 + 3] ^= 1
    elif place == "last byte":
        content[-1] ^= 128
    elif place == "header":
        content[content.index(b'"sums":"') + 8] ^= 1
    elif place == "shorter":
        del content[-1]
    elif place == "longer":
        content.append(0)
    else:
        content = bytearray(b"no copy")
    damaged = bytes(content)
    copy.write_bytes(damaged)
    assert_equal(parameters(model), first)
    assert len(conversions) == 2
    assert copy.read_bytes() != damaged
    assert_equal(parameters(model), first)
    assert len(conversions) == 2


def test_two_pages_in_the_wrong_order_are_found(model, tmp_path, conversions):
    parameters(model)
    (copy,) = copies(tmp_path)
    content = bytearray(copy.read_bytes())
    start, page = 2**20, 4096
    first, second = content[start : start + page], content[start + page : start + 2 * page]
    assert first != second
    content[start : start + 2 * page] = second + first
    copy.write_bytes(bytes(content))
    parameters(model)
    assert len(conversions) == 2


def test_the_copy_of_another_file_is_not_used(model, tmp_path, conversions):
    parameters(model)
    (copy,) = copies(tmp_path)
    other = Path(shutil.copy(GOLDEN / "gguf" / "llama.gguf", tmp_path / "other.gguf"))
    os.utime(other, (1000, 1000))
    parameters(other)
    (foreign,) = set(copies(tmp_path)) - {copy}
    foreign.write_bytes(copy.read_bytes())
    parameters(other)
    assert len(conversions) == 3


def test_a_changed_file_replaces_its_copy(model, tmp_path, conversions):
    parameters(model)
    os.utime(model, (2000, 2000))
    parameters(model)
    assert len(conversions) == 2
    assert len(copies(tmp_path)) == 1
    parameters(model)
    assert len(conversions) == 2


def test_a_file_that_was_just_changed_is_not_copied(model, tmp_path):
    os.utime(model)
    parameters(model)
    assert copies(tmp_path) == []


def test_other_code_does_not_use_the_copy(model, conversions, monkeypatch):
    parameters(model)
    monkeypatch.setattr(weights_copy, "_code", lambda: "other")
    parameters(model)
    assert len(conversions) == 2


def test_copies_of_removed_files_and_unfinished_copies_are_removed(model, tmp_path):
    parameters(model)
    (copy,) = copies(tmp_path)
    (copy.parent / "crashed.new").write_bytes(b"half a copy")
    os.rename(model, tmp_path / "renamed.gguf")
    parameters(tmp_path / "renamed.gguf")
    (other,) = copies(tmp_path)
    assert other != copy


def test_one_process_at_a_time_makes_copies(model, tmp_path):
    folder = tmp_path / "cache" / "softprompt" / "weights"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        parameters(model)
    assert copies(tmp_path) == []
    parameters(model)
    assert len(copies(tmp_path)) == 1


def test_without_space_there_is_no_copy(model, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(weights_copy.shutil, "disk_usage", lambda path: usage)
    parameters(model)
    assert copies(tmp_path) == []


def test_a_disk_that_becomes_full_leaves_nothing_behind(model, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "replace", full)
    parameters(model)
    assert copies(tmp_path) == []


def full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_cache_folder_that_cannot_be_written_is_no_error(model, tmp_path, conversions):
    (tmp_path / "cache").write_text("a file where the folder should be")
    first = parameters(model)
    assert_equal(parameters(model), first)
    assert len(conversions) == 2


def test_a_pipe_in_place_of_a_copy_does_not_block(model, tmp_path):
    parameters(model)
    (copy,) = copies(tmp_path)
    copy.unlink()
    os.mkfifo(copy)
    parameters(model)
    assert copy.is_file()


def test_small_models_have_no_copy(model, tmp_path, monkeypatch):
    monkeypatch.setattr(weights_copy, "_SMALLEST", 2**30)
    parameters(model)
    assert copies(tmp_path) == []


def test_the_sums_find_every_changed_word():
    rng = np.random.default_rng(0)
    array = rng.normal(size=(3, 1000)).astype(np.float32)
    sums = weights_copy._sums({("a",): array})
    for place in (0, 1023, 1024, 2047, 2048, 2999):
        changed = array.copy()
        changed.reshape(-1)[place] = jnp.nextafter(changed.reshape(-1)[place], np.inf)
        assert weights_copy._sums({("a",): changed}) != sums
