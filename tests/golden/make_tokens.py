"""Token ids of varied strings by llama.cpp, the reference reader of GGUF tokenizers.

Needs llama-cpp-python, in an environment of its own. Run from the repository's root:

    python tests/golden/make_tokens.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf

Made with llama-cpp-python 0.3.36.
"""

import json
import random
import sys
from pathlib import Path

from llama_cpp import Llama

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


def strings() -> list[str]:
    chance = random.Random(0)
    mixed = ["".join(chance.choices(PIECES, k=chance.randint(2, 14))) for _ in range(300)]
    return WRITTEN + mixed


if __name__ == "__main__":
    model = Llama(sys.argv[1], vocab_only=True, verbose=False)
    with (Path(__file__).parent / "smollm2_tokens.jsonl").open("w") as file:
        for text in strings():
            ids = model.tokenize(text.encode(), add_bos=False, special=True)
            file.write(json.dumps({"text": text, "ids": ids}) + "\n")
