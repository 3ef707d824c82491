"""The model card of an export: a README.md with metadata for the Hugging Face Hub.

Names, templates and label texts may hold any character. They are written so that they cannot end
the metadata, a code block or a line of the card.
"""

import math
import re
from collections.abc import Mapping

from softprompt.data.task import Task
from softprompt.data.template import compile_template
from softprompt.experiment.templates import filled_in, template_fields
from softprompt.inference.prompt import TrainedPrompt
from softprompt.interop import engines
from softprompt.interop.embeds import EMBEDS_FILE
from softprompt.interop.gguf_export import GGUF_FILE
from softprompt.interop.markdown import block, code, plain, quoted
from softprompt.interop.written import (
    example_input,
    example_of,
    rest_of_input,
    written_input,
)

_ABOUT_LABELS = (
    "The validation metrics were measured with the most probable label. An engine that generates "
    "text can also write something else."
)


def adapter_card(prompt: TrainedPrompt) -> str:
    """Return the card of a `peft` adapter."""
    task = prompt.task
    if prompt.method.adapter_holds_opening:
        pieces = rest_of_input(task)
    else:
        pieces = compile_template(
            task.template, task.demonstrations, task.base.tokenizer, virtual=False
        )
    written = written_input(pieces, prompt.base.tokenizer)
    return _card(prompt, written, "peft", {"peft": block(engines.peft_code(prompt), "python")})


def merged_card(prompt: TrainedPrompt, written: str) -> str:
    """Return the card of a merged model.

    Args:
      prompt: the exported prompt.
      written: the form of an input, as returned by `written_input`.
    """
    programs = {"transformers": block(engines.transformers_code(prompt, written), "python")}
    if not prompt.base.backbone.separate_targets:
        programs["vLLM"] = block(engines.vllm_code(prompt, written), "python")
    about = "It is part of this model, so any standard engine can run it."
    return _card(prompt, written, "transformers", programs, about)


def gguf_card(prompt: TrainedPrompt, written: str) -> str:
    """Return the card of a GGUF file. It takes the same arguments as `merged_card`."""
    programs = {"llama-cpp-python": block(engines.llama_cpp_code(prompt, written), "python")}
    if text := engines.modelfile(prompt, written):
        programs["Ollama"] = f"Save this as `Modelfile` in the folder:\n\n{block(text)}"
    about = f"It is part of `{GGUF_FILE}`, so llama.cpp and programs based on it can run it."
    return _card(prompt, written, "gguf", programs, about)


def embeds_card(prompt: TrainedPrompt, written: str) -> str:
    """Return the card of embeddings for vLLM.

    Args:
      prompt: the exported prompt.
      written: the form of the rest of an input, as returned by `export_embeds`.
    """
    programs = {"vLLM": block(engines.embeds_code(prompt, written), "python")}
    about = (
        f"`{EMBEDS_FILE}` contains the embeddings that every input begins with. Append the "
        "embeddings of the rest of the input."
    )
    return _card(prompt, written, "vllm", programs, about)


def _card(
    prompt: TrainedPrompt, written: str, library: str, programs: Mapping[str, str], about: str = ""
) -> str:
    """Return a card.

    Args:
      prompt: the exported prompt.
      written: the form of an input.
      library: the library that loads the export, for the metadata.
      programs: how to run the export, by the name of the engine.
      about: a sentence about the export.
    """
    sections = [
        f"{_metadata(prompt, library)}\n# {plain(prompt.description['experiment'])}",
        f"{_about(prompt)} {about}".rstrip(),
        *(f"## Use with {engine}\n\n{text}" for engine, text in programs.items()),
        _usage(prompt, written),
        "## Generation",
        _generation(prompt),
    ]
    return "\n\n".join(sections) + "\n"


def _metadata(prompt: TrainedPrompt, library: str) -> str:
    """Return the metadata that the hub reads, with the values on one line each."""
    about = prompt.description
    measured = {
        key: value
        for key, value in about["validation"].items()
        if key != "loss" and math.isfinite(value)
    }
    task = {"type": "text-classification" if prompt.task.verbalizer else "text-generation"}
    metrics = [{"type": key, "value": value} for key, value in measured.items()]
    result = {
        "task": task,
        "dataset": {"name": f"{about['experiment']}, validation", "type": about["experiment"]},
        "metrics": metrics,
    }
    metadata = {
        "base_model": prompt.base.hub_name,
        "library_name": library,
        "tags": ["softprompt", about["method"]],
        "metrics": list(measured) or None,
        "model-index": [{"name": about["experiment"], "results": [result]}] if metrics else None,
    }
    lines = [f"{key}: {quoted(value)}" for key, value in metadata.items() if value]
    return "\n".join(["---", *lines, "---", ""])


def _about(prompt: TrainedPrompt) -> str:
    about = prompt.description
    measured = ", ".join(f"{plain(k)} {v:.4f}" for k, v in about["validation"].items())
    return (
        f"Trained with softprompt {plain(about['versions']['softprompt'])} "
        f"({prompt.method.label}) on the base model {code(prompt.base.hub_name)}, whose license "
        f"applies. Validation: {measured or 'not measured'}."
    )


def _usage(prompt: TrainedPrompt, written: str) -> str:
    """Describe inputs and answers: the template, the form of an input, and a filled example."""
    template = prompt.task.template
    if template.messages:
        texts = {"A conversation, written by the base model's chat template": template.input}
    elif template.text:
        texts = {"Plain text, which the model continues": template.input}
    else:
        texts = {"Input": template.input, "Target": template.target}
    if template.system is not None:
        texts = {"System message": template.system, **texts}
    braces = " `{{` and `}}` stand for single braces." if re.search("{{|}}", written) else ""
    return "\n\n".join(
        [
            "## Template",
            *(f"{name}:\n\n{block(text)}" for name, text in texts.items()),
            "## Input",
            *(["This is the form of a single user message."] if template.messages else []),
            "Every input must look like this, with its fields filled in. Tokenize it without "
            f"adding special tokens, because they are written out.{braces}",
            block(written),
            "For example:",
            block(example_input(written)),
            "## Answer",
            _answer(prompt.task),
        ]
    )


def _answer(task: Task) -> str:
    """Describe what the model writes after an input."""
    target = task.template.target
    if task.template.messages:
        return "The model continues with the answer and the token that ends its turn."
    if task.template.text:
        return "The model continues the text, up to its end-of-text token."
    if not task.verbalizer:
        text = "The model continues with the answer and its end-of-text token. For example:"
        return f"{text}\n\n{block(filled_in(target, example_of(target)))}"
    (field,) = template_fields(target)
    lines = [
        f"- {code(label)}: {code(quoted(filled_in(target, {field: text})))}"
        for label, text in task.verbalizer.items()
    ]
    return "\n".join(["The model continues with the text of a label:", "", *lines])


def _generation(prompt: TrainedPrompt) -> str:
    """Describe the generation settings."""
    settings = engines.settings_of(prompt)
    if settings.beams > 1:
        how = f"beam search with {settings.beams} beams"
    elif settings.temperature is None:
        how = "greedy decoding"
    else:
        how = f"sampling at temperature {settings.temperature:g}"
    lines = [f"Decoding: {how}"]
    for name in ("top_k", "top_p", "min_p", "repetition_penalty"):
        if (value := getattr(settings, name)) is not None:
            lines.append(f"{name.replace('_', ' ').capitalize()}: {value:g}")
    lines.append(f"New tokens: at most {settings.max_new_tokens}")
    if settings.stop:
        lines.append(f"Stop texts: {', '.join(code(quoted(text)) for text in settings.stop)}")
    text = "\n".join(f"- {line}" for line in lines)
    if not prompt.task.labels:
        return text
    return f"{text}\n\n{_ABOUT_LABELS}"
