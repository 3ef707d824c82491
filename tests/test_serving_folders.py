"""A prompt that cannot be loaded is reported once, and the other prompts are loaded."""

import pytest

from softprompt import UserError
from softprompt.serving import watch
from softprompt.serving.scheduler import Busy
from softprompt.serving.watch import Folders


class Prompts:
    """Loads everything but the prompts with an error."""

    def __init__(self):
        self.errors: dict[str, Exception] = {}
        self.loaded: list[str] = []

    def load(self, name, folder):
        if name in self.errors:
            raise self.errors[name]
        self.loaded.append(name)

    def remove(self, name):
        return True


@pytest.fixture
def prompts():
    return Prompts()


@pytest.fixture
def folders(prompts, tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "prompt.json").write_text("{}")
    return Folders(tmp_path, prompts, frozenset())


@pytest.mark.parametrize("error", [UserError("bad"), PermissionError("bad"), KeyError("bad")])
def test_one_that_cannot_be_loaded_does_not_stop_the_others(folders, prompts, error, caplog):
    prompts.errors = {"b": error}
    for _ in range(3):
        folders.look(at_once=True)
    assert sorted(prompts.loaded) == ["a", "c"]
    assert caplog.text.count("not served") == 1


def test_one_that_cannot_be_read_does_not_stop_the_others(folders, prompts, monkeypatch, caplog):
    def stamp(path, real=watch._stamp):
        if path.name == "b":
            raise PermissionError("bad")
        return real(path)

    prompts.errors = {"b": PermissionError("bad")}
    monkeypatch.setattr(watch, "_stamp", stamp)
    for _ in range(3):
        folders.look(at_once=True)
    assert sorted(prompts.loaded) == ["a", "c"]
    assert caplog.text.count("not served") == 1


def test_a_busy_server_tries_again(folders, prompts):
    prompts.errors = {"b": Busy()}
    folders.look(at_once=True)
    prompts.errors = {}
    folders.look()
    assert sorted(prompts.loaded) == ["a", "b", "c"]


def test_a_folder_that_failed_is_tried_again_after_it_was_deleted(folders, prompts):
    folder, aside = folders.root / "b", folders.root / ".b"
    prompts.errors = {"b": UserError("bad")}
    folders.look(at_once=True)
    prompts.errors = {}
    folder.rename(aside)
    folders.look(at_once=True)
    aside.rename(folder)  # with the same times
    folders.look(at_once=True)
    assert sorted(prompts.loaded) == ["a", "b", "c"]
