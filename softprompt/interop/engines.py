"""Programs that run an export: one block of code for each engine."""

import json
from collections.abc import Mapping
from typing import Any

from softprompt.data.template import label_ids
from softprompt.experiment.schema import GenerationSettings
from softprompt.inference.prompt import TrainedPrompt
from softprompt.interop.embeds import EMBEDS_FILE
from softprompt.interop.gguf_export import GGUF_FILE
from softprompt.interop.markdown import quoted
from softprompt.interop.written import example_of, written_parts

FOLDER = "path/to/this/folder"
"""The folder of an export, in the programs on its card."""


def settings_of(prompt: TrainedPrompt) -> GenerationSettings:
    """Return the settings with which an engine generates the answers of a prompt."""
    task = prompt.task
    settings = task.stopping(prompt.generation)
    if not task.verbalizer:
        return settings
    labels = label_ids(task.template, task.verbalizer, prompt.base.tokenizer, "verbalizer")
    return settings.model_copy(update={"max_new_tokens": max(map(len, labels))})


def filled_text(prompt: TrainedPrompt, written: str) -> str:
    """Return Python code that fills in the fields of an input."""
    values: dict[str, Any] = example_of(prompt.task.template.input)
    if "{record[" in prompt.task.template.input:
        values = {"record": values, **values}
    return f"{written!r}.format_map({values!r})"


def peft_code(prompt: TrainedPrompt) -> str:
    """Return a program that loads an adapter of `peft`."""
    model = prompt.base.backbone.auto_class
    return f"""\
from peft import PeftModel
from transformers import {model}

model = {model}.from_pretrained({quoted(prompt.base.hub_name)})
model = PeftModel.from_pretrained(model, "{FOLDER}")"""


def transformers_code(prompt: TrainedPrompt, written: str) -> str:
    """Return a program for transformers."""
    model, settings = prompt.base.backbone.auto_class, settings_of(prompt)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    options: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens}
    options["do_sample"] = settings.temperature is not None
    options |= _given(settings, {name: name for name in names})
    if settings.beams > 1:
        options |= {"num_beams": settings.beams, "length_penalty": settings.length_penalty}
    if settings.stop:
        options["stop_strings"] = settings.stop
    more = ", tokenizer=tokenizer" if settings.stop else ""
    begin = "" if prompt.base.backbone.separate_targets else "inputs.input_ids.shape[1]"
    return f"""\
from transformers import AutoTokenizer, {model}

tokenizer = AutoTokenizer.from_pretrained("{FOLDER}")
model = {model}.from_pretrained("{FOLDER}")
text = {filled_text(prompt, written)}
inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
output = model.generate(**inputs, {_arguments(options)}{more})
print(tokenizer.decode(output[0, {begin}:], skip_special_tokens=True))"""


def vllm_code(prompt: TrainedPrompt, written: str) -> str:
    """Return a program for vLLM."""
    return f"""\
from vllm import LLM, SamplingParams

llm = LLM("{FOLDER}", dtype="{prompt.base.compute.dtype}")
text = {filled_text(prompt, written)}
tokens = llm.get_tokenizer().encode(text, add_special_tokens=False)
output = llm.generate({{"prompt_token_ids": tokens}}, {_sampling_params(prompt)})
print(output[0].outputs[0].text)"""


def embeds_code(prompt: TrainedPrompt, written: str) -> str:
    """Return a program for vLLM with embeddings as inputs."""
    return f"""\
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM, SamplingParams

base, dtype = {quoted(prompt.base.hub_name)}, "{prompt.base.compute.dtype}"
tokenizer = AutoTokenizer.from_pretrained(base)
embed = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).get_input_embeddings()
opening = load_file("{FOLDER}/{EMBEDS_FILE}")["prompt_embeds"]
text = {filled_text(prompt, written)}
ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
with torch.no_grad():
    embeds = torch.cat([opening.to(embed.weight.dtype), embed(ids)])
llm = LLM(base, dtype=dtype, enable_prompt_embeds=True)
output = llm.generate({{"prompt_embeds": embeds}}, {_sampling_params(prompt)})
print(output[0].outputs[0].text)"""


def llama_cpp_code(prompt: TrainedPrompt, written: str) -> str:
    """Return a program for llama-cpp-python."""
    settings = settings_of(prompt)
    options: dict[str, Any] = {"max_tokens": settings.max_new_tokens}
    options |= {"temperature": settings.temperature or 0}
    options |= {"top_k": settings.top_k or 0, "top_p": settings.top_p or 1.0}
    options |= {"min_p": settings.min_p or 0.0}
    options |= {"repeat_penalty": settings.repetition_penalty or 1.0}
    if settings.stop:
        options["stop"] = settings.stop
    context = prompt.base.backbone.arch.context_length
    return f"""\
from llama_cpp import Llama

llm = Llama("{FOLDER}/{GGUF_FILE}", n_ctx={context})
text = {filled_text(prompt, written)}
output = llm.create_completion(text, {_arguments(options)})
print(output["choices"][0]["text"])"""


def modelfile(prompt: TrainedPrompt, written: str) -> str | None:
    """Return a Modelfile for Ollama; None if the input has several fields."""
    parts = written_parts(written)
    if parts.count(None) != 1:
        return None
    settings = settings_of(prompt)
    template = "".join("{{ .Prompt }}" if part is None else _go_text(part) for part in parts)
    values = {"temperature": settings.temperature or 0, "num_predict": settings.max_new_tokens}
    values |= _given(settings, {"top_k": "top_k", "top_p": "top_p", "min_p": "min_p"})
    values |= {"repeat_penalty": settings.repetition_penalty or 1.0}
    lines = [f"PARAMETER {name} {value}" for name, value in values.items()]
    lines += [f"PARAMETER stop {quoted(text)}" for text in settings.stop]
    return "\n".join([f"FROM ./{GGUF_FILE}", f'TEMPLATE """{template}"""', *lines])


def _go_text(text: str) -> str:
    """Return a text for a Go template, quoted if Go could read it as code."""
    if '"' not in text and "{" not in text:
        return text
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}"


def _sampling_params(prompt: TrainedPrompt) -> str:
    settings = settings_of(prompt)
    names = ("top_k", "top_p", "min_p", "repetition_penalty")
    options: dict[str, Any] = {"temperature": settings.temperature or 0}
    options["max_tokens"] = settings.max_new_tokens
    options |= _given(settings, {name: name for name in names})
    if settings.stop:
        options["stop"] = settings.stop
    return f"SamplingParams({_arguments(options)})"


def _given(settings: GenerationSettings, names: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings that are not null, under the names of an engine."""
    found = {theirs: getattr(settings, ours) for ours, theirs in names.items()}
    return {name: value for name, value in found.items() if value is not None}


def _arguments(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
