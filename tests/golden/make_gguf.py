"""Make small random GGUF files of every supported architecture, with llama.cpp's logits.

Needs llama-cpp-python and gguf, in a separate environment:

    python tests/golden/make_gguf.py

Names and keys are the same as from llama.cpp's `convert_hf_to_gguf.py`. All tensors are float32,
because llama.cpp also rounds activations for other types. Made with llama-cpp-python 0.3.36.
"""

from pathlib import Path

import gguf
import numpy as np
from llama_cpp import Llama

FILES = Path(__file__).parent / "gguf"
VOCABULARY, HIDDEN, INNER, HEADS = 96, 32, 64, 4
TOKENS = [5, 17, 80, 3, 3, 41, 77, 12, 9, 60, 33, 2]

VARIANTS = {
    "llama": dict(kv_heads=2),
    "llama-3.1": dict(arch="llama", kv_heads=1, rope_freqs=True),
    "qwen2": dict(kv_heads=2, biases=True, tied=True),
    "qwen3": dict(kv_heads=2, head=16, head_norms=True),
    "qwen3-yarn": dict(arch="qwen3", kv_heads=2, head=16, head_norms=True, yarn=True),
    "gemma3": dict(
        kv_heads=1, head=16, head_norms=True, post_norms=True, tied=True, layers=7, window=4
    ),
    "phi3": dict(kv_heads=2, fused=True, window=64),
    "phi3-long": dict(arch="phi3", kv_heads=4, fused=True, factors=True, window=64),
}


class Maker:
    """Writes one file with random tensors."""

    def __init__(self, path: Path, arch: str, seed: int):
        self.writer, self.random = gguf.GGUFWriter(path, arch), np.random.default_rng(seed)

    def matrix(self, name: str, outputs: int, inputs: int, spread: float | None = None) -> None:
        drawn = self.random.normal(size=(outputs, inputs)) * (spread or inputs**-0.5)
        self.writer.add_tensor(name, drawn.astype(np.float32))

    def vector(self, name: str, size: int, mean: float = 0.0) -> None:
        drawn = mean + self.random.normal(size=size) * 0.2
        self.writer.add_tensor(name, drawn.astype(np.float32))


def make(
    name: str,
    *,
    kv_heads: int,
    head: int = HIDDEN // HEADS,
    arch: str = "",
    layers: int = 2,
    tied: bool = False,
    biases: bool = False,
    head_norms: bool = False,
    post_norms: bool = False,
    fused: bool = False,
    rope_freqs: bool = False,
    factors: bool = False,
    yarn: bool = False,
    window: int | None = None,
) -> None:
    path, arch = FILES / f"{name}.gguf", arch or name
    maker = Maker(path, arch, seed=len(name))
    writer, width, kv_width = maker.writer, HEADS * head, kv_heads * head
    writer.add_block_count(layers)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1_000_000.0 if arch == "gemma3" else 5_000.0)
    if arch in ("llama", "phi3"):
        writer.add_rope_dimension_count(head)
    if yarn:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(128)
    if window:
        writer.add_sliding_window(window)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("none")

    maker.matrix("token_embd.weight", VOCABULARY, HIDDEN, 0.3)
    if rope_freqs:
        writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, head // 2, dtype=np.float32))
    if factors:
        writer.add_rope_scaling_orig_ctx_len(256)
        writer.add_rope_scaling_attn_factors(1.2)
        for length, most in (("long", 9), ("short", 2)):
            values = np.linspace(1, most, head // 2, dtype=np.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", values)
    for layer in range(layers):
        block = f"blk.{layer}."
        maker.vector(block + "attn_norm.weight", HIDDEN, 1)
        if fused:
            maker.matrix(block + "attn_qkv.weight", width + 2 * kv_width, HIDDEN)
            maker.matrix(block + "ffn_up.weight", 2 * INNER, HIDDEN)
        else:
            for part, size in (("q", width), ("k", kv_width), ("v", kv_width)):
                maker.matrix(f"{block}attn_{part}.weight", size, HIDDEN)
                if biases:
                    maker.vector(f"{block}attn_{part}.bias", size)
            maker.matrix(block + "ffn_gate.weight", INNER, HIDDEN)
            maker.matrix(block + "ffn_up.weight", INNER, HIDDEN)
        if head_norms:
            maker.vector(block + "attn_q_norm.weight", head, 1)
            maker.vector(block + "attn_k_norm.weight", head, 1)
        maker.matrix(block + "attn_output.weight", HIDDEN, width)
        if post_norms:
            maker.vector(block + "post_attention_norm.weight", HIDDEN, 1)
            maker.vector(block + "post_ffw_norm.weight", HIDDEN, 1)
        maker.vector(block + "ffn_norm.weight", HIDDEN, 1)
        maker.matrix(block + "ffn_down.weight", HIDDEN, INNER)
    maker.vector("output_norm.weight", HIDDEN, 1)
    if not tied:
        maker.matrix("output.weight", VOCABULARY, HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    model = Llama(
        str(path), n_ctx=64, logits_all=True, type_k=0, type_v=0, flash_attn=False, verbose=False
    )
    model.eval(TOKENS)
    logits = np.array(model.scores[: len(TOKENS)], np.float32)
    np.savez_compressed(path.with_suffix(".npz"), tokens=np.array(TOKENS), logits=logits)
    print(f"{name}: {path.stat().st_size // 1000} kB, logits vary by {logits.std():.2f}")


if __name__ == "__main__":
    FILES.mkdir(exist_ok=True)
    for variant, settings in VARIANTS.items():
        make(variant, **settings)
