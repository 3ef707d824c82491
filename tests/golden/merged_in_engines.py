"""Check that vLLM and transformers generate the same tokens from exports as softprompt.

    make vllm-test

`export FOLDER` runs in softprompt's environment and exports prompts on SmolLM2 as merged models and
as embeddings. `vllm FOLDER` and `transformers FOLDER` run where the engine is installed.
"""

import sys
from pathlib import Path

from engine_cases import NEW_TOKENS, REVIEWS, read_cases, report, write_cases


def export(folder: Path) -> None:
    """Export prompts on SmolLM2."""
    from engine_cases import smollm2_prompt
    from softprompt import load_base
    from softprompt.interop.embeds import export_embeds
    from softprompt.interop.merged import export_merged

    base = load_base("smollm2-135m-instruct")
    plain, chat = smollm2_prompt(base), smollm2_prompt(base, chat=True)
    write_cases(
        folder / "merged", {"plain": (plain, REVIEWS), "chat": (chat, REVIEWS)}, export_merged
    )
    write_cases(folder / "embeds", {"plain": (plain, REVIEWS)}, export_embeds)


def check_vllm(folder: Path) -> bool:
    """Compare what vLLM generates with the expected tokens."""
    import torch
    import vllm
    from safetensors.torch import load_file

    engine, passed = f"vllm {vllm.__version__}", True
    options = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True}
    settings = vllm.SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    for name, cases in read_cases(folder / "merged"):
        path = str(folder / "merged" / name)
        llm = vllm.LLM(path, enable_prompt_embeds=name == "plain", **options)
        encode = llm.get_tokenizer().encode
        inputs = [
            {"prompt_token_ids": encode(text, add_special_tokens=False)} for text in cases["inputs"]
        ]
        outputs = llm.generate(inputs, settings)
        found = [list(one.outputs[0].token_ids) for one in outputs]
        passed &= report(engine, f"merged, {name}", found, cases["tokens"], exact=True)
        conversations = [[{"role": "user", "content": text}] for text in cases["texts"]]
        outputs = llm.chat(conversations, settings)
        found = [list(one.outputs[0].token_ids) for one in outputs]
        passed &= report(engine, f"chat with merged, {name}", found, cases["tokens"], exact=True)
        if name == "plain":  # the same weights as the base model
            ((_, cases),) = read_cases(folder / "embeds")
            table = load_file(f"{path}/model.safetensors")["model.embed_tokens.weight"]
            opening = load_file(folder / "embeds" / name / "prompt_embeds.safetensors")
            embeds = [
                torch.cat(
                    [opening["prompt_embeds"], table[encode(text, add_special_tokens=False)]]
                )
                for text in cases["inputs"]
            ]
            outputs = llm.generate([{"prompt_embeds": each} for each in embeds], settings)
            found = [list(one.outputs[0].token_ids) for one in outputs]
            passed &= report(engine, "embeds", found, cases["tokens"], exact=True)
        del llm
    return passed


def check_transformers(folder: Path) -> bool:
    """Compare what transformers generates with the expected tokens."""
    import torch
    import transformers

    engine, passed = f"transformers {transformers.__version__}", True
    for name, cases in read_cases(folder / "merged"):
        path = folder / "merged" / name
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        found, rendered = [], []
        for text, filled in zip(cases["texts"], cases["inputs"], strict=True):
            inputs = tokenizer(filled, add_special_tokens=False, return_tensors="pt")
            output = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
            found.append(output[0, inputs["input_ids"].shape[1] :].tolist())
            message = [{"role": "user", "content": text}]
            rendered.append(
                tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            )
        passed &= report(engine, f"merged, {name}", found, cases["tokens"], exact=True)
        passed &= report(engine, f"chat template, {name}", rendered, cases["inputs"], exact=True)
    return passed


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    if sys.argv[1] == "export":
        export(folder)
    else:
        sys.exit(not {"vllm": check_vllm, "transformers": check_transformers}[sys.argv[1]](folder))
