"""The command line: results, error messages and help."""

import contextlib
import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
from conftest import GOLDEN, write_experiment

from softprompt import load_experiment, train
from softprompt.cli.main import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of the letters experiment."""
    folder = tmp_path_factory.mktemp("letters")
    train(load_experiment(write_experiment(folder, 5, 5)), folder / "run")
    return str(folder / "run")


@pytest.fixture
def experiment_file(tmp_path):
    """The letters experiment with texts of one length, so that only one shape is compiled."""
    return write_experiment(tmp_path, 5, 5)


def test_train_prints_a_summary_that_eval_reproduces(call, experiment_file, tmp_path):
    status, out, err = call("train", experiment_file, "seed=1", "--run-dir", tmp_path / "run")
    assert status == 0
    summary = json.loads(out)
    assert f"prompt: {tmp_path / 'run' / 'prompt'}" in err
    status, out, _ = call("eval", tmp_path / "run", "--split", "test")
    assert (status, json.loads(out)) == (0, {"split": "test", "examples": 7, **summary["test"]})
    status, out, _ = call("eval", tmp_path / "run", "--split", "validation", "--batch-size", "3")
    measured = json.loads(out)
    assert measured["accuracy"] == summary["validation"]["accuracy"]
    assert measured["loss"] == pytest.approx(summary["validation"]["loss"], rel=1e-5)


def test_the_default_run_folder_has_the_name_of_the_experiment(
    call, experiment_file, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    assert call("train", experiment_file)[0] == 0
    assert (tmp_path / "runs" / "letters" / "prompt" / "prompt.json").exists()


def test_predict_reads_arguments_files_and_standard_input(call, run, tmp_path, monkeypatch):
    status, out, _ = call("predict", run, "aaa", "zz")
    assert status == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["input"] for line in lines] == [{"text": "aaa"}, {"text": "zz"}]
    for line in lines:
        assert sum(line["probabilities"].values()) == pytest.approx(1)
        assert line["label"] == max(line["probabilities"], key=line["probabilities"].get)

    (tmp_path / "texts.txt").write_text("aaa\nzz\n")
    assert call("predict", run, "--input", tmp_path / "texts.txt")[1] == out
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfaaa\r\n\nzz")))
    assert call("predict", run, "--input", "-")[1] == out
    records = '{"text": "aaa", "label": "x"}\n{"text": "zz", "label": "y"}\n'
    (tmp_path / "texts.jsonl").write_text(records)
    (tmp_path / "texts.csv").write_text("text,label\naaa,x\nzz,y\n")
    status, out, _ = call("predict", run, "--input", tmp_path / "texts.jsonl")
    assert [json.loads(line)["input"]["label"] for line in out.splitlines()] == ["x", "y"]
    assert [json.loads(line)["label"] for line in out.splitlines()] == [x["label"] for x in lines]
    assert call("predict", run, "--input", tmp_path / "texts.csv")[1] == out
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(records.encode())))
    assert call("predict", run, "--input", "-", "--jsonl")[1] == out


def test_inspect_shows_every_virtual_token(call, run):
    status, out, _ = call("inspect", run, "--nearest", "2")
    assert status == 0
    first, _, *rows = out.splitlines()
    assert first.startswith("3 virtual tokens on ")
    assert [row.split()[0] for row in rows] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "{run}"], "give either texts or --input FILE"),
        (["predict", "{run}", "a", "--input", "f"], "give either texts or --input FILE"),
        (["predict", "{run}", ""], "text 1: field 'text' is empty"),
        (["predict", "{run}", "--input", "/no/file"], "/no/file: cannot be read"),
        (["predict", "{run}", "--input", "."], ".: cannot be read (Is a directory)"),
        (["predict", "/no/run", "a"], "/no/run: contains no trained prompt"),
        (
            ["predict", "{run}", "a", "--base", "nothing"],
            "base 'nothing': no such file or directory",
        ),
        (
            ["predict", "{run}", "a", "--base", str(GOLDEN / "llama-untied")],
            "trained on the base model",
        ),
        (["eval", "/no/run"], "/no/run: not a run folder"),
        (["eval", "x" * 5000], "xxx: not a run folder"),
        (["predict", "x" * 5000, "a"], "xxx: contains no trained prompt"),
        (["runs", "x" * 5000], "cannot be read or written (File name too long)"),
        (["eval", "{run}", "{run}", "--metrics", "bleu"], "--metrics, --output, --normalize"),
        (["eval", "{run}", "--metrics", "rogue"], "there is no metric 'rogue'"),
        (["generate", "{run}"], "give either texts or --input FILE"),
        (["generate", "{run}", "a", "--top-k", "2"], "top_k needs a temperature"),
        (["generate", "{run}", "a", "--temperature", "warm"], "invalid float value: 'warm'"),
        (["generate", "{run}", "a", "--temperature", "-1"], "temperature: Input should be greater"),
        (["generate", "/no/run", "a"], "/no/run: contains no trained prompt"),
        (["predict", "{run}", "a", "--batch-size", "0"], "must be a whole number, 1 or more"),
        (["predict", "{run}", "--input", "f", "--jsonl"], "--jsonl is for standard input"),
        (["predict"], "the following arguments are required: RUN"),
        (["eval", "{run}", "--split", "dev"], "invalid choice: 'dev'"),
        (["eval", "{run}", "--fast"], "unknown argument '--fast'; see softprompt eval --help"),
        (["eval", "{run}", "more"], "more: contains no trained prompt"),
        (["fit"], "invalid choice: 'fit'"),
        (["train"], "the following arguments are required: EXPERIMENT; see"),
        (["train", "/no/file.yaml"], "/no/file.yaml: no such file; there is no folder /no"),
        (["train", "caf\udce9.yaml"], "argument 'caf\\udce9.yaml': not valid text"),
        (["train", "a.yaml", "--run-dir", "a\0b"], "argument 'a\\x00b': not valid text"),
        (["generate", "{run}", "a", "--seed", "9" * 5000], "invalid int value: '999"),
    ],
)
def test_mistakes_print_one_line_and_exit_with_status_1(call, run, arguments, message):
    status, out, err = call(*[a.format(run=run) for a in arguments])
    assert status == 1
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_options_may_come_before_and_after_overrides_and_texts(
    call, run, experiment_file, tmp_path
):
    assert call("predict", run, "--batch-size", "32", "aaa", "zz") == call(
        "predict", run, "aaa", "zz"
    )
    folder = str(tmp_path / "run")
    words = ["training.steps=1", "--run-dir", folder, "prompt.length=2"]
    status, out, _ = call("train", experiment_file, *words)
    assert (status, json.loads(out)["trainable_parameters"]) == (0, 2 * 32)


def test_a_damaged_prompt_is_rejected_with_the_name_of_the_file(call, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    path = next(p for p in (copy / "prompt").rglob("*") if p.is_file())
    path.write_bytes(path.read_bytes() + b" ")
    status, _, err = call("predict", copy, "a")
    assert status == 1
    assert str(path) in err


def test_eval_finds_out_at_once_that_its_output_cannot_be_written(call, run, tmp_path, monkeypatch):
    def load_prompt(*arguments):
        raise AssertionError("the evaluation has started")

    (tmp_path / "notes.txt").write_text("my own notes")
    with monkeypatch.context() as patch:
        patch.setattr("softprompt.inference.prompt.load_prompt", load_prompt)
        for name, message in (
            (".", "not a regular file"),
            ("none/a.jsonl", "No such file or directory"),
            ("notes.txt", "exists and does not hold predictions; choose another file"),
        ):
            status, out, err = call("eval", run, "--output", tmp_path / name)
            assert (status, out, err.count("\n")) == (1, "", 1)
            assert message in err
    assert (tmp_path / "notes.txt").read_text() == "my own notes"
    for _ in range(2):  # earlier predictions are replaced
        assert call("eval", run, "--output", tmp_path / "a.jsonl")[0] == 0
        assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 7


def test_eval_prints_the_confusion_matrix_as_a_table_on_a_terminal(call, run, monkeypatch):
    flat = json.loads(call("eval", run, "--metrics", "confusion")[1])
    assert sum(flat[f"confusion.{a}.{b}"] for a in ("low", "high") for b in ("low", "high")) == 7
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    line, head, *rows = call("eval", run, "--metrics", "confusion")[1].splitlines()
    assert json.loads(line) == {k: v for k, v in flat.items() if "confusion" not in k}
    assert head.split()[-2:] == ["high", "low"]
    assert [row.split() for row in rows] == [
        [label, *(str(int(flat[f"confusion.{label}.{other}"])) for other in ("high", "low"))]
        for label in ("high", "low")
    ]


def test_inputs_come_from_pipes_but_not_without_limit(call, run, tmp_path, monkeypatch):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("aaa\nzz\n",))
    writer.start()
    status, out, _ = call("predict", run, "--input", pipe)
    writer.join()
    assert (status, len(out.splitlines())) == (0, 2)
    monkeypatch.setattr("softprompt.cli.inputs._LARGEST_INPUT", 2**20)
    status, out, err = call("predict", run, "--input", "/dev/zero")
    assert (status, out, err) == (1, "", "/dev/zero: larger than 1 MiB; split it\n")


@pytest.mark.parametrize(
    "command",
    [
        *("init", "study", "train", "show", "sweep", "eval", "predict", "generate", "score"),
        *("inspect", "compare", "runs", "report", "export", "import"),
    ],
)
def test_the_help_of_a_command_has_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"  softprompt {command} " in capsys.readouterr().out.split("examples:")[1]


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_do_not_import_jax(option):
    code = (
        "import sys\nfrom softprompt.cli.main import main\n"
        f"try: main(['{option}'])\nfinally: assert not {{'jax', 'numpy'}} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_matplotlib_does_not_warn_about_its_cache_folder(tmp_path):
    (tmp_path / "file").write_text("")
    code = (
        "from softprompt.cli.progress import printed_log\n"
        "with printed_log():\n    import matplotlib\n    matplotlib.get_cachedir()"
    )
    unusable = dict.fromkeys(["XDG_CACHE_HOME", "XDG_CONFIG_HOME"], str(tmp_path / "file"))
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | unusable, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_version_of_the_installed_package_is_printed(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"softprompt {importlib.metadata.version('softprompt')}\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")
def test_a_full_disk_behind_standard_output_gives_one_line(run, capsys, monkeypatch):
    with (
        monkeypatch.context() as patch,
        contextlib.suppress(OSError),
        open("/dev/full", "w") as full,
    ):
        patch.setattr("sys.stdout", full)
        assert main(["predict", run, "aaa"]) == 1
    assert capsys.readouterr().err == "cannot be read or written (No space left on device)\n"


@pytest.mark.parametrize(
    ("command", "options"),
    [("train", "--run-dir (make: RUN=DIR)"), ("sweep", "--folder (make: RUN=DIR)")],
)
def test_the_error_about_an_unsuitable_folder_names_the_option_that_sets_it(
    call, experiment_file, tmp_path, command, options
):
    if command == "sweep":
        experiment_file.write_text(experiment_file.read_text() + "sweep: {seed: [0, 1]}\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    option = options.split()[0]
    status, _, err = call(command, experiment_file, option, tmp_path / "mine")
    assert status == 1
    assert "it contains notes.txt" in err
    assert err.endswith(f"; choose another folder with {options}\n")
