"""The cases of the attack: for each kind of input, a command and damaged files for it."""

import dataclasses
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from attack.mutations import (
    EXTREMES,
    FRAGMENTS,
    damaged_bytes,
    damaged_json,
    damaged_safetensors,
    damaged_text,
    damaged_value,
    dump,
)

# Whatever an experiment file says, training stays short.
_SHORT = ("training.steps=1", "evaluation.every=1", "evaluation.examples=2", "evaluation.samples=1")
_TRAIN = ("train", "letters.yaml", *_SHORT, "--run-dir", "out/run")


@dataclasses.dataclass(frozen=True)
class Case:
    """One command on damaged input.

    Attributes:
      kind: the kind of input, a key of `KINDS`.
      arguments: the words of the command line.
      files: the damaged files, by path in the working folder.
    """

    kind: str
    arguments: tuple[str, ...]
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)


def cases(kind: str, good: Path) -> st.SearchStrategy[Case]:
    """Return the strategy for one kind of input.

    Args:
      kind: a key of `KINDS`.
      good: the folder of the good input.
    """
    return KINDS[kind](kind, good)


def _experiment(kind: str, good: Path) -> st.SearchStrategy[Case]:
    text = (good / "letters.yaml").read_text()
    everything = yaml.safe_load(text) | _defaults()
    content = damaged_text(text) | damaged_json(yaml.safe_load(text)) | damaged_json(everything)
    arguments = ("train", "attack.yaml", *_SHORT, "--run-dir", "out/run")
    return content.map(lambda c: Case(kind, arguments, {"attack.yaml": c}))


def _defaults() -> dict[str, Any]:
    """All settings of an experiment with their defaults."""
    from softprompt.experiment.schema import Experiment

    fields = Experiment.model_fields
    made = {
        n: f.get_default(call_default_factory=True)
        for n, f in fields.items()
        if not f.is_required()
    }
    return {n: v.model_dump() if hasattr(v, "model_dump") else v for n, v in made.items()}


def _overrides(kind: str, good: Path) -> st.SearchStrategy[Case]:
    keys = [f"{s}.{k}" for s, v in _defaults().items() if isinstance(v, dict) for k in v]
    keys += [*_defaults(), "base", "data.train", "template.input", "verbalizer", "a.b.c", "", "."]
    key = st.sampled_from(keys) | st.text(max_size=8)
    values = st.sampled_from(EXTREMES).map(dump) | st.sampled_from(FRAGMENTS) | st.text(max_size=20)
    override = st.builds("{}={}".format, key, values.map(lambda v: v[:100_000]))
    short = ("training.batch_size=2", *_SHORT)
    return st.lists(override, min_size=1, max_size=3).map(
        lambda o: Case(kind, ("train", "letters.yaml", *o, *short, "--run-dir", "out/run"))
    )


def _sweep(kind: str, good: Path) -> st.SearchStrategy[Case]:
    tree = yaml.safe_load((good / "sweep.yaml").read_text())
    arguments = ("sweep", "attack.yaml", *_SHORT, "--folder", "out/sweep")
    section = damaged_value(tree["sweep"]).map(lambda s: dump(tree | {"sweep": s}).encode())
    return (section | damaged_text((good / "sweep.yaml").read_text())).map(
        lambda c: Case(kind, arguments, {"attack.yaml": c})
    )


def _data(kind: str, good: Path) -> st.SearchStrategy[Case]:
    @st.composite
    def case(draw: st.DrawFn) -> Case:
        name = draw(st.sampled_from(["train.jsonl", "validation.jsonl", "texts.csv", "texts.txt"]))
        content = (good / name).read_bytes()
        if name.endswith(".jsonl") and draw(st.booleans()):
            first, *rest = content.decode().splitlines()
            damaged = draw(damaged_json(json.loads(first)))
            content = damaged + b"\n" + "\n".join(rest).encode()
        else:
            content = draw(damaged_bytes(content))
        if name.startswith("texts"):
            return Case(kind, ("predict", "runs/labels", "--input", name), {name: content})
        return Case(kind, _TRAIN, {name: content})

    return case()


def _parquet(kind: str, good: Path) -> st.SearchStrategy[Case]:
    content = (good / "train.parquet").read_bytes()
    arguments = ("show", "letters.yaml", "data.train=train.parquet")
    return damaged_bytes(content, header=len(content)).map(
        lambda c: Case(kind, arguments, {"train.parquet": c})
    )


def _config(kind: str, good: Path) -> st.SearchStrategy[Case]:
    config = json.loads((good / "base/config.json").read_text())
    return damaged_json(config).map(lambda c: Case(kind, _TRAIN, {"base/config.json": c}))


def _tokenizer(kind: str, good: Path) -> st.SearchStrategy[Case]:
    tokenizer = json.loads((good / "base/tokenizer.json").read_text())
    steps: list[Any] = [
        {"type": "Sequence", "normalizers": [
            {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaa"}] * 12},
        {"type": "Replace", "pattern": {"Regex": "(a|a)*b"}, "content": "x"},
        {"type": "Replace", "pattern": {"Regex": "("}, "content": "x"},
        {"type": "Replace", "pattern": {"String": ""}, "content": "ab"},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "Prepend", "prepend": "a" * 10_000},
        {"type": "Split", "pattern": {"Regex": "(a*)*$"}, "behavior": "Isolated", "invert": False},
        {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"},
        {"type": "Unigram", "vocab": [], "unk_id": None},
        {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "[UNK]",
         "continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
         "pair": [], "special_tokens": {}},
    ]  # fmt: skip
    parts = ["normalizer", "pre_tokenizer", "post_processor", "decoder", "model", "truncation"]
    replaced = st.builds(
        lambda part, step: dump(tokenizer | {part: step}).encode(),
        st.sampled_from(parts),
        st.sampled_from(steps),
    )
    return (damaged_json(tokenizer) | replaced).map(
        lambda c: Case(kind, _TRAIN, {"base/tokenizer.json": c})
    )


def _tokenizer_config(kind: str, good: Path) -> st.SearchStrategy[Case]:
    config = json.loads((good / "base/tokenizer_config.json").read_text())
    config["chat_template"] = "{{ messages[0]['content'] }}"
    return damaged_json(config).map(
        lambda c: Case(kind, (*_TRAIN, "template.chat=true"), {"base/tokenizer_config.json": c})
    )


_CHAT_PIECES = [
    *("{{ 1 // 0 }}", "{{ 1 / 0 }}", "{% include 'x' %}", "{% import 'os' as os %}", "{{ 'a'() }}"),
    *("{{ 10.0 ** 400 }}", "{{ 10 ** 10 ** 9 }}", "{{ 'a' * 10 ** 10 }}", "{{ messages + 1 }}"),
    *("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{% extends 'x' %}", "{% block a %}"),
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
    "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    *("{{ range(10 ** 9) | list }}", "{{ 'a' | center(10 ** 10) }}", "{{ '%999999999d' % 1 }}"),
    *(
        "{{ raise_exception('no') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ self.__init__.__globals__ }}",
    ),
    *("{{ messages[9].content }}", "{{ x }}", "{{", "{% for %}", "{{ messages | tojson }}", "\0"),
    *("{{ messages[0].content }}", "{{ strftime_now('%Y' * 10000) }}", "{{ 'é' | lower }}"),
    *("{% for m in messages %}{{ m.content }}{% endfor %}", "{{ bos_token * 10 ** 9 }}", "\ud800"),
    "{{ messages[0]['content'] | replace('', 'a' * 10 ** 6) | replace('a', 'b' * 10 ** 6) }}",
]


def _chat(kind: str, good: Path) -> st.SearchStrategy[Case]:
    config = json.loads((good / "base/tokenizer_config.json").read_text())
    template = st.lists(st.sampled_from(_CHAT_PIECES), min_size=1, max_size=3).map("".join)
    return template.map(
        lambda t: Case(
            kind,
            (*_TRAIN, "template.chat=true", "template.system=Be brief."),
            {"base/tokenizer_config.json": dump(config | {"chat_template": t}).encode()},
        )
    )


def _safetensors(kind: str, good: Path) -> st.SearchStrategy[Case]:
    content = damaged_safetensors((good / "base/model.safetensors").read_bytes())
    return content.map(lambda c: Case(kind, _TRAIN, {"base/model.safetensors": c}))


def _gguf(kind: str, good: Path) -> st.SearchStrategy[Case]:
    content = (good / "base.gguf").read_bytes()
    return damaged_bytes(content, header=len(content) // 10).map(
        lambda c: Case(kind, (*_TRAIN, "base=./base.gguf"), {"base.gguf": c})
    )


def _adapter(kind: str, good: Path) -> st.SearchStrategy[Case]:
    @st.composite
    def case(draw: st.DrawFn) -> Case:
        folder = f"adapters/{draw(st.sampled_from(['labels', 'lora', 'text']))}"
        if draw(st.booleans()):
            name = f"{folder}/adapter_config.json"
            content = draw(damaged_json(json.loads((good / name).read_text())))
        else:
            name = f"{folder}/adapter_model.safetensors"
            content = draw(damaged_safetensors((good / name).read_bytes()))
        return Case(kind, ("import", folder, "out/prompt", "--base", "base"), {name: content})

    return case()


def _array(kind: str, good: Path) -> st.SearchStrategy[Case]:
    content = (good / "array.npy").read_bytes()
    arguments = ("import", "array.npy", "out/prompt", "--base", "base")

    def with_header(text: str) -> bytes:
        header = text.encode().ljust(118)[:118]
        return content[:8] + struct.pack("<H", len(header)) + header + content[128:]

    headers = st.builds(
        "{{'descr': {}, 'fortran_order': {}, 'shape': {}}}\n".format,
        st.sampled_from(["'<f4'", "'<f8'", "'|O'", "'<f9'", "[('a', '<f4')]", "'<U9'", "(", "1"]),
        st.sampled_from(["False", "True", "0", "None"]),
        st.sampled_from(
            ["(3, 32)", "(10**12, 32)", "(5120000000,)", "(-1, 32)", "()", "3", "(0, 32)"]
        ),
    )
    return (damaged_bytes(content, header=128) | headers.map(with_header)).map(
        lambda c: Case(kind, arguments, {"array.npy": c})
    )


def _prompt(kind: str, good: Path) -> st.SearchStrategy[Case]:
    @st.composite
    def case(draw: st.DrawFn) -> Case:
        run = f"runs/{draw(st.sampled_from(['labels', 'lora', 'text']))}"
        if draw(st.integers(0, 3)):
            name = f"{run}/prompt/prompt.json"
            content = draw(damaged_json(json.loads((good / name).read_text())))
        else:
            files = sorted(p for p in (good / run / "prompt/arrays").rglob("*") if p.is_file())
            path = draw(st.sampled_from(files))
            name, content = str(path.relative_to(good)), draw(damaged_bytes(path.read_bytes()))
        commands = [
            ("predict", run, "aaaaa"),
            ("generate", run, "aaaaa", "--max-new-tokens", "2"),
            ("inspect", run),
            ("eval", run),
            ("export", run, "out/export"),
            ("report", "runs", "--output", "out/report.html"),
        ]
        return Case(kind, draw(st.sampled_from(commands)), {name: content})

    return case()


def _runs(kind: str, good: Path) -> st.SearchStrategy[Case]:
    @st.composite
    def case(draw: st.DrawFn) -> Case:
        name = draw(
            st.sampled_from(["summary.json", "config.yaml", "metrics.jsonl", "predictions.jsonl"])
        )
        path = f"runs/lora/{name}"
        text = (good / path).read_text()
        if name == "summary.json":
            content = draw(damaged_json(json.loads(text)))
        elif name.endswith(".jsonl"):
            first, _, rest = text.partition("\n")
            content = draw(damaged_json(json.loads(first))) + b"\n" + rest.encode()
        else:
            content = draw(damaged_text(text) | damaged_json(yaml.safe_load(text)))
        commands = [
            ("runs", "runs"),
            ("runs", "runs", "--json"),
            ("report", "runs", "--output", "out/report.html"),
            ("eval", "runs/lora"),
        ]
        return Case(kind, draw(st.sampled_from(commands)), {path: content})

    return case()


def _predictions(kind: str, good: Path) -> st.SearchStrategy[Case]:
    first, _, rest = (good / "predictions.jsonl").read_text().partition("\n")
    metrics = ["rouge,bleu", "chrf,ter", "exact_match,token_f1", "accuracy,macro_f1,confusion", "x"]
    return st.builds(
        lambda line, metric: Case(
            kind,
            ("score", "predictions.jsonl", "--metrics", metric),
            {"predictions.jsonl": line + b"\n" + rest.encode()},
        ),
        damaged_json(json.loads(first)),
        st.sampled_from(metrics),
    )


_WORDS = [
    *("runs/labels", "runs/text", "letters.yaml", "train.jsonl", "predictions.jsonl", "base"),
    *("out", "out/x", "nowhere", "nowhere/x", "/dev/null", "/proc/self/mem", ".", "..", "/"),
    *("", " ", "\0", "aaaaa", "0", "1", "-1", "2", "1e9", "nan", "inf", "9" * 30, "9" * 5000),
    *("0.5", "a,b", ",", "🙂", "\udcff", "x" * 300, "x" * 5000, "~nosuchuser", "key=value"),
    *("name=../x", "seed=1", "accuracy", "rouge", "confusion", "validation", "test", "merged"),
    *("lora", "prompt", "none", "--", "-"),
]
_COMMANDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "train": (("letters.yaml", *_SHORT, "--run-dir", "out/run"), ("--run-dir",)),
    "show": (("letters.yaml", *_SHORT), ("--split", "--number")),
    "study": (
        ("texts.txt", "--base", "base", "--output", "out/questions.jsonl"),
        (
            *("--experiment", "--questions", "--max-new-tokens", "--batch-size", "--seed"),
            *("--base", "--output"),
        ),
    ),
    "eval": (
        ("runs/labels",),
        (
            "--split",
            "--metrics",
            "--output",
            "--batch-size",
            "--normalize",
            "--calibrate",
            "--base",
        ),
    ),
    "predict": (
        ("runs/labels", "aaaaa"),
        ("--input", "--jsonl", "--batch-size", "--normalize", "--calibrate", "--base"),
    ),
    "generate": (
        ("runs/text", "aaaaa", "--max-new-tokens", "2"),
        (
            *("--input", "--jsonl", "--temperature", "--top-k", "--top-p", "--min-p", "--beams"),
            *("--repetition-penalty", "--length-penalty", "--samples", "--seed", "--stop"),
            *("--batch-size", "--max-new-tokens", "--base"),
        ),
    ),
    "score": (("predictions.jsonl",), ("--metrics", "--stem", "--json", "--each", "--against")),
    "inspect": (("runs/labels",), ("--nearest", "--base")),
    "runs": (("runs",), ("--sort", "--reverse", "--where", "--json")),
    "report": (("runs", "--output", "out/report.html"), ("--output",)),
    "export": (("runs/labels", "out/export"), ("--format", "--push", "--base")),
    "import": (("adapters/labels", "out/prompt", "--base", "base"), ("--base",)),
}


def _arguments(kind: str, good: Path) -> st.SearchStrategy[Case]:
    @st.composite
    def case(draw: st.DrawFn) -> Case:
        name = draw(st.sampled_from(sorted(_COMMANDS)))
        plain, options = _COMMANDS[name]
        words = list(plain)
        for _ in range(draw(st.integers(1, 2))):
            word = draw(st.sampled_from(_WORDS))
            change = draw(st.sampled_from(["replace", "option", "option", "option", "add"]))
            if change == "replace":
                words[draw(st.integers(0, len(words) - 1))] = word
            elif change == "add":
                words.insert(draw(st.integers(0, len(words))), word)
            else:
                words += [draw(st.sampled_from(options)), word]
        return Case(kind, (name, *words))

    return case()


KINDS: Mapping[str, Callable[[str, Path], st.SearchStrategy[Case]]] = {
    "experiment": _experiment,
    "overrides": _overrides,
    "sweep": _sweep,
    "data": _data,
    "Parquet": _parquet,
    "config.json": _config,
    "tokenizer.json": _tokenizer,
    "tokenizer_config.json": _tokenizer_config,
    "chat template": _chat,
    "safetensors": _safetensors,
    "GGUF": _gguf,
    "adapter": _adapter,
    "npy": _array,
    "prompt": _prompt,
    "run folder": _runs,
    "predictions": _predictions,
    "arguments": _arguments,
}
