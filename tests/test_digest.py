"""The digest of a model's weights is remembered, and never used for other weights."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN
from safetensors.numpy import load_file, save_file

from softprompt import UserError
from softprompt.backbones.formats import digest as module
from softprompt.backbones.formats.digest import RememberedDigest
from softprompt.backbones.formats.directory import ModelDirectory
from softprompt.backbones.formats.gguf import GGUFFile
from softprompt.backbones.loading import load_backbone

RECORD = ".model.safetensors.digest"
DIGEST, OTHER = "a" * 64, "b" * 64


@pytest.fixture(autouse=True)
def settings(monkeypatch, tmp_path):
    """Small models are remembered too, and the user's cache folder is temporary."""
    monkeypatch.setattr(module, "_SMALL", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path):
    """A small model in a file that was not changed recently."""
    folder = shutil.copytree(GOLDEN / "llama-untied", tmp_path / "model")
    os.utime(folder / "model.safetensors", (1000, 1000))
    return folder


def remembered(folder: Path, arch: str = "architecture") -> RememberedDigest:
    return RememberedDigest(ModelDirectory(folder), arch)


def cached(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "softprompt" / "digests").glob("*"))


def test_the_digest_is_not_computed_again(model):
    digest = load_backbone(ModelDirectory(model))[1]
    record = json.loads((model / RECORD).read_text())
    assert record["digest"] == digest
    (model / RECORD).write_text(json.dumps(record | {"digest": OTHER}))
    assert load_backbone(ModelDirectory(model))[1] == OTHER
    assert load_backbone(ModelDirectory(model), quantize="int8", dtype="bfloat16")[1] == OTHER


def test_the_record_of_a_gguf_file_is_beside_it(tmp_path):
    path = shutil.copy(GOLDEN / "gguf" / "llama.gguf", tmp_path)
    os.utime(path, (1000, 1000))
    digest = load_backbone(GGUFFile(Path(path)))[1]
    assert json.loads((tmp_path / ".llama.gguf.digest").read_text())["digest"] == digest


def test_changed_files_are_read_again(model):
    remembered(model).write(DIGEST)
    assert remembered(model).read() == DIGEST
    os.utime(model / "model.safetensors", ns=(0, 1000 * 10**9 + 1))
    assert remembered(model).read() is None
    os.utime(model / "model.safetensors", (1000, 1000))
    assert remembered(model).read() == DIGEST
    weights = load_file(model / "model.safetensors")
    save_file(weights, model / "model.safetensors", {"longer": "header"})
    os.utime(model / "model.safetensors", (1000, 1000))
    assert remembered(model).read() is None


def test_every_file_of_the_weights_counts(tmp_path):
    folder = shutil.copytree(GOLDEN / "llama-sharded", tmp_path / "model")
    files = ModelDirectory(folder).weight_files
    assert len(files) == 5
    for file in files:
        os.utime(file, (1000, 1000))
    for file in files:
        remembered(folder).write(DIGEST)
        os.utime(file, (1001, 1001))
        assert remembered(folder).read() is None


def test_the_digest_depends_on_the_architecture_and_the_model_type(model):
    remembered(model).write(DIGEST)
    assert remembered(model, "another one").read() is None
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "gemma"}))
    assert remembered(model).read() is None


def test_recently_changed_files_are_not_remembered(model):
    """They could be changed again within the resolution of modification times."""
    for age in (1, -60):
        os.utime(model / "model.safetensors", (1000, time.time() - age))
        remembered(model).write(DIGEST)
        assert not (model / RECORD).exists()


def test_files_that_change_while_they_are_read_are_not_remembered(model):
    digest = remembered(model)
    os.utime(model / "model.safetensors", (1001, 1001))
    digest.write(DIGEST)
    assert not (model / RECORD).exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "[" * 100_000,
        "{}",
        b"\xff",
        {"digest": "a" * 63},
        {"digest": "A" * 64},
        {"digest": DIGEST + "\n"},
        {"digest": None},
        {"version": 0},
        {"files": []},
        {"files": [["model.safetensors", -1, 10**400]]},
    ],
    ids=str,
)
def test_a_damaged_record_is_ignored_and_replaced(model, content):
    remembered(model).write(DIGEST)
    good = (model / RECORD).read_text()
    if isinstance(content, dict):
        content = json.dumps(json.loads(good) | content)
    (model / RECORD).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert remembered(model).read() is None
    remembered(model).write(DIGEST)
    assert (model / RECORD).read_text() == good


def test_a_pipe_or_a_link_as_record_is_replaced(model, tmp_path):
    os.mkfifo(model / RECORD)
    assert remembered(model).read() is None
    remembered(model).write(DIGEST)
    assert remembered(model).read() == DIGEST
    (model / RECORD).unlink()
    (tmp_path / "precious").write_text("data")
    (model / RECORD).symlink_to(tmp_path / "precious")
    remembered(model).write(DIGEST)
    assert (tmp_path / "precious").read_text() == "data"
    assert remembered(model).read() == DIGEST


def test_the_cache_folder_is_used_where_the_model_cannot_be_written(model, tmp_path):
    (model / RECORD).mkdir()
    remembered(model).write(DIGEST)
    assert len(cached(tmp_path)) == 1
    assert remembered(model).read() == DIGEST
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").touch()
    remembered(model).write(DIGEST)  # nothing can be written, which is no error
    assert remembered(model).read() is None


def test_nothing_is_written_to_an_installed_package(model, tmp_path):
    installed = shutil.move(model, tmp_path / "site-packages" / "package")
    remembered(installed).write(DIGEST)
    assert not (installed / RECORD).exists()
    assert len(cached(tmp_path)) == 1
    assert remembered(installed).read() == DIGEST


def test_a_link_to_another_file_is_read_again(model, tmp_path):
    """The hub's cache replaces the target of a link when a model changes."""
    for name in ("first", "second"):
        shutil.copy2(model / "model.safetensors", tmp_path / name)
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(tmp_path / "first")
    remembered(model).write(DIGEST)
    assert remembered(model).read() == DIGEST
    assert (model / RECORD).exists()
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(tmp_path / "second")
    assert remembered(model).read() is None


def test_small_models_are_not_remembered(model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SMALL", 2**20)
    remembered(model).write(DIGEST)
    assert not (model / RECORD).exists()
    assert cached(tmp_path) == []


def test_values_are_checked_even_if_the_digest_is_known(model):
    weights = load_file(model / "model.safetensors")
    for value in (1, np.nan):
        weights["model.norm.weight"][3] = value
        save_file(weights, model / "model.safetensors")
        os.utime(model / "model.safetensors", (1000, 1000))
        if value == 1:
            load_backbone(ModelDirectory(model))
    with pytest.raises(UserError, match=r"tensor model.norm.weight has values that are not finite"):
        load_backbone(ModelDirectory(model))


def test_a_model_with_invalid_values_is_not_remembered(model):
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][3] = np.nan
    save_file(weights, model / "model.safetensors")
    os.utime(model / "model.safetensors", (1000, 1000))
    with pytest.raises(UserError):
        load_backbone(ModelDirectory(model))
    assert not (model / RECORD).exists()
