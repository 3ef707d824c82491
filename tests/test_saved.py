"""Saved prompts from outside: whatever `prompt.json` says, one line names the file and the field.

The checksums do not help here: whoever changes `prompt.json` can also change `SHA256SUMS`.
"""

import hashlib
import json
import time

import jax
import jax.numpy as jnp
import pytest

from softprompt import SoftPrompt, UserError, load_prompt, save_prompt
from softprompt.methods.dept import DecomposedPrompt
from softprompt.methods.lora import LoRA
from softprompt.methods.prefix_tuning import PrefixTuning
from softprompt.methods.zero_shot import ZeroShot

QUERY = "layers.attention.query"
LONG = "x" * 100_000


def method_of(name, base):
    layers, size = len(base.backbone.arch.layers), base.backbone.arch.hidden_size
    if name == "prompt":
        return SoftPrompt(jnp.ones((3, size)))
    if name == "dept":
        return DecomposedPrompt(jnp.ones((3, size)), jnp.ones((4, 2)), jnp.ones((2, size)), [~0])
    if name == "prefix":
        keys, values = base.backbone.initial_prefix(jnp.ones((2, size)), jax.random.key(0))
        return PrefixTuning(keys, values)
    if name == "lora":
        return LoRA({QUERY: (jnp.ones((layers, size, 2)), jnp.ones((layers, 2, size)))}, {QUERY: 1})
    return ZeroShot()


@pytest.fixture
def saved(tiny, tmp_path):
    """Save a prompt of a method, and change its `prompt.json` by a function of its content."""

    def saved(name, change):
        folder = tmp_path / "prompt"
        save_prompt(folder, method_of(name, tiny), tiny)
        path = folder / "prompt.json"
        content = json.loads(path.read_text())
        changed = change(content)
        content = content if changed is None else changed
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "SHA256SUMS")
        sums = [
            f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(folder)}\n"
            for p in files
        ]
        (folder / "SHA256SUMS").write_text("".join(sums))
        return folder

    return saved


def error_of(folder, base):
    with pytest.raises(UserError) as raised:
        load_prompt(folder, base)
    message = str(raised.value)
    assert "prompt.json: " in message
    assert "\n" not in message
    assert len(message) < 700
    return message


def test_a_prompt_saved_by_an_earlier_version_is_loaded_in_int8(saved, tiny):
    former = {"dtype": "float32", "int8": True}
    folder = saved("prompt", lambda content: content["base"].update(compute=former))
    base = load_prompt(folder).base
    assert (base.compute.quantize, base.fingerprint) == ("int8", tiny.fingerprint)


@pytest.mark.parametrize("name", ["prompt", "dept", "prefix", "lora", "none"])
def test_other_keys_are_allowed(saved, tiny, name):
    folder = saved(name, lambda content: content | {"later": [1], "embedding_scale": "x"})
    assert load_prompt(folder, tiny).description["method"] == name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{" + LONG.encode(), "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (b"\xff\xfe{}", "not UTF-8 text"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"format": 2, "step": ' + b"9" * 5000 + b"}", "4300 digits"),
        (b'{"format": 2, "step": 1e999}', "too large"),
        (b"{}", "has a format that this version cannot read"),
        (b'{"format": 2}', "method: Field required"),
        (b" " * 2**25, "larger than 4 MiB"),
        (b'{"format": 2}' + b" " * 2**23, "larger than 4 MiB"),
    ],
)
def test_a_damaged_file_is_named(saved, tiny, content, message):
    assert message in error_of(saved("none", lambda _: content), tiny)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magic"}, "method: Input should be 'prompt', "),
        ({"method": {}}, "method: Input should be a valid string, not {}"),
        ({"virtual_tokens": True}, "virtual_tokens: Input should be a valid integer"),
        ({"virtual_tokens": -1}, "virtual_tokens: Input should be greater"),
        ({"virtual_tokens": 10**9}, "virtual_tokens: there are 3 in the arrays, not 1000000000"),
        ({"tasks": ["a", "b"]}, "virtual_tokens: there are 3 in the arrays, not 6"),
        ({"tasks": "ab"}, "tasks: Input should be a valid list, not 'ab'"),
        ({"base": None}, "base: Input should be a valid dictionary"),
        ({"template": {"input": "{"}}, "template.input: not a valid template"),
        ({"template": {"input": "{text}", "chat": 1}}, "template.chat: Input should be a valid b"),
        ({"verbalizer": "x"}, "verbalizer: Input should be a valid dictionary, not 'x'"),
        ({"verbalizer": {"a": 1}}, "verbalizer.a: Input should be a valid string, not 1"),
        ({"verbalizer": {}}, "verbalizer: Dictionary should have at least 1 item"),
        (
            {"verbalizer": {"a": " a"}, "template": {"input": "{a}", "target": "{b}{c}"}},
            "template.target: with a verbalizer it must have one {field}",
        ),
        ({"demonstrations": [["a"]]}, "demonstrations.0: List should have at least 2 items"),
        ({"demonstrations": LONG}, "demonstrations: Input should be a valid list"),
        ({"step": 10**400}, "step: Input should be less than"),
        ({"validation": {"loss": "low"}}, "validation.loss: Input should be a valid number"),
        ({"generation": {"beams": "x"}}, "generation.beams: Input should be a valid integer"),
        ({"versions": {}}, "versions.softprompt: Field required"),
        ({"scoring": []}, "scoring: Input should be a valid dictionary"),
        ({"arrays": {"vectors": 3}}, "arrays.vectors: Input should be a valid list"),
        ({"arrays": {"vectors": [0, 32]}}, "arrays.vectors.0: Input should be greater"),
        ({"arrays": {}}, "arrays: vectors is missing"),
        ({"arrays": {"vectors": [3]}}, "arrays: vectors has shape [3], not ['P', 32]"),
        ({"arrays": {"vectors": [3, 33]}}, "arrays: vectors has shape [3, 33], not ['P', 32]"),
        ({"arrays": {"vectors": [3, 32], LONG: [1]}}, "xxx... is not an array of the method"),
        ({"arrays": {"vectors": [2**30, 32]}}, "values, more than the base model has"),
    ],
)
def test_a_wrong_value_is_named(saved, tiny, changes, message):
    assert message in error_of(saved("prompt", lambda content: content | changes), tiny)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": {}}, "base.name: Input should be a valid string"),
        ({"fingerprint": None}, "base.fingerprint: Input should be a valid string"),
        ({"fingerprint": "A\nB"}, "base.fingerprint: String should match pattern"),
        ({"compute": {"dtype": "float8"}}, "base.compute.dtype: Input should be"),
    ],
)
def test_a_wrong_value_of_the_base_model_is_named(saved, tiny, changes, message):
    folder = saved("none", lambda content: content["base"].update(changes))
    assert message in error_of(folder, tiny)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("lora", {"scales": None}, "scales: must be float32 numbers by path, not None"),
        ("lora", {"scales": {QUERY: True}}, "scales: must be float32 numbers by path"),
        ("lora", {"scales": {QUERY: 10**100}}, "scales: must be float32 numbers by path"),
        ("lora", {"scales": {"layers.x": 1}}, "scales: the base model has no matrix 'layers.x'"),
        ("lora", {"scales": {}}, "is not an array of the method"),
        ("prefix", {"arrays": {"keys": [3, 2, 2, 8]}}, "arrays: values is missing"),
        (
            "prefix",
            {"arrays": {"keys": [3, 2, 2, 8], "values": [3, 3, 2, 8]}},
            "arrays: values has shape [3, 3, 2, 8], not [3, 'P', 2, 8]",
        ),
        (
            "dept",
            {"arrays": {"vectors": [3, 32], "down": [4, 2], "up": [3, 32]}},
            "arrays: up has shape [3, 32], not ['R', 32]",
        ),
        ("none", {"arrays": {"vectors": [1, 1]}}, "'vectors' is not an array of the method"),
    ],
)
def test_arrays_must_be_those_of_the_method(saved, tiny, name, changes, message):
    assert message in error_of(saved(name, lambda content: content | changes), tiny)


def test_a_template_of_very_many_fields_is_checked_in_seconds(saved, tiny):
    """Each field was once compared with all others, and copied what came before it."""
    fields = {"input": "".join(f"{{f{i}}} " for i in range(200_000))}
    began = time.monotonic()
    folder = saved("none", lambda content: content["template"].update(fields))
    assert load_prompt(folder, tiny).task.template.input == fields["input"]
    assert time.monotonic() - began < 20
