"""Images, audio and other files in datasets are not opened."""

import sys
import types

import pytest

from softprompt import UserError
from softprompt.data.media import without_media
from softprompt.data.records import read_source

datasets = pytest.importorskip("datasets")


@pytest.fixture
def dataset(tmp_path):
    """A dataset whose image paths name a file that is not an image, as in a hostile dataset."""
    secret = tmp_path / "secret"
    secret.write_text("not an image")
    image = {"path": str(secret), "bytes": None}
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "image": datasets.Image(),
            "many": datasets.List(datasets.Image()),
            "inside": {"name": datasets.Value("string"), "audio": datasets.Image()},
            "tags": datasets.List(datasets.Value("string")),
        }
    )
    row = {"text": "a", "image": image, "many": [image], "tags": ["b"]}
    row["inside"] = {"name": "c", "audio": image}
    return datasets.Dataset.from_list([row], features=features)


def test_columns_of_files_are_left_out_of_a_saved_dataset(dataset, tmp_path, capsys):
    folder = str(tmp_path / "saved")
    dataset.save_to_disk(folder)
    (record,) = read_source(folder)
    assert record.fields == {"text": "a", "tags": ["b"]}
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"{folder}: left out 'image', 'many', 'inside': images, audio and other files are not read"
    )


def test_columns_of_files_are_left_out_of_a_dataset_on_the_hub(dataset, monkeypatch):
    hub = types.SimpleNamespace(load_dataset=lambda name, split: dataset)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    (record,) = read_source("hub:some/name#train")
    assert record.fields == {"text": "a", "tags": ["b"]}


def test_a_dataset_of_files_alone_is_refused(dataset, tmp_path):
    folder = str(tmp_path / "saved")
    dataset.select_columns(["image"]).save_to_disk(folder)
    with pytest.raises(UserError, match="saved: has only images, audio or other files"):
        read_source(folder)


@pytest.mark.parametrize("kind", ["Audio", "Image", "Video", "Pdf"])
def test_every_feature_that_opens_files_is_recognized(kind):
    feature = getattr(datasets, kind)()
    rows = types.SimpleNamespace(
        features={"text": datasets.Value("string"), "file": datasets.List(feature)},
        remove_columns=lambda names: names,
    )
    assert without_media(rows, "a") == ["file"]
