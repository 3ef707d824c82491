"""Folders for results are checked before the work, and nothing is created by the check."""

import pytest

from softprompt.errors import FolderError
from softprompt.files.folders import require_usable


def test_existing_and_new_folders_are_usable(tmp_path):
    require_usable(tmp_path)
    require_usable(tmp_path / "new" / "folder")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["file", "file/folder", "a" * 300, "nul\0", "/dev/null/folder"])
def test_a_path_that_cannot_be_a_folder_is_rejected(tmp_path, path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FolderError, match=r"^[^\n]+; choose another folder$"):
        require_usable(tmp_path / path)
