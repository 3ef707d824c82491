"""Adapters from peft give the same logits here, and import followed by export is exact."""

import json
import pickle
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    FAMILIES_GOLDEN,
    GOLDEN,
    batch_of,
    batch_with_all_targets,
    example_of,
    golden_backbone,
    rows_of,
)
from safetensors.numpy import load_file, save_file

from softprompt import SoftPrompt, UserError
from softprompt.backbones.loading import Base
from softprompt.experiment.methods import method_class
from softprompt.experiment.schema import ComputeSettings
from softprompt.inference.prompt import TrainedPrompt
from softprompt.interop.peft_export import export_adapter
from softprompt.interop.peft_import import import_adapter, import_array
from softprompt.methods.dept import DecomposedPrompt
from softprompt.methods.lora import LoRA
from softprompt.methods.prefix_tuning import PrefixTuning

ADAPTERS = GOLDEN / "adapters"
PAIRS = sorted(str(p.parent.relative_to(ADAPTERS)) for p in ADAPTERS.glob("*/*/*.safetensors"))


def base_of(variant: str) -> Base:
    backbone = golden_backbone(variant)
    config = json.loads((FAMILIES_GOLDEN / variant / "config.json").read_text())
    return Base(variant, "", config, backbone, None, ComputeSettings())


def imported(base, folder):
    name, arrays, description = import_adapter(folder, base)
    opening = [~i for i in range(len(arrays.get("vectors", ())))]
    return method_class(name).load(arrays, description, opening)


def trained(base, method):
    backbone, about = method.adapt(base.backbone), {"method": type(method).__name__}
    return TrainedPrompt(base, method, backbone, method.make_prefix(backbone), None, about)


@jax.jit
def logits_of(method, backbone, batch):
    backbone, prefix = method.apply(backbone)
    return backbone.logits(backbone.target_states(batch, prefix))


def golden_batch(golden):
    """Return a batch with logits at T5's targets or at every token, and the row lengths."""
    tokens, lengths = golden["tokens"], golden["lengths"]
    if "targets" in golden:
        rows = [ids[:length].tolist() for ids, length in zip(tokens, lengths, strict=True)]
        targets, target_lengths = golden["targets"], golden["target_lengths"]
        examples = [
            example_of(ids, [theirs[:count].tolist()], 0)
            for ids, theirs, count in zip(rows, targets, target_lengths, strict=True)
        ]
        return batch_of(examples, separate_targets=True), target_lengths
    return batch_with_all_targets(tokens, lengths), lengths


@pytest.mark.parametrize("pair", PAIRS)
def test_an_imported_adapter_gives_the_logits_of_peft(pair):
    variant, kind = pair.split("/")
    base, golden = base_of(variant), dict(np.load(ADAPTERS / variant / "golden.npz"))
    batch, lengths = golden_batch(golden)
    method = imported(base, ADAPTERS / pair)
    ours = rows_of(batch, logits_of(method, base.backbone, batch))
    expected = golden[f"{kind}_logits"]
    for row, length in enumerate(lengths):
        scale = expected[row, :length].std()
        np.testing.assert_allclose(
            ours[row, :length], expected[row, :length], rtol=0, atol=1e-4 * scale
        )


@pytest.mark.parametrize("pair", PAIRS)
def test_import_followed_by_export_is_exact(pair, tmp_path):
    base = base_of(pair.split("/")[0])
    method = imported(base, ADAPTERS / pair)
    export_adapter(trained(base, method), tmp_path)
    again = imported(base, tmp_path)
    assert again.arrays(base.backbone).keys() == method.arrays(base.backbone).keys()
    for name, array in method.arrays(base.backbone).items():
        np.testing.assert_array_equal(again.arrays(base.backbone)[name], array)
    assert getattr(again, "scales", None) == getattr(method, "scales", None)
    kind = pair.split("/")[1]
    if kind in ("prompt", "prefix") and "t5" not in pair:
        stored, theirs = (
            load_file(p / "adapter_model.safetensors") for p in (tmp_path, ADAPTERS / pair)
        )
        np.testing.assert_allclose(
            stored["prompt_embeddings"], theirs["prompt_embeddings"], rtol=1e-6
        )


@pytest.mark.parametrize("variant", ["llama-llama3", "gpt2-inner", "gemma2-capped"])
def test_a_soft_prompt_can_be_exported_as_a_prefix(variant, tmp_path):
    base = base_of(variant)
    vectors = jax.random.normal(jax.random.key(0), (4, base.backbone.arch.hidden_size))
    export_adapter(trained(base, SoftPrompt(vectors)), tmp_path, as_prefix=True)
    golden = np.load(ADAPTERS / variant / "golden.npz")
    batch, _ = golden_batch(golden)
    prefix = imported(base, tmp_path)
    assert isinstance(prefix, PrefixTuning)
    np.testing.assert_allclose(
        logits_of(prefix, base.backbone, batch),
        logits_of(SoftPrompt(vectors), base.backbone, batch),
        atol=1e-5,
    )


@pytest.fixture
def adapter(tmp_path):
    def adapter(kind):
        return shutil.copytree(ADAPTERS / "llama-llama3" / kind, tmp_path / kind)

    return adapter


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def rename_pair(tensors):
    for side in "AB":
        name = A.replace("lora_A", f"lora_{side}")
        tensors[name.replace("q_proj", "x")] = tensors.pop(name)


def drop_first(tensors):
    del tensors[min(tensors)]


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

MALFORMED = {
    "no prompt": ("prompt", rename("prompt_embeddings", "x"), {}, "no prompt_embeddings"),
    "length": ("prompt", None, {"num_virtual_tokens": 7}, "4 rows, not the 7"),
    "length text": (
        "prompt",
        None,
        {"num_virtual_tokens": "4"},
        "a valid integer, not '4'",
    ),
    "kind": ("prompt", None, {"peft_type": "IA3"}, "kind 'IA3' are not supported"),
    "prefix": ("prefix", None, {"num_virtual_tokens": 2}, "takes (2, "),
    "half": ("lora", drop_first, {}, "but not base_model"),
    "foreign": ("lora", rename_pair, {}, "has no module for base_model.model.model.layers.0"),
    "length fraction": ("prompt", None, {"num_virtual_tokens": 4.0}, "a valid integer, not 4.0"),
    "prefix fraction": ("prefix", None, {"num_virtual_tokens": 4.0}, "a valid integer, not 4.0"),
    "patterns": ("lora", None, {"alpha_pattern": ["q_proj"]}, "a valid dictionary, not ['q_proj']"),
    "dora": ("lora", None, {"use_dora": True}, "use_dora True is not supported"),
    "bias": ("lora", None, {"bias": "all"}, "bias 'all' is not supported"),
    "alpha": ("lora", None, {"lora_alpha": None}, "lora_alpha is missing"),
    "regex": ("lora", None, {"alpha_pattern": {"(a+)+$": 2}}, "is not a plain name"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_adapter_is_rejected_in_one_line(adapter, case):
    kind, tensors, config, message = MALFORMED[case]
    folder = adapter(kind)
    if tensors:
        change_tensors(folder, tensors)
    change_config(folder, **config)
    with pytest.raises(UserError) as error:
        import_adapter(folder, base_of("llama-llama3"))
    assert message in str(error.value)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["prompt", "prefix", "lora"])
def test_an_adapter_for_another_base_model_is_rejected(adapter, kind):
    with pytest.raises(UserError, match="the base model 'gemma-gelu'"):
        import_adapter(adapter(kind), base_of("gemma-gelu"))


def test_values_that_are_not_finite_are_rejected(adapter):
    folder = adapter("prompt")
    change_tensors(folder, lambda tensors: tensors["prompt_embeddings"].fill(np.nan))
    with pytest.raises(UserError, match="not finite"):
        import_adapter(folder, base_of("llama-llama3"))


class Bomb:
    def __reduce__(self):
        return print, ("unpickled",)


def test_nothing_is_unpickled(adapter, tmp_path, capsys):
    folder = adapter("prompt")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    base = base_of("llama-llama3")
    with pytest.raises(UserError, match="pickled files are not read"):
        import_adapter(folder, base)
    np.save(tmp_path / "p.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="not an array of floating-point numbers"):
        import_array(tmp_path / "p.npy", base)
    (folder / "adapter_model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="not a readable safetensors file"):
        import_adapter(folder, base)
    assert "unpickled" not in capsys.readouterr().out


def test_an_array_from_the_original_prompt_tuning_code_is_read(tmp_path):
    base = base_of("llama-llama3")
    vectors = np.random.default_rng(0).standard_normal((3, 16))
    np.save(tmp_path / "prompt.npy", vectors)
    name, arrays, _ = import_array(tmp_path / "prompt.npy", base)
    assert name == "prompt"
    np.testing.assert_allclose(arrays["vectors"], vectors, rtol=1e-6)
    np.save(tmp_path / "wide.npy", np.ones((3, 17)))
    with pytest.raises(UserError, match=r"17 dimensions, but the base model .* has 16"):
        import_array(tmp_path / "wide.npy", base)


def test_prompts_that_peft_cannot_represent_are_rejected(tmp_path):
    base, vectors = base_of("llama-llama3"), jnp.ones((2, 16))
    in_place = trained(base, SoftPrompt(vectors, []))
    after_text = trained(base, SoftPrompt(vectors, [5, ~0, ~1]))
    offsets = DecomposedPrompt(vectors, jnp.ones((3, 1)), jnp.ones((1, 16)), [~0, ~1])
    lora = LoRA({}, {})
    for prompt, as_prefix, message in (
        (in_place, False, "are elsewhere"),
        (in_place, True, "there is no prefix of keys and values"),
        (after_text, False, "are elsewhere"),
        (trained(base, offsets), False, "method dept has no equivalent in peft"),
        (trained(base, offsets), True, "method dept cannot be written as a prefix"),
        (trained(base, lora), True, "method lora cannot be written as a prefix"),
    ):
        with pytest.raises(UserError, match=message):
            export_adapter(prompt, tmp_path, as_prefix=as_prefix)
    export_adapter(after_text, tmp_path, as_prefix=True)
    assert load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"].shape[0] == 3
