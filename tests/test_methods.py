"""Every method in a complete run, and its results compared with a plain forward pass."""

import json
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY, golden_backbone, write_experiment
from plain_scores import VECTORS, VERBALIZER, D, P, ids, log_probability, scores

from softprompt import (
    Base,
    SoftPrompt,
    UserError,
    load_experiment,
    load_prompt,
    train,
)
from softprompt.data.datasets import make_examples
from softprompt.data.records import read_records
from softprompt.data.task import make_task
from softprompt.evaluation.evaluate import evaluate
from softprompt.experiment.methods import METHODS, method_class
from softprompt.experiment.schema import ComputeSettings, TemplateSettings
from softprompt.methods.dept import DecomposedPrompt
from softprompt.methods.lora import LoRA
from softprompt.methods.method import Method
from softprompt.methods.multitask import MultiTask
from softprompt.methods.prefix_tuning import PrefixTuning, ReparametrizedPrefix
from softprompt.methods.saved import save_prompt
from softprompt.methods.soft_prompt import Reparametrized

CASES = {  # overrides, and the number of trained parameters if it has a simple formula
    "prompt": ([], P * D),
    "mlp": (
        ["prompt.reparametrization=mlp", "prompt.size=5", "optimizer.learning_rate=3e-3"],
        None,
    ),
    "lstm": (["prompt.reparametrization=lstm", "prompt.size=5"], None),
    "residual": (["prompt.reparametrization=residual", "prompt.size=5"], None),
    "low_rank": (["prompt.reparametrization=low_rank", "prompt.size=2"], 2 * (P + D)),
    "dept": (["method=dept", "dept.rank=2", "dept.positions=7"], P * D + 2 * (7 + D)),
    "multitask": (
        [
            "prompt.reparametrization=multitask",
            "prompt.task_field=label",
            "prompt.tasks=[low,high]",
        ],
        P * D + 2 * (P + D),
    ),
    "prefix": (["method=prefix", "prefix.length=4"], 2 * 3 * 4 * 2 * 8),
    "prefix-network": (["method=prefix", "prefix.length=4", "prefix.size=6"], None),
    "lora": (["method=lora", "lora.rank=2", "lora.dropout=0.1"], None),
    "lora-int8": (["method=lora", "lora.targets=['*']", "compute.quantize=int8"], None),
    "full": (["method=full", "optimizer.learning_rate=3e-3"], None),
    "after-text": (["template.input='Letters: {prompt}{text} is'"], P * D),
    "in-place": (["template.input='{text}{prompt} is'"], P * D),
    "shots": (["shots=2", "template.max_tokens=40"], P * D),
    "prefix-shots": (["method=prefix", "prefix.length=4", "shots=2"], None),
}


@pytest.mark.parametrize("name", CASES)
def test_a_method_learns_and_scores_the_same_after_loading(name, tmp_path):
    overrides, count = CASES[name]
    if "optimizer.learning_rate" not in str(overrides):
        overrides = [*overrides, "optimizer.learning_rate=0.03"]
    path = write_experiment(tmp_path, shortest=5, longest=5)
    experiment = load_experiment(path, ["training.steps=16", *overrides])
    summary = train(experiment, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [r["loss"] for r in map(json.loads, lines) if r["split"] == "validation"]
    assert losses[-1] < losses[0]
    assert count is None or summary["trainable_parameters"] == count
    prompt = load_prompt(tmp_path / "run")
    examples = make_examples(prompt.task, read_records(experiment.data.test), "test")
    model = prompt.backbone, prompt.prefix, prompt.task
    assert evaluate(*model, examples, experiment, "test").values() == summary["test"]


@pytest.mark.parametrize("name", METHODS)
def test_the_name_of_every_method_matches_the_table(name):
    method = method_class(name)
    assert issubclass(method, Method)
    assert method.name == name
    assert method.label


def test_an_unknown_method_is_rejected(experiment_file):
    *others, last = map(repr, METHODS)
    names = f"{', '.join(others)} or {last}"
    with pytest.raises(UserError, match=rf": method: Input should be {names}, not 'best'"):
        load_experiment(experiment_file, ["method=best"])


def test_each_task_has_its_own_prompt(tiny):
    source = MultiTask(VECTORS, 2)
    random = np.random.default_rng(0)
    columns, rows = random.normal(size=(2, P)), random.normal(size=(2, D))
    source.columns.set_value(jnp.asarray(columns, jnp.float32))
    source.rows.set_value(jnp.asarray(rows, jnp.float32))
    task = make_task(
        tiny,
        TemplateSettings(input="{text}:"),
        VERBALIZER,
        virtual_tokens=P,
        tasks=["film", "book"],
    )
    method = Reparametrized(source, task.opening)
    for number, name in enumerate(task.tasks):
        found = scores(tiny, method, task, {"text": "hello", "task": name})
        vectors = np.asarray(VECTORS) * np.outer(columns[number], rows[number])
        expected = [
            log_probability(tiny, jnp.asarray(vectors), "hello:", t) for t in VERBALIZER.values()
        ]
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    with pytest.raises(UserError, match=r"task 'play' is not one of prompt\.tasks \(film, book\)"):
        scores(tiny, method, task, {"text": "hello", "task": "play"})


def test_offsets_are_added_by_position(tiny):
    random = np.random.default_rng(0)
    down, up = (jnp.asarray(random.normal(size=s), jnp.float32) for s in ((4, 2), (2, D)))
    task = make_task(tiny, TemplateSettings(input="{text}"), VERBALIZER, virtual_tokens=P)
    method = DecomposedPrompt(VECTORS, down, up, task.opening)
    found = scores(tiny, method, task, {"text": "hello"})  # 5 tokens, 4 offsets
    read = tiny.backbone.embedding(jnp.array(ids(tiny, "hello")))
    read = read.at[:4].add(down @ up)
    expected = [log_probability(tiny, VECTORS, read, target) for target in VERBALIZER.values()]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_offsets_have_their_own_learning_rate(experiment_file, tmp_path):
    experiment = load_experiment(
        experiment_file, ["method=dept", "dept.learning_rate=0.01", "optimizer.learning_rate=1e-12"]
    )
    train(experiment, tmp_path / "run")
    prompt = load_prompt(tmp_path / "run")
    first = DecomposedPrompt.build(experiment, prompt.base, prompt.task.opening)
    np.testing.assert_allclose(prompt.method.vectors[...], first.vectors[...], atol=1e-6)
    assert float(jnp.abs(prompt.method.down[...] - first.down[...]).max()) > 1e-3


def test_offsets_apply_to_generated_tokens(tiny):
    """Decoding with a KV cache equals one forward pass over all tokens."""
    down, up = jnp.ones((9, 1)), 0.3 * jax.random.normal(jax.random.key(0), (1, D))
    backbone = DecomposedPrompt(VECTORS, down, up, ()).adapt(tiny.backbone)
    tokens = jnp.array([ids(tiny, "hello, you")])

    @jax.jit
    def in_one_pass(backbone):
        return backbone(backbone.embedding.with_offsets(tokens))

    @jax.jit
    def start(backbone):
        return backbone.start(tokens[:, :6], jnp.array([6]), None, 4)

    @jax.jit
    def decode(backbone, tokens, cache):
        return backbone.decode(tokens, cache, None)

    expected, (hidden, cache) = in_one_pass(backbone), start(backbone)
    for position in range(6, 10):
        np.testing.assert_allclose(hidden, expected[:, position - 1], atol=1e-4)
        hidden, cache = decode(backbone, tokens[:, position], cache)


def test_prefix_tuning_that_starts_from_a_text_equals_the_text(tiny, experiment_file):
    overrides = ["method=prefix", "prefix.init=text", "prefix.init_text=Say", "prefix.length=3"]
    method = PrefixTuning.build(load_experiment(experiment_file, overrides), tiny, [])
    task = make_task(tiny, TemplateSettings(input="{text}:"), VERBALIZER, prefix_length=3)
    found = scores(tiny, method, task, {"text": "hello"})
    expected = [log_probability(tiny, "Say", "hello:", target) for target in VERBALIZER.values()]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_reparametrized_prefix_starts_from_the_prefix_and_can_be_folded(tiny):
    keys, values = jax.random.normal(jax.random.key(0), (2, 3, 4, 2, 8))
    method = ReparametrizedPrefix(keys, values, 5, jax.random.key(1))
    np.testing.assert_array_equal(method.folded().keys[...], keys)
    random = np.random.default_rng(0)
    up = random.normal(size=method.up.shape).astype(np.float32)
    method.up.set_value(jnp.asarray(up))
    inner = np.tanh(np.asarray(method.inputs[...]) @ np.asarray(method.down[...]))
    change = (inner @ up).reshape(4, 2, 3, 2, 8)  # one row per virtual token
    folded = method.folded()
    for got, first, side in ((folded.keys, keys, 0), (folded.values, values, 1)):
        expected = np.asarray(first) + change[:, side].transpose(1, 0, 2, 3)
        np.testing.assert_allclose(got[...], expected, atol=1e-5)
    assert isinstance(folded, PrefixTuning)


@pytest.mark.parametrize("name", ["mlp", "lstm", "residual", "low_rank", "multitask"])
def test_folding_does_not_change_the_logits(tiny, experiment_file, name):
    tasks = ["prompt.tasks=[a, b]"] if name == "multitask" else ["prompt.size=3"]
    overrides = [f"prompt.reparametrization={name}", *tasks]
    method = SoftPrompt.build(load_experiment(experiment_file, overrides), tiny, [~0, ~1, ~2])
    tokens = jnp.array([ids(tiny, "hello")])

    @jax.jit
    def logits(method):
        backbone, prefix = method.apply(tiny.backbone)
        return backbone.logits(backbone(backbone.embedding(tokens), prefix=prefix))

    np.testing.assert_allclose(logits(method.folded()), logits(method), atol=1e-5)


def test_training_starts_from_the_mean_of_trained_prompts(experiment_file, tiny, tmp_path):
    prompts = [SoftPrompt.from_vocabulary(tiny, 3, jax.random.key(seed)) for seed in (0, 1)]
    folders = [tmp_path / f"prompt-{number}" for number in (0, 1)]
    for prompt, folder in zip(prompts, folders, strict=True):
        prompt.save(folder, tiny)
    listed = f"prompt.init_prompts=[{folders[0]}, {folders[1]}]"
    overrides = ["prompt.init=prompts", listed, "optimizer.learning_rate=1e-12"]
    train(load_experiment(experiment_file, overrides), tmp_path / "mean")
    mean = load_prompt(tmp_path / "mean").method.vectors[...]
    first, second = (prompt.vectors[...] for prompt in prompts)
    np.testing.assert_allclose(mean, (first + second) / 2, atol=1e-6)
    with pytest.raises(UserError, match="a prompt has 3 virtual tokens, but length is 4"):
        train(load_experiment(experiment_file, [*overrides, "prompt.length=4"]), tmp_path / "x")
    with pytest.raises(UserError, match="init: prompts and init_prompts must be set together"):
        load_experiment(experiment_file, ["prompt.init=prompts"])


def test_initial_prompts_must_be_soft_prompts(experiment_file, tiny, tmp_path):
    keys, values = jnp.zeros((2, 3, 3, 2, 8))
    save_prompt(tmp_path / "prefix", PrefixTuning(keys, values), tiny)
    overrides = ["prompt.init=prompts", f"prompt.init_prompts=[{tmp_path / 'prefix'}]"]
    with pytest.raises(UserError, match="prefix is not a soft prompt"):
        train(load_experiment(experiment_file, overrides), tmp_path / "run")


def test_the_base_model_alone_scores_with_and_without_demonstrations(experiment_file, tmp_path):
    for shots in (0, 2):
        experiment = load_experiment(
            experiment_file, ["method=none", f"shots={shots}", "template.max_tokens=40"]
        )
        summary = train(experiment, tmp_path / f"shots-{shots}")
        assert (summary["trainable_parameters"], summary["steps"]) == (0, 0)
        prompt = load_prompt(tmp_path / f"shots-{shots}")
        assert len(prompt.task.demonstrations) == shots
        shown = "".join(f"{text}{target}\n\n" for text, target in prompt.task.demonstrations)
        (prediction,) = prompt.classify(["aaaa"])
        low, high = (
            log_probability(prompt.base, *([shown] if shown else []), "aaaa is", target)
            for target in (" ab", " cd")
        )
        expected = 1 / (1 + np.exp(high - low))
        np.testing.assert_allclose(prediction.probabilities["low"], expected, rtol=1e-3)


def test_a_prefix_reduces_max_tokens_only_if_it_shares_the_context_window(tiny):
    for variant, taken in (("t5-gated", 0), ("llama-biased", 9)):
        base = Base(variant, "", {}, golden_backbone(variant), tiny.tokenizer, ComputeSettings())
        with_prefix, without = (
            make_task(base, TemplateSettings(input="{text}"), None, prefix_length=before)
            for before in (9, 0)
        )
        assert without.max_tokens - with_prefix.max_tokens == taken


def test_dept_with_a_reparametrization_is_rejected(experiment_file):
    with pytest.raises(UserError, match=r"dept does not support prompt\.reparametrization"):
        load_experiment(experiment_file, ["method=dept", "prompt.reparametrization=mlp"])


def test_methods_without_virtual_tokens_ignore_initial_prompts(experiment_file, tmp_path):
    overrides = ["prompt.init=prompts", "prompt.init_prompts=[nowhere]", "method=none"]
    assert train(load_experiment(experiment_file, overrides), tmp_path / "run")["steps"] == 0


def test_labels_without_tokens_are_rejected_as_initial_vectors(experiment_file, tmp_path):
    overrides = [
        "prompt.init=labels",
        "template.target='{label}.'",
        "verbalizer={low: '', high: h}",
    ]
    with pytest.raises(UserError, match="init: the text '' has no tokens"):
        train(load_experiment(experiment_file, overrides), tmp_path / "run")


@pytest.mark.parametrize("setting", ["int8=true", "quantize=int8", "quantize=int4"])
def test_full_fine_tuning_of_quantized_matrices_is_rejected(experiment_file, setting):
    with pytest.raises(UserError, match=r"method: full cannot train int[48] matrices; lora can"):
        load_experiment(experiment_file, ["method=full", f"compute.{setting}"])


def test_a_method_has_a_default_learning_rate(experiment_file):
    given = load_experiment(experiment_file, ["method=lora"])
    assert given.optimizer.learning_rate == 0.1
    default = load_experiment(experiment_file, ["method=lora", "optimizer.learning_rate=null"])
    assert default.optimizer.learning_rate == LoRA.default_learning_rate == 3e-3


@pytest.mark.parametrize("name", METHODS)
def test_a_method_rejects_exports_that_it_does_not_support(name, tiny, experiment_file):
    method = method_class(name).build(load_experiment(experiment_file), tiny, [])
    backbone, prefix = method.apply(tiny.backbone)
    exports = {
        "peft": (lambda: method.peft_adapter(tiny, prefix), {"prompt", "prefix", "lora"}),
        "peft-prefix": (lambda: method.peft_prefix(tiny, prefix), {"prompt", "prefix"}),
        "merged": (
            lambda: method.merge_into(tiny.backbone, backbone),
            {"prompt", "lora", "full"},
        ),
    }
    for export, supported in exports.values():
        if name not in supported:
            with pytest.raises(UserError, match=f"method {name} "):
                export()


def test_the_documented_example_of_a_new_method_works(monkeypatch, experiment_file, tmp_path):
    """Follow docs/adding-a-method.md: add the file and the line, then run its tests."""
    text = (REPOSITORY / "docs" / "adding-a-method.md").read_text()
    source, tests = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    module = types.ModuleType("softprompt.methods.bitfit")
    exec(source, vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(METHODS, "bitfit", "softprompt.methods.bitfit:BitFit")
    documented: dict = {}
    exec(tests, documented)
    documented["test_bitfit_trains_the_biases_and_scores_the_same_after_loading"](tmp_path)
    documented["test_bitfit_needs_biases"](experiment_file, tmp_path / "rejected")
