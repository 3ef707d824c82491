"""Export and import on the command line: adapters, merged models and model cards."""

import ast
import json

import jax
import numpy as np
import pytest
import yaml
from conftest import GOLDEN, greedy, write_experiment
from safetensors.numpy import load_file

from softprompt import UserError, load_base, load_experiment, load_prompt, train
from softprompt.cli.main import main
from softprompt.interop import export as exporting
from softprompt.interop.embeds import EMBEDS_FILE

LONG = ["training.steps=12", "optimizer.learning_rate=0.3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    write_experiment(folder, shortest=5, longest=5)
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """Return the run of a method, which is trained on first use."""

    def run(name, *overrides):
        path = folder / name
        if not path.exists():
            train(load_experiment(folder / "letters.yaml", [*LONG, *overrides]), path)
        return path

    return run


def written(base, tokens, prefix=None, backbone=None):
    """Return the token ids that greedy decoding writes after `tokens`."""
    padded = np.zeros((1, 96), np.int32)  # one length, so that all texts share a program
    padded[0, : len(tokens)] = tokens
    lengths, end = np.array([len(tokens)]), base.tokenizer.eos_token_id
    found = greedy(backbone or base.backbone, prefix, padded, lengths, end, count=12)
    return np.asarray(found)[0].tolist()


MERGED = {
    "prompt": [],
    "after-text": ["template.input='Say {prompt}{text} is'"],
    "in-place": ["template.input='{text}{prompt} is'"],
    "shots": ["shots=2", "template.max_tokens=40"],
    "lora": ["method=lora"],
    "full": ["method=full", "optimizer.learning_rate=3e-3"],
}


@pytest.mark.parametrize("name", MERGED)
def test_a_merged_model_generates_the_same_text_as_the_prompt(run, tmp_path, name):
    prompt = load_prompt(run(name, *MERGED[name]))
    exporting.export(prompt, tmp_path / "merged", "merged")
    merged = load_base(str(tmp_path / "merged"))
    card = (tmp_path / "merged" / "README.md").read_text()
    form = card.split("text = ")[1].split(".format_map(")[0]
    form = ast.literal_eval(form)
    for text in ("aaaa", "zz", "hello you"):
        tokens = prompt.task.example(prompt.record(text, ""), with_answer=False).input
        expected = written(prompt.base, tokens, prompt.prefix, prompt.backbone)
        whole = merged.tokenizer(form.format(text=text), add_special_tokens=False).input_ids
        assert written(merged, whole) == expected
        assert len(set(expected)) > 1
        message = [{"role": "user", "content": text}]
        rendered = merged.tokenizer.apply_chat_template(message, tokenize=False)
        assert rendered == form.format(text=text)


def test_new_tokens_of_a_merged_model_are_never_the_most_probable(run, tmp_path):
    prompt = load_prompt(run("prompt"))
    exporting.export(prompt, tmp_path / "merged", "merged")
    merged = load_base(str(tmp_path / "merged"))
    size = prompt.base.backbone.arch.vocab_size
    assert merged.backbone.arch.vocab_size == size + 3
    hidden = jax.random.normal(jax.random.key(0), (500, 32))
    logits = merged.backbone.logits(hidden)
    assert int(logits.argmax(axis=-1).max()) < size
    np.testing.assert_allclose(logits[:, :size], prompt.base.backbone.logits(hidden), atol=1e-5)
    generation = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == [size, size + 1, size + 2]


@pytest.mark.parametrize("name", ["prompt", "after-text", "shots"])
def test_exported_embeds_are_what_every_input_begins_with(run, tmp_path, name):
    prompt = load_prompt(run(name, *MERGED[name]))
    exporting.export(prompt, tmp_path / "embeds", "embeds")
    (embeds,) = load_file(tmp_path / "embeds" / EMBEDS_FILE).values()
    adapted = prompt.method.adapt(prompt.base.backbone)
    expected = adapted.embedding(np.array(prompt.task.opening))
    np.testing.assert_array_equal(embeds, expected)
    form = (tmp_path / "embeds" / "README.md").read_text().split("text = ")[1]
    text = eval(form.split("\n")[0])
    record = prompt.record("An example of text.", "")
    ids = prompt.task.example(record, with_answer=False).input
    assert prompt.base.tokenizer(text, add_special_tokens=False).input_ids == ids


@pytest.mark.parametrize(
    ("name", "overrides", "format", "message"),
    [
        ("full", MERGED["full"], "embeds", "method full learns no vectors; use --format merged"),
        ("in-place", MERGED["in-place"], "embeds", "are inside the inputs, not before them"),
        ("prompt", [], "gguf", "tokenizer cannot be written to a GGUF file"),
        ("prefix", ["method=prefix", "prefix.length=2"], "merged", "prefix cannot be merged"),
        ("dept", ["method=dept"], "merged", "method dept cannot be merged"),
        ("none", ["method=none"], "merged", "method none cannot be merged"),
        ("none", ["method=none"], "peft", "method none has no equivalent in peft"),
        ("full", MERGED["full"], "peft", "method full has no equivalent in peft"),
        ("in-place", MERGED["in-place"], "peft", "are elsewhere"),
    ],
)
def test_an_unsupported_export_is_rejected_and_writes_nothing(
    run, tmp_path, capsys, name, overrides, format, message
):
    arguments = ["export", str(run(name, *overrides)), str(tmp_path / "out"), "--format", format]
    assert main(arguments) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_type_without_a_gguf_file_is_rejected(run, tmp_path, capsys):
    arguments = ["export", str(run("prompt")), str(tmp_path / "out"), "--dtype", "f32"]
    assert main(arguments) == 1
    assert "--dtype needs --format gguf" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["prompt", "prefix", "lora"])
def test_an_exported_adapter_is_imported_as_the_same_prompt(run, folder, tmp_path, capsys, name):
    overrides = {"prefix": ["method=prefix", "prefix.length=2"], "lora": ["method=lora"]}
    source = run(name, *overrides.get(name, []))
    assert main(["export", str(source), str(tmp_path / "adapter")]) == 0
    arguments = ["import", str(tmp_path / "adapter"), str(tmp_path / "back")]
    assert main([*arguments, "--experiment", str(folder / "letters.yaml")]) == 0
    ours, back = load_prompt(source), load_prompt(tmp_path / "back")
    texts = ["aaaa", "zzz"]
    assert back.classify(texts) == ours.classify(texts)
    card = (tmp_path / "adapter" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "llama-grouped"
    assert head["library_name"] == "peft"
    assert head["metrics"] == ["accuracy"]
    (result,) = head["model-index"][0]["results"]
    accuracy = ours.description["validation"]["accuracy"]
    assert result["metrics"] == [{"type": "accuracy", "value": accuracy}]


def test_an_array_from_the_original_prompt_tuning_code_becomes_a_prompt(folder, tmp_path, capsys):
    vectors = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    np.save(tmp_path / "theirs.npy", vectors)
    base = str(GOLDEN / "llama-grouped")
    arguments = ["import", str(tmp_path / "theirs.npy"), str(tmp_path / "ours"), "--base", base]
    assert main(arguments) == 0
    prompt = load_prompt(tmp_path / "ours")
    np.testing.assert_array_equal(prompt.method.vectors[...], vectors)
    assert prompt.generate(["hello"], max_new_tokens=3)
    assert main([*arguments]) == 1
    assert "the folder is not empty" in capsys.readouterr().err


def test_an_export_does_not_overwrite_a_folder_with_files(run, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert main(["export", str(run("prompt")), str(tmp_path / "mine")]) == 1
    assert "the folder is not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_an_import_without_a_base_model_is_rejected(tmp_path, capsys):
    assert main(["import", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "give the base model with --base" in capsys.readouterr().err


def test_an_export_is_pushed_to_the_hub(run, tmp_path, capsys, monkeypatch):
    asked = []

    class Done:
        commit_url = "https://hub/me/letters/commit/1"

    monkeypatch.setattr(
        exporting.huggingface_hub, "create_repo", lambda name, **_: asked.append(name)
    )

    def upload(repo_id, folder_path, commit_message):
        asked.append((repo_id, sorted(path.name for path in folder_path.iterdir())))
        return Done()

    monkeypatch.setattr(exporting.huggingface_hub, "upload_folder", upload)
    arguments = ["export", str(run("prompt")), str(tmp_path / "out"), "--push", "me/letters"]
    assert main(arguments) == 0
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert asked == ["me/letters", ("me/letters", files)]
    assert "https://hub/me/letters/commit/1" in capsys.readouterr().out

    def fail(*arguments, **settings):
        raise ConnectionError("no way to the hub")

    monkeypatch.setattr(exporting.huggingface_hub, "create_repo", fail)
    with pytest.raises(UserError, match=r"me/letters: cannot be uploaded \(no way to the hub\)"):
        exporting.push(tmp_path / "out", "me/letters")
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")
