"""The command `softprompt score`: its output and its errors."""

import io
import json

import pytest

from softprompt.cli.main import main
from softprompt.metrics.named import measure

ANSWERS = [
    {"prediction": "that too is a test", "reference": "this is a test"},
    {"prediction": "Съешь ещё булок", "reference": ["Съешь ещё", "ещё этих булок"]},
    {"prediction": "", "reference": "an empty answer is an answer"},
]


def write(path, answers):
    path.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    return path


@pytest.fixture
def call(capsys):
    def call(*arguments):
        capsys.readouterr()
        return main(["score", *map(str, arguments)]), *capsys.readouterr()

    return call


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "predictions.jsonl", ANSWERS)


def test_json_contains_the_values_of_a_known_pair(call, tmp_path):
    file = write(tmp_path / "one.jsonl", ANSWERS[:1])
    status, out, _ = call("--metrics", "rouge,bleu", "--json", file)
    found = json.loads(out)
    assert status == 0
    assert found["rouge1.recall"] == 3 / 4
    assert found["rouge1.precision"] == 3 / 5
    assert found["rouge2.recall"] == pytest.approx(2 / 3)
    assert found["rougeL.f1"] == pytest.approx(2 / 3)
    assert 0 < found["bleu"] < 100
    assert "|eff:yes|tok:13a|" in found["signatures"]["bleu"]


def test_the_table_contains_values_and_intervals(call, file):
    status, out, _ = call("--metrics", "rouge1,chrf", file)
    answers = [a["prediction"] for a in ANSWERS], [a["reference"] for a in ANSWERS]
    scores = measure(["rouge1", "chrf"], *answers)
    first, *rows = out.splitlines()
    assert (status, first.split()) == (0, ["metric", "value", "95%", "interval"])
    assert [row.split()[0] for row in rows[:4]] == [
        *("rouge1.precision", "rouge1.recall", "rouge1.f1", "chrf")
    ]
    low, high = scores["rouge1"].intervals()["rouge1.f1"]
    value = scores["rouge1"].values()["rouge1.f1"]
    assert rows[2].split() == ["rouge1.f1", f"{value:.4f}", f"{low:.4f}", "to", f"{high:.4f}"]
    assert rows[4].startswith("chrf: nrefs:var|case:mixed")


def test_the_option_each_scores_every_prediction_separately(call, file):
    _, out, _ = call("--metrics", "rougeL,exact_match", "--each", file)
    each = [json.loads(line) for line in out.splitlines()]
    assert [one["exact_match"] for one in each] == [0, 0, 0]
    assert [round(one["rougeL.f1"], 3) for one in each] == [0.667, 0.8, 0]


def test_the_option_against_compares_two_systems(call, file, tmp_path):
    better = [{**answer, "prediction": "this is a test"} for answer in ANSWERS]
    other = write(tmp_path / "other.jsonl", better)
    _, out, _ = call("--metrics", "rouge1", "--json", other, "--against", file)
    found = json.loads(out)["differences"]["rouge1.f1"]
    first = measure(
        ["rouge1"], [a["prediction"] for a in ANSWERS], [a["reference"] for a in ANSWERS]
    )
    ours = json.loads(out)["rouge1.f1"]
    assert found["difference"] == pytest.approx(ours - first["rouge1"].values()["rouge1.f1"])
    assert 0 < found["p_value"] <= 1
    _, out, _ = call("--metrics", "rouge1", other, "--against", file)
    assert out.splitlines()[0].split() == [
        *("metric", "this", "the", "other", "difference", "95%", "interval", "p")
    ]


def test_the_confusion_matrix_is_a_table(call, tmp_path):
    pairs = [("yes", "yes"), ("yes", "no"), ("no", "no")]
    answers = [{"prediction": given, "reference": wanted} for given, wanted in pairs]
    file = write(tmp_path / "labels.jsonl", answers)
    _, out, _ = call("--metrics", "accuracy,confusion", file)
    assert [line.split() for line in out.splitlines()[2:]] == [
        ["reference", "\\", "prediction", "no", "yes"],
        ["no", "1", "1"],
        ["yes", "0", "1"],
    ]
    assert call("--metrics", "confusion", file)[1].splitlines() == out.splitlines()[2:]
    found = json.loads(call("--metrics", "confusion", "--json", file)[1])
    assert found["confusion.no.yes"] == 1


def test_text_that_standard_output_cannot_show_is_escaped(call, tmp_path, monkeypatch):
    file = write(tmp_path / "labels.jsonl", [{"prediction": "é", "reference": "é"}])
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", shown)
    assert call("--metrics", "confusion", file)[0] == 0
    shown.flush()
    assert b"\\xe9" in shown.buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prediction": "a"}', ":1: has no 'reference'"),
        ('{"reference": "a"}', ":1: has no 'prediction'"),
        ('{"prediction": 1, "reference": "a"}', ":1: 'prediction' is not text"),
        ('{"prediction": "a", "reference": []}', ":1: 'reference' is neither a text nor a list"),
        ('{"prediction": "a", "reference": [1]}', ":1: 'reference' is neither"),
        ('{"prediction": "a", "reference": "b"}\n{', ":2: not valid JSON"),
        ("", "has no records"),
    ],
)
def test_a_mistake_is_reported_on_one_line_with_file_and_line_number(
    call, tmp_path, content, message
):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    status, out, err = call(path)
    assert (status, out) == (1, "")
    assert f"{path}" in err
    assert message in err
    assert err.count("\n") == 1


def test_invalid_arguments_are_rejected(call, file, tmp_path):
    assert (
        "--each: macro_f1 is a metric of all examples"
        in call("--metrics", "rouge, macro_f1", "--each", file)[2]
    )
    assert "not allowed with argument" in call(file, "--each", "--against", file)[2]
    assert "no metric 'rogue'; known: rouge, bleu" in call("--metrics", "rogue", file)[2]
    assert "predictions are read from a .jsonl file" in call(tmp_path / "x.txt")[2]
    assert "none.jsonl: no such file" in call(tmp_path / "none.jsonl")[2]
    other = write(tmp_path / "other.jsonl", ANSWERS[::-1])
    assert "do not have the same references" in call(file, "--against", other)[2]
