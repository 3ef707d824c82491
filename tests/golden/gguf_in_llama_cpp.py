"""Check that llama.cpp generates the same tokens from GGUF exports as softprompt.

    make llama-cpp-test

`export FOLDER` runs in softprompt's environment. `check FOLDER` runs where llama-cpp-python is
installed. Files in float32 must give the same tokens for every input. For the other types, the
script prints for how many inputs they do: llama.cpp also rounds activations for them.
"""

import functools
import sys
from pathlib import Path

from engine_cases import NEW_TOKENS, REVIEWS, read_cases, report, small_texts, write_cases

CONTEXT = 256


def export(folder: Path) -> None:
    """Export prompts on small models and on SmolLM2."""
    from engine_cases import smollm2_prompt
    from small_bases import LETTERS, PRE, small_prompt
    from softprompt import load_base
    from softprompt.interop.gguf_export import export_gguf

    texts = small_texts(LETTERS)
    small = {name: (small_prompt(name), texts) for name in PRE}
    write_cases(folder / "small", small, functools.partial(export_gguf, dtype="f32"))
    base = load_base("smollm2-135m-instruct")
    for dtype in ("f32", "f16", "q8_0"):
        prompts = {f"smollm2-{dtype}": (smollm2_prompt(base), REVIEWS)}
        if dtype == "f32":
            prompts["smollm2-chat"] = smollm2_prompt(base, chat=True), REVIEWS
        write_cases(folder / dtype, prompts, functools.partial(export_gguf, dtype=dtype))


def check(folder: Path) -> bool:
    """Compare what llama.cpp generates with the expected tokens."""
    import llama_cpp
    from llama_cpp import Llama

    engine, passed = f"llama-cpp-python {llama_cpp.__version__}", True
    for part in ("small", "f32", "f16", "q8_0"):
        for name, cases in read_cases(folder / part):
            path = str(folder / part / name / "model.gguf")
            # Keys and values in float32, as in softprompt.
            llm = Llama(path, n_ctx=CONTEXT, type_k=0, type_v=0, flash_attn=False, verbose=False)
            found = []
            for text in cases["inputs"]:
                tokens = llm.tokenize(text.encode(), add_bos=True, special=True)
                written: list[int] = []
                for token in llm.generate(tokens, temp=0.0):
                    written.append(token)
                    if token == cases["end"] or len(written) == NEW_TOKENS:
                        break
                found.append(written)
            exact = part in ("small", "f32")
            passed &= report(engine, name, found, cases["tokens"], exact)
            if name == "smollm2-chat":
                passed &= check_chat(engine, llm, cases)
    return passed


def check_chat(engine: str, llm, cases) -> bool:
    """Compare answers in a chat, whose template llama-cpp-python reads from the file."""
    found, expected = [], []
    for text, tokens in zip(cases["texts"], cases["tokens"], strict=True):
        answer = llm.create_chat_completion(
            [{"role": "user", "content": text}], temperature=0, max_tokens=NEW_TOKENS
        )
        found.append(answer["choices"][0]["message"]["content"])
        kept = [token for token in tokens if token != cases["end"]]
        expected.append(llm.detokenize(kept).decode("utf-8", errors="ignore"))
    return report(engine, "chat completions", found, expected, exact=True)


if __name__ == "__main__":
    if sys.argv[1] == "export":
        export(Path(sys.argv[2]))
    else:
        sys.exit(not check(Path(sys.argv[2])))
