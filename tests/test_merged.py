"""Merged models: transformers reads them as we do, and new tokens act as the vectors."""

import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES_GOLDEN, GOLDEN
from transformers import AutoConfig, AutoTokenizer

from softprompt import Base, SoftPrompt
from softprompt.backbones.config import architecture_of
from softprompt.backbones.formats.directory import ModelDirectory
from softprompt.backbones.formats.gguf import GGUFFile
from softprompt.backbones.formats.tokenizer_files import read_tokenizer_files
from softprompt.backbones.loading import load_backbone
from softprompt.experiment.schema import ComputeSettings, TemplateSettings
from softprompt.inference.prompt import TrainedPrompt
from softprompt.interop.merged import export_merged
from softprompt.interop.merged_config import merged_config
from softprompt.interop.merged_tokenizer import save_tokenizer
from softprompt.methods.full import FullFineTuning

MODELS = [*sorted(FAMILIES_GOLDEN.iterdir()), *sorted((GOLDEN / "gguf").glob("*.gguf"))]


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.name)
def test_transformers_reads_the_same_architecture_from_the_config(path, tiny, tmp_path):
    file = ModelDirectory(path) if path.is_dir() else GGUFFile(path)
    backbone, again = merge(file, FullFineTuning(), tiny.tokenizer, tmp_path)
    theirs = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert again.arch == backbone.arch
    if path.is_dir():
        assert theirs["architectures"] == file.config["architectures"]
    assert architecture_of(theirs, ModelDirectory(tmp_path).names) == backbone.arch


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.name)
def test_the_config_uses_names_that_transformers_4_knows(path, tiny, tmp_path):
    """By hand, transformers 4.57.1 read all of these with the same rotary embeddings."""
    file = ModelDirectory(path) if path.is_dir() else GGUFFile(path)
    base = Base(str(path), "", file.config, SimpleNamespace(), tiny.tokenizer, ComputeSettings())
    config = merged_config(base, 300, untied=False)
    assert not {"rope_parameters", "num_local_experts", "auto_map"} & set(config)
    assert config["dtype"] == config["torch_dtype"] == "float32"
    parameters = file.config.get("rope_parameters")
    if parameters:
        full = parameters.get("full_attention", parameters)
        theta = "rotary_emb_base" if config["model_type"] == "gpt_neox" else "rope_theta"
        assert config[theta] == full["rope_theta"]
        assert (config["rope_scaling"] is None) == (full["rope_type"] == "default")
    if config["model_type"] == "phi3" and config["rope_scaling"] and path.is_dir():
        assert set(config["rope_scaling"]) == {"type", "short_factor", "long_factor"}


def test_the_tokenizer_uses_names_that_transformers_4_knows(tmp_path):
    """By hand, transformers 4.57.1 loaded such files and encoded texts identically."""
    settings = {
        "eos_token": "<|endoftext|>",
        "additional_special_tokens": ["<a>", "<b>"],
        "image_token": "<image>",
        "chat_template": "{{ messages }}",
    }
    model = json.loads((GOLDEN / "llama-grouped" / "tokenizer.json").read_text())
    model["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(model))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer, folder = read_tokenizer_files(tmp_path), tmp_path / "merged"
    folder.mkdir()
    save_tokenizer(tokenizer, folder)
    assert json.loads((folder / "tokenizer_config.json").read_text()) == settings | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": True,  # version 4 sets this in the pre-tokenizer
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # version 4 adds token_type_ids
        "model_max_length": tokenizer.model_max_length,
        "padding_side": "right",
    }
    for again in (AutoTokenizer.from_pretrained(folder), read_tokenizer_files(folder)):
        assert again("Hi <a> <image>").input_ids == tokenizer("Hi <a> <image>").input_ids
        assert again.special_tokens_map == tokenizer.special_tokens_map
        assert again.all_special_ids == tokenizer.all_special_ids
        assert again.chat_template == tokenizer.chat_template


@jax.jit
def next_logits(backbone, tokens, prefix):
    """Return the logits `[B, V]` of the token after each row."""
    hidden, _ = backbone.start(tokens, jnp.array([tokens.shape[1]]), prefix, 1)
    return backbone.logits(hidden)


def merge(file, method, tokenizer, folder):
    """Export a method on the model of a file, and return both backbones."""
    backbone, _ = load_backbone(file)
    base = Base(str(file.path), "", file.config, backbone, tokenizer, ComputeSettings())
    task = SimpleNamespace(template=TemplateSettings(input="{text}"), demonstrations=(), tasks={})
    about = {"method": method.name}
    export_merged(TrainedPrompt(base, method, backbone, None, task, about), folder)
    return backbone, load_backbone(ModelDirectory(folder))[0]


@pytest.mark.parametrize("variant", sorted(path.name for path in (GOLDEN / "adapters").iterdir()))
def test_new_tokens_act_as_the_vectors_and_are_never_generated(variant, tiny, tmp_path):
    """The families cover embedding scales, tied and untied heads, and T5's start token."""
    file = ModelDirectory(FAMILIES_GOLDEN / variant)
    backbone, _ = load_backbone(file)
    scale = float(backbone.embedding.table[...].std()) * backbone.embedding.scale
    method = SoftPrompt(
        scale * jax.random.normal(jax.random.key(0), (3, backbone.arch.hidden_size))
    )
    _, merged = merge(file, method, tiny.tokenizer, tmp_path)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    new, size = generation["suppress_tokens"], backbone.arch.vocab_size
    if backbone.separate_targets:
        assert generation["decoder_start_token_id"] == backbone.arch.start_token
    tokens = np.array([[5, 9, 7, 6]])
    expected = np.asarray(next_logits(backbone, tokens, method.make_prefix(method.adapt(backbone))))
    found = np.asarray(next_logits(merged, np.concatenate([[new], tokens], axis=1), None))
    np.testing.assert_allclose(found[:, :size], expected, rtol=0, atol=1e-4 * expected.std())
    assert (found[:, new] <= found[:, :size].max()).all()


@pytest.mark.parametrize("variant", ["t5-relu", "t5-gated"])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("method", [FullFineTuning(), SoftPrompt(jnp.ones((3, 16)))])
def test_the_head_of_t5_keeps_its_scale(variant, scaled, method, tiny, tmp_path):
    """Transformers 4 scales tied heads alone, so other heads store the scale in their values."""
    model = shutil.copytree(FAMILIES_GOLDEN / variant, tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"scale_decoder_outputs": scaled}
    (model / "config.json").write_text(json.dumps(config))
    (tmp_path / "merged").mkdir()
    backbone, merged = merge(ModelDirectory(model), method, tiny.tokenizer, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    tied = config["tie_word_embeddings"]
    assert config.get("scale_decoder_outputs", tied) == tied == merged.arch.tied_head
    tokens, size = np.array([[5, 9, 7, 6]]), backbone.arch.vocab_size
    found = np.asarray(next_logits(merged, tokens, None))[:, :size]
    expected = np.asarray(next_logits(backbone, tokens, None))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * expected.std())
