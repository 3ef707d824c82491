"""Every code block of the README and the documentation and every docstring example works.

Python blocks run, one namespace per page, in a folder with small trained runs. Shell commands
are parsed by the real argument parser, and `make` commands by `make`. YAML blocks are read as
experiments.
"""

import contextlib
import doctest
import importlib.util
import json
import re
import runpy
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
import yaml
from conftest import GOLDEN, REPOSITORY
from flax import nnx

import softprompt
from softprompt import Base, Experiment, SoftPrompt, load_base, load_experiment, make_task
from softprompt.backbones import loading
from softprompt.cli.main import _parse
from softprompt.experiment.reading import ExperimentFile
from softprompt.sweep.space import Space

_DOCS = sorted((REPOSITORY / "docs").rglob("*.md"))
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/RESULTS.md",
    *(path.relative_to(REPOSITORY).as_posix() for path in _DOCS),
]

# Pages whose Python or YAML blocks do not run, and why.
FRAGMENTS = {
    "docs/deploy.md": "make llama-cpp-test and make vllm-test run the engines",
    "docs/adding-a-method.md": "tests/test_methods.py runs its code",
}
# Packages that softprompt does not need. Blocks that import one run where it is installed.
TRACKERS = ("wandb", "mlflow")

_FENCE = re.compile(r"^ *```([\w-]*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_SHELL = ("", "bash", "console", "sh", "shell")


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    code: str


def blocks_of(page: str) -> list[Block]:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2])
        for match in _FENCE.finditer(text)
    ]


def pages_with(*languages: str) -> list[str]:
    return [p for p in PAGES if any(b.language in languages for b in blocks_of(p))]


_EXPERIMENT = """\
base: smollm2-135m-instruct
prompt: {length: 10}
training: {steps: 2, batch_size: 2}
evaluation: {every: 2, samples: 0, batch_size: 2}
"""
_LABELS = """\
data: {train: data.jsonl, validation: data.jsonl, test: data.jsonl}
template: {input: "Review: {text}\\nSentiment:"}
verbalizer: {positive: " positive", negative: " negative"}
"""
_TEXTS = """\
data: {train: data.jsonl, validation: data.jsonl}
template: {input: "{text}", target: " {label}"}
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the experiments and runs that the pages mention, on the tiny model."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "experiments").mkdir()
    labels = ["positive", "negative"] * 2
    lines = [json.dumps({"text": f"Film {i}.", "label": label}) for i, label in enumerate(labels)]
    (folder / "experiments" / "data.jsonl").write_text("\n".join(lines))
    base = load_base(str(GOLDEN / "llama-grouped"))
    for name, task in (("sentiment", _LABELS), ("summarize", _TEXTS)):
        path = folder / "experiments" / f"{name}.yaml"
        path.write_text(_EXPERIMENT + task)
        save_untrained(load_experiment(path), base, folder / "runs" / name)
    shutil.copytree(folder / "runs" / "sentiment", folder / "runs" / "tickets")
    return folder


def save_untrained(experiment: Experiment, base: Base, run: Path) -> None:
    length = experiment.prompt.length
    task = make_task(base, experiment.template, experiment.verbalizer, virtual_tokens=length)
    start = SoftPrompt.from_vocabulary(base, length, jax.random.key(0))
    SoftPrompt(start.vectors[...], task.opening).save(run / "prompt", base, task)
    (run / "config.yaml").touch()  # this file marks a run folder


def use_tiny_model(patch: pytest.MonkeyPatch) -> None:
    for name in loading.SHORT_NAMES:
        patch.setitem(loading.SHORT_NAMES, name, str(GOLDEN / "llama-grouped"))


@pytest.mark.parametrize("page", [p for p in pages_with("python") if p not in FRAGMENTS])
def test_python_blocks_run(page, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    use_tiny_model(monkeypatch)
    namespace = {"__name__": "__main__"}
    for block in blocks_of(page):
        needed = [name for name in TRACKERS if f"import {name}" in block.code]
        if block.language == "python" and all(map(importlib.util.find_spec, needed)):
            code = "\n" * block.line + block.code  # so that tracebacks show the page's lines
            exec(compile(code, str(REPOSITORY / page), "exec"), namespace)


class OutputChecker(doctest.OutputChecker):
    """Compares outputs, but ignores numbers and generated texts, which depend on the model."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        if not want or want.startswith("'"):
            return True
        want, got = (re.sub(r"\d+", "0", text) for text in (want, got))
        return super().check_output(want, got, optionflags)


@pytest.mark.parametrize("name", [name for name in softprompt.__all__ if name != "__version__"])
def test_examples_of_docstrings_run(name, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    use_tiny_model(monkeypatch)
    public = {name: getattr(softprompt, name) for name in softprompt.__all__}
    modules = {"jax": jax, "jnp": jnp, "nnx": nnx, "optax": optax}
    found = doctest.DocTestFinder().find(public[name], name, globs=public | modules)
    with_examples = [test for test in found if test.examples]
    assert name in [test.name for test in with_examples], f"{name} has no Examples:"
    for test in with_examples:
        assert "Examples:\n" in test.docstring, f"{test.name}: the site renders only Examples:"
        failures: list[str] = []
        doctest.DocTestRunner(OutputChecker()).run(test, out=failures.append)
        assert not failures, "".join(failures)


@pytest.mark.parametrize("page", pages_with(*_SHELL))
def test_shell_commands_are_valid(page, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    for block in blocks_of(page):
        if block.language not in _SHELL:
            continue
        for line in block.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line.split("    (")[0], comments=True)
            words = words[words.index("|") + 1 :] if "|" in words else words
            if words and Path(words[0]).name == "softprompt":
                check_command(words[1:])
            elif words and words[0] == "make":
                run = subprocess.run(["make", "-n", *words[1:]], capture_output=True, text=True)
                assert run.returncode == 0, f"{page}: {line}: {run.stderr}"


def test_python_commands_run_files_that_exist():
    for page in PAGES:
        text = (REPOSITORY / page).read_text(encoding="utf-8")
        for path in re.findall(r"\bpython ([\w./-]+\.py)\b", text):
            assert (REPOSITORY / path).is_file(), f"{page}: python {path}"


def test_pages_of_fragments_have_blocks():
    assert FRAGMENTS.keys() <= set(pages_with("python", "yaml"))


def check_command(words: list[str]) -> None:
    with contextlib.suppress(SystemExit):  # of --help and --version
        options = _parse(words)
        path = getattr(options, "experiment", None)
        if path is not None and path.parts[0] == "experiments":
            file = ExperimentFile(path, getattr(options, "words", []))
            if file.sweep is None:
                file.experiment()


@pytest.mark.parametrize("page", [p for p in pages_with("yaml") if p not in FRAGMENTS])
def test_yaml_blocks_are_valid_experiments(page, tmp_path):
    for path in (REPOSITORY / "experiments").glob("*.yaml"):
        shutil.copy(path, tmp_path)
    for block in blocks_of(page):
        if block.language == "yaml":
            for part in alternatives(block.code):
                tree = yaml.safe_load(part)
                path = tmp_path / "block.yaml"
                parent = "sentiment-length.yaml" if "sweep" in tree else "sentiment.yaml"
                whole = "extends" in tree or "base" in tree
                path.write_text(part if whole else f"extends: {parent}\n{part}")
                # A fragment of a sweep needs an experiment that is long enough for its rungs.
                longer = ["training.steps=160", "evaluation.every=20"]
                file = ExperimentFile(path, longer if "sweep" in tree and not whole else [])
                if file.sweep is None:
                    file.experiment()
                else:
                    assert Space(file, tmp_path / "sweep").trials()


def alternatives(code: str) -> list[str]:
    """Split a block that gives one key several times into its alternatives."""
    first = code.split(":")[0]
    if len(re.findall(rf"^{first}:", code, re.MULTILINE)) == 1:
        return [code]
    return [part for part in re.split(rf"^(?={first}:)", code, flags=re.MULTILINE) if part]


@pytest.mark.parametrize("page", pages_with("json"))
def test_json_blocks_have_an_object_per_line(page):
    for block in blocks_of(page):
        if block.language == "json":
            for line in block.code.splitlines():
                assert isinstance(json.loads(line), dict)


def test_the_configuration_reference_is_up_to_date():
    generate = runpy.run_path(str(REPOSITORY / "docs" / "generate_configuration.py"))
    page = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == generate["page"](), "run: python docs/generate_configuration.py"


def test_the_api_reference_describes_every_public_name():
    page = (REPOSITORY / "docs" / "api.md").read_text(encoding="utf-8")
    described = set(re.findall(r"^::: softprompt\.(\w+)$", page, re.MULTILINE))
    assert described | {"__version__", "train_step"} == set(softprompt.__all__)


def test_every_setting_is_described():
    page = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 60
    assert [row[0] for row in rows if not row[3].strip(" |")] == []


def test_the_readme_has_at_most_900_words():
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").split()) <= 900


def test_links_between_pages_lead_to_files():
    for page in PAGES:
        text = (REPOSITORY / page).read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", _FENCE.sub("", text)):
            assert (REPOSITORY / page).parent.joinpath(link).exists(), f"{page}: {link}"


def test_workflows_and_issue_forms_are_yaml():
    for path in (REPOSITORY / ".github").rglob("*.yml"):
        assert yaml.safe_load(path.read_text(encoding="utf-8"))
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
