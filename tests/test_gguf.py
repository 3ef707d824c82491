"""Models in GGUF files match llama.cpp, whose logits are in tests/golden/gguf."""

import json
import math
import struct
import tracemalloc

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from transformers import AutoConfig

from softprompt import UserError, load_base
from softprompt.backbones.config import architecture_of
from softprompt.backbones.families import FAMILIES
from softprompt.backbones.formats.gguf import GGUFFile
from softprompt.backbones.loading import load_backbone

FILES = sorted((GOLDEN / "gguf").glob("*.gguf"))


def test_every_supported_architecture_has_reference_results():
    kinds = {GGUFFile(path).config["model_type"] for path in FILES}
    assert kinds == {kind for kind, family in FAMILIES.items() if family.gguf_names}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_logits_match_llama_cpp(path):
    golden = np.load(path.with_suffix(".npz"))
    backbone, _ = load_backbone(GGUFFile(path))
    tokens = jnp.asarray(golden["tokens"])[None]
    logits = backbone.logits(backbone(backbone.embedding(tokens)))[0]
    # llama.cpp looks up GELU in a float16 table.
    exact = 2e-3 if path.stem == "gemma3" else 1e-5
    assert np.abs(logits - golden["logits"]).max() < exact * golden["logits"].std()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_transformers_reads_the_config_as_we_do(path, tmp_path):
    config = GGUFFile(path).config
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert architecture_of(theirs, []) == architecture_of(config, [])
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert theirs[key] == config[key]


def write_tensor(path, kind, rows=2, columns=256):
    writer = gguf.GGUFWriter(path, "llama")
    array = np.linspace(-1, 1, rows * columns, dtype=np.float32).reshape(rows, columns)
    writer.add_tensor("x", gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return array


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_1"])
def test_stored_types_are_read(tmp_path, kind):
    array = write_tensor(tmp_path / "x.gguf", gguf.GGMLQuantizationType[kind])
    read = GGUFFile(tmp_path / "x.gguf").read("x")
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, array, atol=0.08)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
def test_only_the_blocks_of_a_part_are_dequantized(tmp_path, monkeypatch, kind):
    kind = gguf.GGMLQuantizationType[kind]
    write_tensor(tmp_path / "x.gguf", kind, 6, 256)
    file = GGUFFile(tmp_path / "x.gguf")
    whole = file.read("x")
    dequantize, sizes = gguf.quants.dequantize, []

    def counting(data, kind):
        values = dequantize(data, kind)
        sizes.append(values.shape)
        return values

    monkeypatch.setattr(gguf.quants, "dequantize", counting)
    block = gguf.GGML_QUANT_SIZES[kind][0]
    for rows in (slice(0, 6), slice(2, 5)):
        for columns in (slice(0, 256), slice(64, 128), slice(40, 70), slice(250, 256)):
            np.testing.assert_array_equal(file.read("x", (rows, columns)), whole[rows, columns])
            first, end = columns.start // block, -(-columns.stop // block)
            assert sizes.pop() == (rows.stop - rows.start, (end - first) * block)


def test_an_unsupported_storage_type_is_named(tmp_path):
    path = tmp_path / "x.gguf"
    write_tensor(path, gguf.GGMLQuantizationType.Q8_0)
    content = bytearray(path.read_bytes())
    at = content.index(b"\1\0\0\0\0\0\0\0x") + 9 + 4 + 2 * 8  # the type of tensor x
    content[at] = gguf.GGMLQuantizationType.I8
    path.write_bytes(content)
    with pytest.raises(UserError, match="tensor x is stored as I8, which is not supported"):
        GGUFFile(path).read("x")


def test_a_truncated_tensor_is_rejected(tmp_path):
    path = tmp_path / "x.gguf"
    write_tensor(path, gguf.GGMLQuantizationType.F32)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"tensor 'x': .* ends after the end of the file"):
        GGUFFile(path)


def text(content):
    content = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(content)) + content


def field(name, kind, value):
    return text(name) + struct.pack("<I", kind) + value


def tensor(name="x", shape=(32,), kind=0, offset=0):
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


def header(fields=(), tensors=(), field_count=None, tensor_count=None):
    counts = (
        len(tensors) if tensor_count is None else tensor_count,
        len(fields) if field_count is None else field_count,
    )
    return b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join([*fields, *tensors])


UINT32, FLOAT, STRING, ARRAY, UINT64 = 4, 6, 8, 9, 10
ALIGNMENT = "general.alignment"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (header()[:9], "it ends too early"),
        (header(field_count=2**60), "metadata fields"),
        (header(field_count=1000), "it ends too early"),
        (header(tensor_count=2**63), "9223372036854775808 tensors"),
        (header([field("x", STRING, struct.pack("<Q", 2**63))]), "metadata 'x': it ends too early"),
        (header([field("x", ARRAY, struct.pack("<IQ", 4, 2**20))]), "metadata 'x': it ends too"),
        (header([field("x", ARRAY, struct.pack("<IQ", 4, 2**62))]), "too many items in arrays"),
        (header([field("x", ARRAY, struct.pack("<IQ", 9, 1) * 10**6)]), "nested too deeply"),
        (header([field("x", ARRAY, struct.pack("<IQ", 99, 1))]), "metadata 'x': the type 99"),
        (header([field("x", 77, b"")]), "metadata 'x': the type 77"),
        (header([field("x", STRING, text(b"\xff"))]), "metadata 'x': text that is not UTF-8"),
        (header([field("x", 0, b"1")] * 2), "two entries named x"),
        (header([field("a\nb", 0, b"1")]), r"the name 'a\nb'"),
        (header([field("x" * 10_000, 0, b"1")]), "the name 'xxx"),
        (header([field(ALIGNMENT, UINT32, bytes(4))]), "general.alignment 0"),
        (header([field(ALIGNMENT, UINT64, struct.pack("<Q", 2**62))]), "general.alignment 46"),
        (header(tensors=[tensor()] * 2), "two entries named x"),
        (header(tensors=[tensor(shape=())]), "tensor 'x' has 0 dimensions"),
        (header(tensors=[tensor(shape=(1,) * 5)]), "tensor 'x' has 5 dimensions"),
        (header(tensors=[tensor(shape=(0, 32))]), "tensor 'x': the shape (32, 0)"),
        (header(tensors=[tensor(shape=(31,), kind=2)]), "the shape (31,) of type Q4_0"),
        (header(tensors=[tensor(shape=(2**63,) * 4)]), "tensor 'x': shape (9223372036854775808,"),
        (header(tensors=[tensor(kind=99)]), "tensor 'x': the type 99"),
        (header(tensors=[tensor(offset=2**63)]), "at offset 9223372036854775808 ends after the"),
        (header(tensors=[tensor(offset=33)]), "the offset 33, which is not a multiple of 32"),
        (
            header(tensors=[tensor(), tensor("y", offset=32)]) + bytes(1000),
            "tensors 'x' and 'y' overlap",
        ),
        (
            header([field("general.architecture", UINT32, bytes(4))]),
            "metadata general.architecture: 0 is not a text",
        ),
        (
            header([field(".block_count", STRING, text("x"))]),
            "metadata .block_count: 'x' is not a number",
        ),
        (
            header([field(".rope.freq_base", FLOAT, struct.pack("<f", math.nan))]),
            "metadata .rope.freq_base: nan is not a number",
        ),
        (
            header(tensors=[tensor("rope_freqs.weight", (2**14,))]) + bytes(2**17),
            "tensor rope_freqs.weight has shape (16384,)",
        ),
        (
            header(tensors=[tensor("rope_factors_short.weight")]) + bytes(1000),
            "tensor rope_factors_long.weight is missing",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_headers_are_rejected_with_a_reason(tmp_path, content, message):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as error:
            GGUFFile(path)
        assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    finally:
        tracemalloc.stop()
    assert str(error.value).startswith(f"{path}: not a readable GGUF file (")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_random_damage_is_reported_in_one_line(path, tmp_path):
    original = path.read_bytes()
    end = original.index(b"output_norm.weight")  # of most of the header
    random = np.random.default_rng(0)
    messages = []
    for _ in range(30):
        content = bytearray(original)
        for at in random.integers(0, end, random.integers(1, 4)):
            content[at] = random.integers(256)
        (tmp_path / "x.gguf").write_bytes(content)
        try:
            load_base(str(tmp_path / "x.gguf"))
        except UserError as error:
            messages.append(str(error))
    assert messages
    assert all("\n" not in message for message in messages)


def test_invalid_metadata_is_rejected(tmp_path):
    for key, value in (("llama.embedding_length", "wide"), ("general.alignment", "32")):
        writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
        writer.add_head_count(2)
        writer.add_string(key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        with pytest.raises(UserError, match="not a readable GGUF file"):
            GGUFFile(tmp_path / "x.gguf")


def test_an_unsupported_rope_scaling_is_named(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes((GOLDEN / "gguf" / "llama.gguf").read_bytes())
    file = GGUFFile(path)
    file.config["rope_scaling"] = {"rope_type": "dynamic"}
    with pytest.raises(UserError, match="rope type 'dynamic' is not supported"):
        load_backbone(file)
