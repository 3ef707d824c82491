"""`softprompt init` writes an experiment that can be read and trained."""

import json
import os
import shutil

import pyarrow as pa
import pytest
from conftest import GOLDEN
from pyarrow import parquet

from softprompt import load_experiment, train
from softprompt.cli.main import main
from softprompt.data.columns import columns_of
from softprompt.data.guess import guess_task
from softprompt.data.records import as_records

TICKETS = [
    {"id": 100 + i, "message": f"Message {i}", "agent": "Ann" if i % 5 else None, "topic": topic}
    for i, topic in enumerate(["shipping", "billing"] * 20)
]


@pytest.fixture
def init(tmp_path, monkeypatch, capsys):
    """Run the command in an empty folder; return its status and what it printed."""
    monkeypatch.chdir(tmp_path)

    def init(*arguments):
        capsys.readouterr()
        status = main(["init", *arguments])
        return status, *capsys.readouterr()

    return init


def write(path, rows):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def chat_model(tmp_path):
    """A tiny model with a chat template."""
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "llama-grouped", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def train_briefly(path, run, *overrides):
    """Train the experiment for a step on a tiny model."""
    brief = [f"base={GOLDEN / 'llama-grouped'}", "training.steps=1"]
    brief += ["prompt.length=2", "optimizer.warmup_steps=0", "evaluation.samples=1"]
    brief += ["generation.max_new_tokens=2"]
    return train(load_experiment(path, [*brief, *overrides]), run)


def test_labels_in_a_file(init, tmp_path):
    write("my tickets.jsonl", TICKETS)
    status, out, err = init("my tickets.jsonl")
    assert (status, err) == (0, "")
    assert out == "my-tickets.yaml\nnext: softprompt train my-tickets.yaml\n"
    experiment = load_experiment("my-tickets.yaml")
    assert experiment.data.sources == {"train": f"{tmp_path}/my tickets.jsonl"}
    assert experiment.data.shares == {"validation": 0.1, "test": 0.1}
    assert experiment.template.input == "Message: {message}\nTopic:"
    assert experiment.template.target == "{topic}"
    assert experiment.verbalizer == {"billing": " billing", "shipping": " shipping"}
    assert experiment.evaluation.metric == "accuracy"
    text = (tmp_path / "my-tickets.yaml").read_text()
    for section in text.split("\n\n"):
        assert section.startswith("# ")
    assert max(map(len, text.splitlines())) <= 100
    assert "left out" not in text  # the constant field `agent` is not part of the task
    summary = train_briefly("my-tickets.yaml", tmp_path / "run")
    assert set(summary["test"]) >= {"accuracy", "loss"}


def test_free_text_in_a_parquet_file(init, tmp_path):
    columns = {
        "question": [f"What is {i}?" for i in range(30)],
        "context": [f"{i} is a number." if i else None for i in range(30)],
        "answer": [f"A number of value {i}." for i in range(30)],
        "difficulty": [0.5 + i for i in range(30)],
        "source": ["book"] * 30,
    }
    parquet.write_table(pa.table(columns), "questions.parquet")
    assert init("questions.parquet")[0] == 0
    experiment = load_experiment("questions.yaml")
    assert experiment.template.input == "Question: {question}\nAnswer:"
    assert experiment.template.target == " {answer}"
    assert experiment.verbalizer is None
    assert experiment.evaluation.metric == "chrf"
    assert experiment.generation.max_new_tokens == 16
    assert "left out: context" in " ".join((tmp_path / "questions.yaml").read_text().split())
    summary = train_briefly("questions.yaml", tmp_path / "run")
    assert "chrf" in summary["test"]


@pytest.mark.parametrize("validation", ["validation", "valid", "dev"])
def test_files_of_other_splits_are_found(init, tmp_path, validation):
    write("reviews/train.jsonl", TICKETS)
    write(f"reviews/{validation}.jsonl", [{"message": "new", "topic": "returns"}] * 600)
    assert init("reviews/train.jsonl")[0] == 0
    experiment = load_experiment("reviews.yaml")
    assert experiment.data.validation == f"{tmp_path}/reviews/{validation}.jsonl"
    assert experiment.data.test == 0.1
    assert experiment.evaluation.examples == 500
    assert list(experiment.verbalizer) == ["billing", "returns", "shipping"]
    assert experiment.evaluation.metric == "macro_f1"  # one label is much more frequent
    write("reviews/test.jsonl", TICKETS)
    assert init("reviews/train.jsonl", "--force")[0] == 0
    assert load_experiment("reviews.yaml").data.shares == {}


def test_a_folder_and_a_pattern(init, tmp_path):
    write("data/tickets/1.jsonl", TICKETS)
    write("data/tickets/2.jsonl", TICKETS)
    for source in ("data/tickets", "data/tickets/*.jsonl"):
        assert init(source, "--force")[1].startswith("tickets.yaml\n")
        experiment = load_experiment("tickets.yaml")
        assert experiment.data.train == f"{tmp_path}/{source}"


def test_an_experiment_is_replaced_only_with_force(init, tmp_path):
    write("a.jsonl", TICKETS)
    (tmp_path / "a.yaml").write_text("mine")
    status, out, err = init("a.jsonl")
    assert (status, out) == (1, "")
    assert err == "a.yaml: exists already; use --force to replace it\n"
    assert (tmp_path / "a.yaml").read_text() == "mine"
    assert init("a.jsonl", "--force")[0] == 0
    assert load_experiment("a.yaml").data.shares


def test_labels_that_yaml_would_misread_are_quoted(init, tmp_path):
    labels = ["no", "1e3", "null", "true", "a: b", "# c", '"', "é\u2028", "{x}", "'", "-"]
    rows = [{"text": f"{i}.", "label": label} for i, label in enumerate(labels * 3)]
    rows += [{"text": "x.", "label": label} for label in (True, True, False, False)]
    write("odd.jsonl", rows)
    assert init("odd.jsonl")[0] == 0
    assert {*load_experiment("odd.yaml").verbalizer} == {*labels, "false"}
    train_briefly("odd.yaml", tmp_path / "run")


@pytest.mark.parametrize("count", [4, 10, 17, 100, 3000, 30_000])
def test_the_sizes_fit_the_data(init, tmp_path, count):
    write("a.jsonl", [{"text": f"{i}.", "label": f"{i % 2}"} for i in range(count)])
    assert init("a.jsonl")[0] == 0
    experiment = load_experiment("a.yaml")
    held_out = 2 * max(1, round(experiment.data.validation * count))
    assert held_out <= 2000
    assert experiment.training.batch_size <= count - held_out
    assert 60 <= experiment.training.steps <= 400
    assert "words that say what they mean" in " ".join((tmp_path / "a.yaml").read_text().split())


def test_names_that_are_not_plain_can_be_in_a_template(init, tmp_path):
    rows = [{'Review\u2028 "text"': f"{i}x", "prompt": f"{i}y", "label": i % 2} for i in range(9)]
    write("a.jsonl", rows)
    assert init("a.jsonl")[0] == 0
    text = load_experiment("a.yaml").template.input
    assert text.endswith('{record[Review\u2028 "text"]}\nPrompt: {record[prompt]}\nLabel:')
    train_briefly("a.yaml", tmp_path / "run")


def test_pairs_of_prompt_and_completion(init, tmp_path):
    write("a.jsonl", [{"prompt": f"{i}, ", "completion": f"{i + 1}"} for i in range(20)])
    assert init("a.jsonl")[0] == 0
    template = load_experiment("a.yaml").template
    assert (template.input, template.target) == ("{record[prompt]}", "{completion}")
    assert "chrf" in train_briefly("a.yaml", tmp_path / "run")["test"]


def test_conversations(init, chat_model):
    rows = [
        {"id": i, "messages": [{"role": r, "content": f"{r} {i}"} for r in ("user", "assistant")]}
        for i in range(20)
    ]
    write("a.jsonl", rows)
    assert init("a.jsonl")[0] == 0
    experiment = load_experiment("a.yaml")
    assert experiment.template.messages == "messages"
    assert (
        "chrf" in train_briefly("a.yaml", chat_model.parent / "run", f"base={chat_model}")["test"]
    )


def test_a_folder_of_text_files(init, tmp_path):
    (tmp_path / "manual").mkdir()
    for i in range(20):
        (tmp_path / f"manual/{i}.txt").write_text(f"Page {i} of the manual.\n" * 40)
    assert init("manual")[0] == 0
    experiment = load_experiment("manual.yaml")
    assert (experiment.template.text, experiment.template.max_tokens) == ("text", 256)
    assert experiment.evaluation.metric == "perplexity"
    short = "template.max_tokens=64"  # the tiny model has a short context window
    assert "perplexity" in train_briefly("manual.yaml", tmp_path / "run", short)["test"]


def test_long_inputs_are_truncated(init):
    write("a.jsonl", [{"text": f"{i} " * 2000, "label": f"{i % 2}"} for i in range(20)])
    assert init("a.jsonl")[0] == 0
    assert load_experiment("a.yaml").template.max_tokens == 512


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"n": 1}, {"n": 2}], "found no input and target among its fields with text (n)"),
        ([{"n": [1]}], "found no input and target among its fields with text (none)"),
        (
            [{"a{b}": f"{i}x", "label": i % 2} for i in range(9)],
            "cannot have a field with the name 'a{b}'; rename it to 'a_b'",
        ),
        (
            [{"messages": [{"role": "user", "content": c}]} for c in ("Hello", "")],
            "a.jsonl:2: field 'messages': message 1: field 'content' is empty",
        ),
        ([{"text": "x"}, {"text": "y"}], "data.train: no record is left for it"),
        (
            [{"text": f"{i}x", "label": i % 2 if i != 3 else " "} for i in range(9)],
            "a.jsonl:4: field 'label' is empty",
        ),
        ([], "a.jsonl: has no records"),
        (
            [{"text": f"{i}x", "label": i} for i in (0, 1)] * 20,
            "no record is left for it; the training data has 40 records, 2 of them different",
        ),
    ],
)
def test_data_without_a_task_is_one_line(init, tmp_path, rows, message):
    write("a.jsonl", rows)
    status, out, err = init("a.jsonl")
    assert (status, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "a.yaml").exists()


def repeated(**columns):
    """Make 40 rows: a text in capitals differs in every row, and the others take turns."""
    return [
        {
            name: f"{value} {i}" if isinstance(value, str) else value[i % len(value)]
            for name, value in columns.items()
        }
        for i in range(40)
    ]


@pytest.mark.parametrize(
    ("rows", "inputs", "target"),
    [
        (repeated(text="A", label=["x", "y"], rating=[1.5, 2.5]), ["text"], "label"),
        (repeated(label=["x", "y"], group=["p", "q"], text="A"), ["text"], "label"),
        (repeated(review="A", stars=[1, 2, 3]), ["review"], "stars"),
        (repeated(premise="A", hypothesis="B", Label=[0, 1]), ["premise", "hypothesis"], "Label"),
        (repeated(en="A", fr="B", source=["p", "q"]), ["en"], "fr"),
        (repeated(source="A", target="B"), ["source"], "target"),
        (repeated(summary="A", document="B"), ["document"], "summary"),
        (repeated(question="A", answer="B", level=["p", "q"]), ["question"], "answer"),
        (repeated(width=[1.5, 2.5, 3.5], kind=["x", "y"]), ["width"], "kind"),
    ],
)
def test_the_task_is_guessed_from_names_and_values(rows, inputs, target):
    guess = guess_task(columns_of(as_records(rows)), "data")
    assert [column.name for column in guess.inputs] == inputs
    assert guess.target.name == target
