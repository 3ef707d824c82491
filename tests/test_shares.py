"""Validation and test data as shares of the training data."""

import datetime
import json
import random

import pytest
from conftest import write_experiment_with_data

from softprompt import UserError, load_experiment, train
from softprompt.cli.main import main
from softprompt.data.records import as_records
from softprompt.data.splits import SplitReader, divide, read_split


def numbered(count):
    return as_records([{"text": f"text {i}", "label": i % 3} for i in range(count)])


def texts_of(part):
    return [record.fields["text"] for record in part]


def test_shares_have_their_size_and_the_rest_keeps_its_order():
    records = numbered(1000)
    parts = divide(records, {"validation": 0.1, "test": 0.25}, seed=0)
    assert {split: len(part) for split, part in parts.items()} == {
        "validation": 100,
        "test": 250,
        "train": 650,
    }
    order = texts_of(records)
    assert texts_of(parts["train"]) == sorted(texts_of(parts["train"]), key=order.index)
    assert sorted(text for part in parts.values() for text in texts_of(part)) == sorted(order)
    validation = parts["validation"]
    assert validation[-1] == list(validation)[-1]
    assert list(validation[3:5]) == list(validation)[3:5]
    # Of data in the order of its labels, the first records of a share have all labels.
    by_label = sorted(records, key=lambda record: record.fields["label"])
    first = divide(by_label, {"validation": 0.1}, seed=0)["validation"][:20]
    assert {record.fields["label"] for record in first} == {0, 1, 2}


def test_the_seed_alone_chooses_the_shares():
    records, shares = numbered(200), {"validation": 0.2}
    chosen = {seed: texts_of(divide(records, shares, seed)["validation"]) for seed in (0, 1)}
    assert len(set(chosen[0]) & set(chosen[1])) < 30
    # These numbers must not change: a resumed run needs the same split.
    assert chosen[0][:4] == ["text 50", "text 176", "text 167", "text 114"]
    shuffled = random.Random(0).sample(list(records), 200)
    assert texts_of(divide(shuffled, shares, 0)["validation"]) == chosen[0]
    with_test = divide(records, {**shares, "test": 0.1}, 0)
    assert texts_of(with_test["validation"]) == chosen[0]


def test_equal_records_are_in_one_split():
    rows = [{"text": f"text {i % 60}", "label": "x"} for i in range(300)]
    rows += [{"label": "x", "text": f"text {i % 60}"} for i in range(300)]  # another order
    rows += [{"text": "often", "label": "x"}] * 400
    parts = divide(as_records(rows), {"validation": 0.1, "test": 0.2}, seed=3)
    found = {split: set(texts_of(part)) for split, part in parts.items()}
    assert sum(map(len, found.values())) == 61
    assert {split: len(part) for split, part in parts.items()} == {
        "train": 700,
        "validation": 100,
        "test": 200,
    }
    assert "often" in found["train"]  # it is larger than the other splits


def test_values_that_json_does_not_have_do_not_change_between_processes():
    rows = [
        {"text": str(i), "b": b"\xff", "d": datetime.date(2020, 1, 1 + i), "o": object()}
        for i in range(20)
    ]
    first = divide(as_records(rows), {"test": 0.5}, 0)["test"]
    again = divide(as_records([{**row, "o": object()} for row in rows]), {"test": 0.5}, 0)["test"]
    assert texts_of(first) == texts_of(again)
    with pytest.raises(UserError, match="row 0: its fields cannot be compared"):
        divide(as_records([{"x": {(1,): 2}}]), {"test": 0.5}, 0)


@pytest.mark.parametrize("rows", [[{"text": "a"}], [{"text": "a"}] * 20])
def test_a_share_without_records_is_an_error(rows):
    with pytest.raises(UserError, match=rf"no record is left.* has {len(rows)} records, 1 of them"):
        divide(as_records(rows), {"validation": 0.1}, 0)


def test_shares_follow_the_seed_of_the_experiment_and_are_read_once(tmp_path, monkeypatch):
    data = {"train": ["train.jsonl", "validation.jsonl"], "validation": 0.2, "test": 0.1}
    file = write_experiment_with_data(tmp_path, data)
    experiments = [load_experiment(file, [f"seed={seed}"]) for seed in (0, 1)]
    reader = SplitReader()
    splits = reader.read(experiments[0], {})
    assert list(splits) == ["train", "validation", "test"]
    assert sum(map(len, splits.values())) == 39
    assert all(reader.read(experiments[0], {})[name] is part for name, part in splits.items())
    other = reader.read(experiments[1], {})
    assert texts_of(other["validation"]) != texts_of(splits["validation"])
    for split, part in other.items():
        assert list(read_split(experiments[1], split)) == list(part)


def test_shares_are_taken_from_rows_in_memory_and_are_replaced_by_them(tmp_path):
    data = {"train": "no/such.jsonl", "validation": 0.1, "test": 0.1}
    experiment = load_experiment(write_experiment_with_data(tmp_path, data))
    rows = [{"text": f"{i}"} for i in range(100)]
    splits = SplitReader().read(experiment, {"train": rows})
    assert {split: len(part) for split, part in splits.items()} == {
        "train": 80,
        "validation": 10,
        "test": 10,
    }
    splits = SplitReader().read(experiment, {"train": rows, "validation": rows[:3]})
    assert [len(part) for part in splits.values()] == [90, 3, 10]


def test_a_run_with_a_share_trains_resumes_and_is_evaluated_on_it(tmp_path, capsys):
    file = write_experiment_with_data(
        tmp_path, {"train": ["train.jsonl", "*ation.jsonl"], "validation": 0.2}
    )
    experiment = load_experiment(file, ["training.steps=4"])
    summary = train(experiment, tmp_path / "run")
    assert train(experiment, tmp_path / "run") == summary
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), "--split", "validation"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["examples"] == len(read_split(experiment, "validation"))
    assert measured["accuracy"] == summary["validation"]["accuracy"]
    assert main(["eval", str(tmp_path / "run"), "--split", "train"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["examples"] == len(read_split(experiment, "train"))


def test_advice_comes_with_missing_data_of_other_splits(tmp_path):
    experiment = load_experiment(
        write_experiment_with_data(
            tmp_path, {"train": "train.jsonl", "validation": ["test.jsonl", "v*.csv"]}
        )
    )
    with pytest.raises(UserError, match=r"v\*\.csv: no file matches .* set data\.validation=0\.1$"):
        SplitReader().read(experiment, {})
