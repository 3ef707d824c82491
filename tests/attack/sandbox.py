"""Good input that the attack damages, and the folder in which each damaged copy is tried."""

import contextlib
import datetime
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import pyarrow
from pyarrow import parquet

from softprompt import load_base, load_experiment, load_prompt, train
from softprompt.backbones.families import FAMILIES
from softprompt.backbones.formats.storing import stored_tensors
from softprompt.cli.main import main

GOLDEN = Path(__file__).parent.parent / "golden"
_LETTERS = """\
base: base
data: {train: train.jsonl, validation: validation.jsonl, test: test.jsonl}
template: {input: "{text} is"}
verbalizer: {low: " ab", high: " cd"}
prompt: {length: 3}
optimizer: {learning_rate: 0.1}
training: {steps: 2, batch_size: 2}
evaluation: {every: 2, batch_size: 2}
"""
_TEXTS = [("aaaaa", "low"), ("zzzzz", "high"), ("bbbbb", "low"), ("yyyyy", "high")]


def make_good_input(folder: Path) -> None:
    """Write a base model in two formats, data, experiments, runs, an adapter and an array.

    Args:
      folder: an empty folder.
    """
    base = folder / "base"
    base.mkdir()
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "llama-grouped" / file, base)
    for split in ("train", "validation", "test"):
        lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in _TEXTS]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    _write_parquet(folder / "train.parquet")
    (folder / "texts.csv").write_text("text,label\naaaaa,low\nzzzzz,high\n")
    (folder / "texts.txt").write_text("aaaaa\nzzzzz\n")
    answers = [json.dumps({"prediction": t, "reference": r}) + "\n" for t, r in _TEXTS]
    (folder / "predictions.jsonl").write_text("".join(answers))
    (folder / "letters.yaml").write_text(_LETTERS)
    (folder / "sweep.yaml").write_text(f"{_LETTERS}sweep:\n  prompt.length: [1, 2]\n  seed: [0]\n")
    with _working_folder(folder):
        train(load_experiment("letters.yaml"), "runs/labels")
        train(load_experiment("letters.yaml", ["method=lora"]), "runs/lora")
        free = ["verbalizer=null", "template.target={label}", "evaluation.metric=loss"]
        train(load_experiment("letters.yaml", [*free, "method=prefix"]), "runs/text")
        prompt = load_prompt("runs/labels")
        np.save("array.npy", np.asarray(prompt.backbone.embedding.virtual[...]))
        for run in ("labels", "lora", "text"):
            assert main(["export", f"runs/{run}", f"adapters/{run}"]) == 0
        _write_gguf(folder / "base.gguf")


def _write_parquet(path: Path) -> None:
    """Write the training data as a Parquet file of two row groups, with columns of many types."""
    rows = [
        {"text": text, "label": label, "weight": 0.5, "day": datetime.date(2024, 1, 1), "tags": [1]}
        for text, label in _TEXTS
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)


def _write_gguf(path: Path) -> None:
    """Write the base model as a GGUF file with a tokenizer of bytes."""
    base = load_base("base")
    arch = base.backbone.arch
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(len(arch.layers))
    writer.add_context_length(arch.context_length)
    writer.add_embedding_length(arch.hidden_size)
    writer.add_feed_forward_length(arch.feed_forward_size)
    writer.add_head_count(arch.num_heads)
    writer.add_head_count_kv(arch.num_kv_heads)
    writer.add_key_length(arch.head_size)
    writer.add_layer_norm_rms_eps(arch.norm_epsilon)
    writer.add_rope_dimension_count(arch.head_size)
    writer.add_rope_freq_base(10_000.0)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3] + [6] * 256)  # unknown, control, byte
    writer.add_eos_token_id(2)
    for name, tensor in stored_tensors(base.backbone, FAMILIES["llama"].gguf_names):
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Sandbox:
    """A folder with a fresh copy of the good input for every case.

    Attributes:
      folder: the working folder of the commands. They may write to `out`, and nowhere else.
    """

    def __init__(self, good: Path, place: Path):
        self._good, self._place = good, place
        self.folder = place / "work"

    def prepare(self, files: Mapping[str, bytes]) -> None:
        """Copy the good input, and write damaged files over it."""
        shutil.rmtree(self._place, ignore_errors=True)
        shutil.copytree(self._good, self.folder)
        for name, content in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        for prompt in self.folder.glob("runs/*/prompt"):
            _write_sums(prompt)
        (self.folder / "out").mkdir()
        self._before = self._content()

    def changes(self, arguments: Sequence[str]) -> list[str]:
        """Return the files that changed since `prepare` although nobody asked for it.

        A command may write to `out`, and create files in any folder that its arguments name.

        Args:
          arguments: the words of the command line.
        """
        now = self._content()
        named = {os.path.normpath(self.folder / word) for word in arguments if "\0" not in word}

        def is_asked_for(name: str) -> bool:
            path = self._place / name
            return name not in self._before and any(str(p) in named for p in (path, *path.parents))

        return [
            name
            for name in sorted(self._before.keys() | now.keys())
            if self._before.get(name) != now.get(name) and not is_asked_for(name)
        ]

    def _content(self) -> dict[str, str]:
        out = self.folder / "out"
        return {
            str(path.relative_to(self._place)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in self._place.rglob("*")
            if path.is_file() and out not in path.parents
        }


def _write_sums(folder: Path) -> None:
    """Write checksums that fit the damaged files, as an attacker would."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "SHA256SUMS")
    lines = [
        f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(folder)}\n" for p in files
    ]
    (folder / "SHA256SUMS").write_text("".join(lines))


@contextlib.contextmanager
def _working_folder(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
