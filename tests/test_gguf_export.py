"""GGUF exports are read back as the same model. `make llama-cpp-test` runs them in llama.cpp."""

import sys
from types import SimpleNamespace

import gguf
import jax
import numpy as np
import pytest
from conftest import FAMILIES_GOLDEN, GOLDEN
from flax import nnx
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from softprompt import Base, UserError, load_base
from softprompt.backbones.formats.directory import ModelDirectory
from softprompt.backbones.formats.gguf import GGUFFile
from softprompt.backbones.formats.gguf_tokenizer import PRE_TOKENIZERS
from softprompt.backbones.loading import load_backbone
from softprompt.data.task import make_task
from softprompt.experiment.schema import ComputeSettings, TemplateSettings
from softprompt.inference.prompt import TrainedPrompt
from softprompt.interop.gguf_export import GGUF_FILE, export_gguf
from softprompt.interop.gguf_vocabulary import vocabulary_fields
from softprompt.methods.full import FullFineTuning

sys.path.append(str(GOLDEN))

from small_bases import LETTERS, small_prompt, small_tokenizer
from vocabularies import write_vocabulary

TEXTS = ["the rat sings", "at 9: 'no!'", "zebras, in here?"]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_the_file_is_a_base_model_that_writes_the_same_tokens(name, tmp_path):
    prompt = small_prompt(name)
    written = export_gguf(prompt, tmp_path, "f32")
    model = load_base(str(tmp_path / GGUF_FILE))
    plain = TrainedPrompt.from_method(FullFineTuning(), model, free_text(model))
    expected = prompt.generate(TEXTS, max_new_tokens=12)
    found = plain.generate([written.format(text=text) for text in TEXTS], max_new_tokens=12)
    assert found == expected
    assert len({one.text for one in expected}) > 1
    ours = prompt.task.example(prompt.record("the rat", ""), with_answer=False).input
    ids = model.tokenizer(written.format(text="the rat")).input_ids
    assert ids == [96 + ~i if i < 0 else i for i in (*prompt.task.opening, *ours)]


def free_text(base):
    return make_task(base, TemplateSettings(input="{text}", target="{answer}"), None)


def test_the_gguf_package_reads_what_an_engine_needs(tmp_path):
    prompt = small_prompt("gemma3")
    export_gguf(prompt, tmp_path, "q8_0")
    reader = gguf.GGUFReader(tmp_path / GGUF_FILE)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "gemma3"
    assert fields["tokenizer.ggml.tokens"][96:] == [f"<|softprompt-{i}|>" for i in range(4)]
    assert fields["tokenizer.ggml.token_type"][96:] == [gguf.TokenType.CONTROL] * 4
    assert fields["tokenizer.ggml.suppress_tokens"] == [96, 97, 98, 99]
    # The chat template and the form of an input contain the token that begins texts.
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"].startswith('{{ "<|softprompt-0|>')
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    assert tensors["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    assert tensors["output.weight"].shape.tolist() == [32, 100]


@pytest.mark.parametrize(("dtype", "error"), [("f32", 0), ("f16", 5e-4), ("q8_0", 5e-3)])
def test_embeddings_are_stored_with_the_precision_of_the_type(dtype, error, tmp_path):
    prompt = small_prompt("gemma3")
    export_gguf(prompt, tmp_path, dtype)
    file = GGUFFile(tmp_path / GGUF_FILE)
    table, head = file.read("token_embd.weight"), file.read("output.weight")
    expected = np.asarray(prompt.base.backbone.embedding.table[...])
    vectors = np.asarray(prompt.method.vectors[...]) / np.float32(32**0.5)  # Gemma's scale
    largest = np.abs(vectors).max()
    np.testing.assert_allclose(table[:96], expected, rtol=0, atol=error * largest)
    np.testing.assert_allclose(table[96:], vectors, rtol=1e-6, atol=error * largest)
    np.testing.assert_array_equal(head[96:], head[[0] * 4])  # the row of <pad>


def export_plain(file, folder):
    """Export the model of a file as it is, and return the backbone."""
    backbone, _ = load_backbone(file)
    size = backbone.arch.vocab_size
    tokenizer = small_tokenizer("llama", LETTERS[: size - 30], size)
    base = Base(str(file.path), "", file.config, backbone, tokenizer, ComputeSettings())
    task = SimpleNamespace(template=TemplateSettings(input="{text}"), demonstrations=(), tasks={})
    export_gguf(TrainedPrompt(base, FullFineTuning(), backbone, None, task, {}), folder, "f32")
    return backbone


@pytest.mark.parametrize("path", sorted((GOLDEN / "gguf").glob("*.gguf")), ids=lambda p: p.stem)
def test_the_tensors_of_a_gguf_file_stay_as_they_are(path, tmp_path):
    """They are the reference for the order of rows and for the rotary embedding."""
    export_plain(GGUFFile(path), tmp_path)
    before, after = gguf.GGUFReader(path), gguf.GGUFReader(tmp_path / GGUF_FILE)
    found = {tensor.name: tensor.data for tensor in after.tensors}
    assert set(found) == {tensor.name for tensor in before.tensors}
    for tensor in before.tensors:
        np.testing.assert_allclose(found[tensor.name], tensor.data, rtol=1e-6, err_msg=tensor.name)
    for key, field in before.fields.items():
        if ".rope." in key or ".attention." in key or ".length" in key:
            assert after.fields[key].contents() == pytest.approx(field.contents()), key


SUPPORTED = ["llama-linear", "llama-llama3", "llama-yarn", "qwen2-tied", "phi3-longrope"]


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_model_directory_becomes_the_same_model(name, tmp_path):
    backbone = export_plain(ModelDirectory(FAMILIES_GOLDEN / name), tmp_path)
    again, _ = load_backbone(GGUFFile(tmp_path / GGUF_FILE))
    ours, theirs = nnx.state(backbone, nnx.Param), nnx.state(again, nnx.Param)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt2-plain", r"model type gpt2 cannot be written to a GGUF file \(supported: gemma3"),
        ("llama-biased", "cannot represent its attention_bias"),
        ("qwen2-window", "cannot represent its layers"),
        ("gemma3_text-pattern", "cannot represent its layers, attention_scale, logit_softcap"),
    ],
)
def test_a_model_that_gguf_cannot_describe_is_rejected(name, message, tmp_path):
    with pytest.raises(UserError, match=message):
        export_plain(ModelDirectory(FAMILIES_GOLDEN / name), tmp_path)
    assert not any(tmp_path.iterdir())


def test_values_that_float16_cannot_hold_are_rejected(tmp_path):
    prompt = small_prompt("llama")
    prompt.method.vectors[...] = 1e6 * prompt.method.vectors[...]
    with pytest.raises(
        UserError, match=r"token_embd.weight has values .* cannot represent; use --dtype f32"
    ):
        export_gguf(prompt, tmp_path, "f16")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_the_name_of_a_pre_tokenizer_is_found(pre, tmp_path):
    write_vocabulary(tmp_path / "vocabulary.gguf", "gpt2", pre)
    tokenizer = GGUFFile(tmp_path / "vocabulary.gguf").tokenizer()
    assert vocabulary_fields(tokenizer, len(tokenizer), [], "")["pre"] == pre


@pytest.mark.parametrize("prefix", [True, False])
def test_scores_are_found_from_the_order_of_merges(prefix, tmp_path):
    path = tmp_path / "vocabulary.gguf"
    write_vocabulary(path, "llama", "default", add_space_prefix=prefix)
    tokenizer = GGUFFile(path).tokenizer()
    fields = vocabulary_fields(tokenizer, len(tokenizer), [], "")
    assert fields["add_space_prefix"] == prefix
    reader = gguf.GGUFReader(path)
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    assert fields["token_type"] == types


def test_an_unknown_pattern_is_rejected(tmp_path):
    tokens = ["<s>", *map(chr, range(33, 127)), "th"]
    inner = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [("t", "h")]))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")
    with pytest.raises(UserError, match="tokenizer cannot be written to a GGUF file"):
        vocabulary_fields(tokenizer, len(tokens), [], "")
