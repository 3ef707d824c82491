"""Tokenize varied strings with llama.cpp, the reference implementation of GGUF tokenizers.

The vocabularies are SmolLM2's, Gemma 3's, and small ones that this script makes, one for each
pre-tokenizer. Needs llama-cpp-python, gguf and tokenizers, in a separate environment:

    python tests/golden/make_tokens.py SmolLM2-135M-Instruct.Q4_1.gguf gemma-3-270m-q4_k_m.gguf

Made with llama-cpp-python 0.3.36.
"""

import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from llama_cpp import Llama
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from vocabularies import VOCABULARIES, write_vocabulary

HERE = Path(__file__).parent
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
PRE_TOKENIZERS = ["gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "tekken", "gpt-4o", "default"]

WRITTEN = [
    "Hello, world!", " leading space", "trailing space ", "two  spaces", "tab\tand\nnewline", "\n\n\n",
    "   ", "I'm, you're, he'll, they've, I'd; isn't IT'S", "2024-11-23 12:34:56", "3.14159e-10",
    "1234567890", "0x7fffDEAD", "$1,299.99 (50% off)", "a1b2c3", "1 2  3   4", "x²+y³=½",
    "def f(x):\n    return x ** 2  # square\n", "for (int i = 0; i < n; ++i) { a[i] += b[i]; }",
    "SELECT * FROM t WHERE id = 'x';", "<div class=\"a\">&amp;</div>", "{\"key\": [1, 2.5, null]}",
    "https://example.org/path?q=1&r=%20#frag", "C:\\Users\\name\\file.txt", "snake_case camelCase",
    "emoji 😀 👍🏽 👨‍👩‍👧‍👦 🇫🇷 ❤️", "😀😀😀", "naïve café façade Ærøskøbing", "Straße, ŁÓDŹ, İstanbul",
    "Привет, мир! Как дела?", "Γειά σου Κόσμε", "שלום עולם", "مرحبا بالعالم ١٢٣", "नमस्ते दुनिया १२३",
    "สวัสดีชาวโลก", "你好，世界！一二三", "こんにちは世界。カタカナ", "안녕하세요 세계", "Xin chào thế giới",
    "ትግርኛ", "🜁🜂 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛", "a\u0301e\u0308 combining", "zero\u200bwidth\u200djoiner", "\u00a0nbsp\u2003em\u3000wide",
    "\ufeffbom", "\u0000nul", "tab\t\t\ttabs", "\r\nwindows\r\n", "…—–“”‘’«»", "!!!???...", "a" * 60, "-" * 40,
    "<|im_start|>user\nHi<|im_end|>\n", "<|endoftext|>", "text<|im_end|>text", "<|not_a_token|>",
    "Review: A dull, lifeless film.\nSentiment: negative", "antidisestablishmentarianism", "",
]
PIECES = [
    " ", "  ", "\n", "\t", "the", " film", "'s", "'t", "7", "42", "3.5", "é", "ü", "ß", "я", "ж", "中", "文", "あ",
    "한", "ع", "ש", "ก", "😀", "🎬", "_", "-", "--", ".", ",", "!", "(", ")", "[", "]", "{", "}", "\"", "'", "/",
    "\\", "#", "@", "%", "&", "*", "+", "=", "<", ">", "if", "else", "return", "import", "Movie", "GREAT", "\u00a0",
]


EXTRA = ["a <mark>  b", "<unk> x", "</s> x", "xyzzy xyzzy", "éÀß ŁódźŻ ПриветМир camelCASEWords"]
SPACE_AFTER_SPECIAL = ["<mark>\n x", "a</s>  b", "<s> a<unk>\n b", "</s> <mark> a  ", "<mark>\t", "<|endoftext|> x"]


def strings() -> list[str]:
    chance = random.Random(0)
    mixed = ["".join(chance.choices(PIECES, k=chance.randint(2, 14))) for _ in range(300)]
    return WRITTEN + mixed


def make_vocabularies() -> None:
    """Make a byte-level and a SentencePiece-like vocabulary with a few hundred tokens each."""
    special = ["<unk>", "<s>", "</s>", "<mark>"]
    types = [UNKNOWN, CONTROL, CONTROL, USER_DEFINED]
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    plain = [text for text in strings() if "<|" not in text]  # llama.cpp recognizes some special tokens by name
    byte_level.train_from_iterator(plain, trainer)
    learned = json.loads(byte_level.to_str())["model"]
    tokens = sorted(learned["vocab"], key=learned["vocab"].get)
    stored = {
        "gpt2": {
            "tokens": [*tokens, "xyzzy"],  # no merges produce the last token
            "types": types + [NORMAL] * (len(tokens) + 1 - len(types)),
            "merges": [" ".join(merge) for merge in learned["merges"]],
        }
    }
    pieces = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False)
    printable = ["▁" + text.replace(" ", "▁") for text in strings() if text.isprintable()]
    pieces.train_from_iterator(printable, trainer)
    learned = json.loads(pieces.to_str())["model"]
    single = sorted(token for token in learned["vocab"] if len(token) == 1)
    merged = list(dict.fromkeys("".join(merge) for merge in learned["merges"]))
    stored["llama"] = {
        "tokens": [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *merged, *single],
        "types": types + [BYTE] * 256 + [NORMAL] * (len(merged) + len(single)),
        "scores": [0.0] * 260 + [-float(i) for i in range(len(merged) + len(single))],
    }
    VOCABULARIES.write_text(json.dumps(stored, ensure_ascii=False))


def token_ids(path: Path, texts: Sequence[str]) -> list[list[int]]:
    model = Llama(str(path), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=False, special=True) for text in texts]


def write_cases(name: str, path: Path) -> None:
    with (HERE / name).open("w") as file:
        for text, ids in zip(strings(), token_ids(path, strings()), strict=True):
            file.write(json.dumps({"text": text, "ids": ids}) + "\n")


def make_small() -> None:
    texts = [text.replace("<|endoftext|>", "</s>") for text in strings()] + EXTRA
    cases = {"texts": texts, "space behind": SPACE_AFTER_SPECIAL}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        for pre in PRE_TOKENIZERS:
            write_vocabulary(path, "gpt2", pre)
            cases[pre] = token_ids(path, texts)
        for prefix in (True, False):
            write_vocabulary(path, "llama", "default", add_space_prefix=prefix)
            cases[f"llama {prefix}"] = token_ids(path, texts)
        write_vocabulary(path, "llama", "default", name="Phi3", control_tokens=["<|endoftext|>"])
        cases["phi3"] = token_ids(path, SPACE_AFTER_SPECIAL)
    (HERE / "small_tokens.json").write_text(json.dumps(cases))


if __name__ == "__main__":
    smollm2, gemma3 = map(Path, sys.argv[1:])
    write_cases("smollm2_tokens.jsonl", smollm2)
    write_cases("gemma3_tokens.jsonl", gemma3)
    make_vocabularies()
    make_small()
