"""Merged models: transformers reads them as we do, and new tokens act as the vectors."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES_GOLDEN, GOLDEN
from transformers import AutoConfig

from softprompt import Base, SoftPrompt
from softprompt.backbones.config import architecture_of
from softprompt.backbones.formats.directory import ModelDirectory
from softprompt.backbones.formats.gguf import GGUFFile
from softprompt.backbones.loading import load_backbone
from softprompt.experiment.schema import ComputeSettings, TemplateSettings
from softprompt.inference.prompt import TrainedPrompt
from softprompt.interop.merged import export_merged
from softprompt.methods.full import FullFineTuning

MODELS = [*sorted(FAMILIES_GOLDEN.iterdir()), *sorted((GOLDEN / "gguf").glob("*.gguf"))]


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.name)
def test_transformers_reads_the_same_architecture_from_the_config(path, tiny, tmp_path):
    file = ModelDirectory(path) if path.is_dir() else GGUFFile(path)
    backbone, _ = load_backbone(file)
    base = Base(str(path), "", file.config, backbone, tiny.tokenizer, ComputeSettings())
    task = SimpleNamespace(template=TemplateSettings(input="{text}"), demonstrations=(), tasks={})
    export_merged(TrainedPrompt(base, FullFineTuning(), backbone, None, task, {}), tmp_path)
    again, _ = load_backbone(ModelDirectory(tmp_path))
    theirs = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert again.arch == backbone.arch
    if path.is_dir():
        assert theirs["architectures"] == file.config["architectures"]
    assert architecture_of(theirs, ModelDirectory(tmp_path).names) == backbone.arch


@pytest.mark.parametrize("variant", sorted(path.name for path in (GOLDEN / "adapters").iterdir()))
def test_new_tokens_act_as_the_vectors_and_are_never_generated(variant, tiny, tmp_path):
    """The families cover embedding scales, tied and untied heads, and T5's start token."""
    file = ModelDirectory(FAMILIES_GOLDEN / variant)
    backbone, _ = load_backbone(file)
    base = Base(variant, "", file.config, backbone, tiny.tokenizer, ComputeSettings())
    scale = float(backbone.embedding.table[...].std()) * backbone.embedding.scale
    method = SoftPrompt(
        scale * jax.random.normal(jax.random.key(0), (3, backbone.arch.hidden_size))
    )
    task = SimpleNamespace(template=TemplateSettings(input="{text}"), demonstrations=(), tasks={})
    about = {"method": "prompt"}
    export_merged(TrainedPrompt(base, method, backbone, None, task, about), tmp_path)
    merged, _ = load_backbone(ModelDirectory(tmp_path))
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    new, size = generation["suppress_tokens"], backbone.arch.vocab_size
    if backbone.separate_targets:
        assert generation["decoder_start_token_id"] == backbone.arch.start_token
    tokens = np.array([[5, 9, 7, 6]])

    @jax.jit
    def logits(backbone, tokens, prefix):
        hidden, _ = backbone.start(tokens, jnp.array([tokens.shape[1]]), prefix, 1)
        return backbone.logits(hidden)

    expected = np.asarray(logits(backbone, tokens, method.make_prefix(method.adapt(backbone))))
    found = np.asarray(logits(merged, np.concatenate([[new], tokens], axis=1), None))
    np.testing.assert_allclose(found[:, :size], expected, rtol=0, atol=1e-4 * expected.std())
    assert (found[:, new] <= found[:, :size].max()).all()
