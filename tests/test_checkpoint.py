"""Saved arrays and checkpoints: exact, atomic, and protected by checksums."""

import hashlib
import os
import shutil
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from softprompt import SoftPrompt, UserError
from softprompt.storage.arrays import DamagedError, load_arrays, load_description, save_arrays
from softprompt.storage.checkpoints import Checkpoints

ARRAYS = {"vectors": jnp.arange(12.0).reshape(3, 4), "count": jnp.array(7)}


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "saved"
    save_arrays(folder, ARRAYS, {"what": "π"}, "about.json")
    return folder


def test_saved_arrays_and_descriptions_are_loaded_unchanged(saved):
    assert load_description(saved, "about.json") == {"what": "π"}
    loaded = load_arrays(saved, ARRAYS)
    np.testing.assert_array_equal(loaded["vectors"], ARRAYS["vectors"])
    assert loaded["count"] == 7


def test_sha256sum_accepts_the_checksums(saved):
    import subprocess

    check = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=saved, capture_output=True)
    assert check.returncode == 0
    assert check.stdout.count(b": OK") == sum(p.is_file() for p in saved.rglob("*")) - 1


def test_a_change_to_any_file_is_detected_and_named(saved):
    files = [p for p in saved.rglob("*") if p.is_file()]
    assert len(files) > 5
    for path in files:
        content = path.read_bytes()
        spoiled = [content + b"x"]
        if content:
            flipped = bytearray(content)
            flipped[len(content) // 2] ^= 1
            spoiled += [content[:-1], bytes(flipped)]
        for new in spoiled:
            path.write_bytes(new)
            with pytest.raises(DamagedError) as error:
                load_description(saved, "about.json")
            assert str(saved) in str(error.value)
            if path.name != "SHA256SUMS":
                assert str(path) in str(error.value)
        path.unlink()
        with pytest.raises(DamagedError, match="missing"):
            load_description(saved, "about.json")
        path.write_bytes(content)
    load_description(saved, "about.json")


def test_a_folder_from_outside_cannot_mislead_the_reader(saved):
    (saved / "arrays" / "more").write_text("")
    with pytest.raises(DamagedError, match="arrays/more: not listed in SHA256SUMS"):
        load_description(saved, "about.json")
    (saved / "arrays" / "more").unlink()
    (saved / "README.md").write_text("not about arrays")
    load_description(saved, "about.json")
    about = (saved / "about.json").read_bytes()
    (saved / "about.json").unlink()
    os.mkfifo(saved / "about.json")
    with pytest.raises(DamagedError, match=r"about.json: neither a file nor a folder"):
        load_description(saved, "about.json")
    (saved / "about.json").unlink()
    (saved / "about.json").write_bytes(about)
    sums = (saved / "SHA256SUMS").read_text()
    for name in ("/etc/hostname", "../outside"):
        (saved / "SHA256SUMS").write_text(f"{sums}{'0' * 64}  {name}\n")
        with pytest.raises(DamagedError, match=f"{name}: missing"):
            load_description(saved, "about.json")
    (saved / "SHA256SUMS").unlink()
    (saved / "SHA256SUMS").mkdir()
    with pytest.raises(DamagedError, match="SHA256SUMS: not a regular file"):
        load_description(saved, "about.json")


@pytest.mark.parametrize("content", ["[1]", "{", "[" * 100_000, '{"x": 1' + "0" * 5000 + "}"])
def test_a_description_that_is_not_a_json_object_is_reported(saved, content):
    (saved / "about.json").write_text(content)
    digest = hashlib.sha256(content.encode()).hexdigest()
    sums = (saved / "SHA256SUMS").read_text().splitlines()
    kept = [line for line in sums if not line.endswith("  about.json")]
    (saved / "SHA256SUMS").write_text("\n".join([*kept, f"{digest}  about.json", ""]))
    with pytest.raises(DamagedError, match=r"about\.json: not "):
        load_description(saved, "about.json")


def test_arrays_that_orbax_cannot_read_or_that_are_too_large_are_reported(saved, monkeypatch):
    monkeypatch.setattr("softprompt.storage.arrays.available_memory", lambda: 50)
    with pytest.raises(
        UserError, match=r"arrays: needs .* of memory, but .* are available"
    ) as large:
        load_arrays(saved, ARRAYS)
    assert not isinstance(large.value, DamagedError)
    monkeypatch.undo()
    with monkeypatch.context() as patched:
        patched.setattr("softprompt.storage.arrays.orbax.load", lambda *_: 1 / 0)
        with pytest.raises(DamagedError, match=r"arrays: cannot be read \(division by zero\)"):
            load_arrays(saved, ARRAYS)
    (saved / "arrays" / "state" / "_METADATA").write_text("{")
    with pytest.raises(DamagedError, match="unexpected arrays"):
        load_arrays(saved, ARRAYS)


def test_a_full_disk_is_found_before_and_while_arrays_are_written(saved, monkeypatch):
    full = "RESOURCE_EXHAUSTED: Failed to write [os_error_code='28']"

    def no_space(*_):
        raise ValueError(full)

    with monkeypatch.context() as patched:
        patched.setattr("softprompt.storage.arrays.orbax.save", no_space)
        with pytest.raises(OSError, match="No space left on device"):
            save_arrays(saved, ARRAYS, {}, "about.json")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="No space left on device"):
        save_arrays(saved, ARRAYS, {}, "about.json")
    monkeypatch.undo()
    load_description(saved, "about.json")


def test_arrays_of_another_shape_or_structure_are_rejected(saved):
    with pytest.raises(UserError) as error:
        load_arrays(saved, ARRAYS | {"vectors": jnp.zeros((3, 5))})
    assert "vectors is float32[3, 4], expected float32[3, 5]" in str(error.value)
    with pytest.raises(UserError, match="other is missing, expected int32"):
        load_arrays(saved, ARRAYS | {"other": ARRAYS["count"]})
    with pytest.raises(UserError, match=r"count is int32\[\], expected no such array"):
        load_arrays(saved, {"vectors": ARRAYS["vectors"]})


def test_saving_replaces_a_folder_and_leaves_no_temporary_folders(saved):
    save_arrays(saved, ARRAYS | {"count": jnp.array(8)}, {}, "about.json")
    assert load_arrays(saved, ARRAYS)["count"] == 8
    assert [p.name for p in saved.parent.iterdir()] == ["saved"]


def test_a_failed_save_keeps_the_old_folder(saved, monkeypatch):
    monkeypatch.setattr("softprompt.storage.arrays._sha256", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_arrays(saved, ARRAYS | {"count": jnp.array(8)}, {}, "about.json")
    monkeypatch.undo()
    load_description(saved, "about.json")
    assert load_arrays(saved, ARRAYS)["count"] == 7


def test_the_newest_checkpoints_and_the_best_one_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (1, 2, 3, 4):
        checkpoints.save(step, {"x": jnp.array(step)}, {"step": step}, best=1)
    checkpoints.wait()
    assert checkpoints.steps == [1, 3, 4]
    assert dict(checkpoints.read_descriptions())[3] == {"step": 3}
    assert checkpoints.load(1, {"x": jnp.array(0)})["x"] == 1


def test_module_and_optimizer_states_can_be_used_after_loading(tmp_path):
    trainable = nnx.state(SoftPrompt(jnp.ones((3, 4))), SoftPrompt.trainable)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
    state = (trainable, optimizer.init(trainable))
    save_arrays(tmp_path / "s", state, {}, "about.json")
    loaded, opt_state = load_arrays(tmp_path / "s", state)
    gradients = nnx.state(SoftPrompt(jnp.ones((3, 4))), SoftPrompt.trainable)
    updates, _ = optimizer.update(gradients, opt_state, loaded)
    assert optax.apply_updates(loaded, updates)["vectors"][...].shape == (3, 4)


def test_a_write_error_names_the_folder(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "checkpoints").write_text("in the way")
    checkpoints.save(1, {"x": jnp.array(1)}, {}, best=1)
    with pytest.raises(UserError, match="cannot be written"):
        checkpoints.wait()
