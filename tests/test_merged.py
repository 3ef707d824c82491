"""A merged model is to transformers what it is here."""

from types import SimpleNamespace

import pytest
from conftest import FAMILIES_GOLDEN, GOLDEN
from transformers import AutoConfig

from softprompt import Base
from softprompt.backbones.directory import ModelDirectory
from softprompt.backbones.families import FAMILIES
from softprompt.backbones.gguf import GGUFFile
from softprompt.backbones.loading import load_backbone
from softprompt.config import Compute, Template
from softprompt.inference.prompt import TrainedPrompt
from softprompt.interop.merged import export_merged
from softprompt.methods.method import FullFineTuning

MODELS = [*sorted(FAMILIES_GOLDEN.iterdir()), *sorted((GOLDEN / "gguf").glob("*.gguf"))]


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.name)
def test_the_config_means_the_same_architecture_to_transformers(path, tiny, tmp_path):
    file = ModelDirectory(path) if path.is_dir() else GGUFFile(path)
    backbone, _ = load_backbone(file)
    base = Base(str(path), "", file.config, backbone, tiny.tokenizer, Compute())
    task = SimpleNamespace(template=Template(input="{text}"), demonstrations=(), tasks={})
    export_merged(TrainedPrompt(base, FullFineTuning(), backbone, None, task, {}), tmp_path)
    again, _ = load_backbone(ModelDirectory(tmp_path))
    theirs = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert again.arch == backbone.arch
    if path.is_dir():
        assert theirs["architectures"] == file.config["architectures"]
    assert FAMILIES[file.config["model_type"]].architecture(theirs) == backbone.arch
