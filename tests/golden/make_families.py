"""Make small random models of every supported family, with results of transformers and peft.

Needs torch, transformers and peft, in a separate environment. The tests need only the files that
this script writes. Without VARIANT, it makes all variants:

    python tests/golden/make_families.py [VARIANT ...]

The script writes a folder in families/ for every variant, with config.json and model.safetensors.
golden.npz contains the results of the model after loading:

    tokens, lengths          a right-padded batch
    targets, target_lengths  only for T5, whose logits are at the targets
    logits                   without a prompt
    prompt                   peft's virtual tokens, with the standard deviation of the embeddings
    prompted_logits          after the prompt, at the positions of the batch
    generated                greedy tokens after the prompt and each row, without cache or padding
    loss                     peft's loss of T5's targets, or of all real tokens except the first
    prompt_gradient          the gradient of this loss

Made with torch 2.13.0, transformers 5.23.0, peft 0.21.2.
"""

import copy
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from family_variants import DEFAULTS, FULL, SLIDING, VARIANTS

FAMILIES = Path(__file__).parent / "families"
LENGTHS = (9, 6, 1)  # of the rows of a batch
TARGET_LENGTHS = (4, 2, 1)  # of T5's targets
VIRTUAL_TOKENS = 5
NEW_TOKENS = 8
EAGER = dict(attn_implementation="eager", experts_implementation="eager")
MARGIN = 1e-3  # smallest lead of a generated token's logit over the second best
DISTINCT = 3  # smallest number of different tokens that are generated for a row

DTYPES = {"qwen2-tied": torch.bfloat16, "gpt_neox-quarter": torch.float16}  # others: float32
# Variants with a config.json of transformers 4, and the key of the type in their rope_scaling
OLD_FORM = {
    "llama-linear": "type",
    "llama-llama3": "rope_type",
    "qwen2-window": "type",
    "gemma-gelu": "type",
    "gemma2-capped": "type",
    "gemma3_text-old": "rope_type",
    "gemma3_text-pattern": "rope_type",
    "phi3-longrope-old": "type",
    "smollm3-nope": "type",
    "stablelm-biased": "type",
    "gpt_neox-quarter": "type",
    "qwen3_moe-plain": "type",
}
BARE = {"gpt2-plain"}  # tensor names lack "transformer.", as in gpt2 on the hub


def random_model(name: str, settings: dict) -> torch.nn.Module:
    family = name.split("-")[0]
    kind = type(transformers.AutoConfig.for_model(family))
    known = {*kind.__dataclass_fields__, *kind.attribute_map}
    values = {key: value for key, value in DEFAULTS.items() if key in known} | settings
    config = kind(**copy.deepcopy(values))  # it modifies its arguments
    model = auto_class(family).from_config(config, **EAGER)
    if family == "t5" and not settings.get("tie_word_embeddings", True):
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1:  # a norm or a bias
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:  # T5's residual stream starts from the unscaled embeddings
                parameter.normal_(std=1.0 if key == "shared.weight" else 0.3)
            parameter.copy_(parameter.to(dtype_of(name)))
    return model.eval()


def dtype_of(name: str) -> torch.dtype:
    return DTYPES.get(name, torch.float32)


def auto_class(family: str) -> type:
    if family == "t5":
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForCausalLM


def write(name: str, settings: dict, model: torch.nn.Module) -> None:
    folder = FAMILIES / name
    (model.base_model if name in BARE else model).to(dtype_of(name)).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    written = json.loads((folder / "config.json").read_text())
    for key in ("scale_decoder_outputs", "dense_act_fn", "is_gated_act"):
        written.pop(key, None)  # T5's checkpoints on the hub do not have these keys
    written["architectures"] = [type(model).__name__]
    written |= {key: copy.deepcopy(settings[key]) for key in settings if key in written}
    if name in OLD_FORM:
        to_old_form(written, OLD_FORM[name])
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")


def to_old_form(config: dict, type_key: str) -> None:
    """Rewrite a config as transformers 4 would have written it."""
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    parameters = config.pop("rope_parameters")
    if FULL in parameters:
        config["rope_local_base_freq"] = parameters[SLIDING]["rope_theta"]
        config["sliding_window_pattern"] = config.pop("_sliding_window_pattern")
        parameters = parameters[FULL]
    if "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    neox = config["model_type"] == "gpt_neox"
    config["rotary_emb_base" if neox else "rope_theta"] = parameters.pop("rope_theta")
    if "partial_rotary_factor" in parameters:
        factor = parameters.pop("partial_rotary_factor")
        config["rotary_pct" if neox else "partial_rotary_factor"] = factor
    rope_type = parameters.pop("rope_type")
    scaling = {type_key: rope_type} | parameters
    config["rope_scaling"] = None if rope_type == "default" else scaling


def read(folder: Path) -> torch.nn.Module:
    kind = auto_class(transformers.AutoConfig.from_pretrained(folder).model_type)
    return kind.from_pretrained(folder, dtype=torch.float32, **EAGER).eval()


def random_rows(vocabulary: int, lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return right-padded rows of tokens, and which tokens are real."""
    tokens = torch.randint(3, vocabulary, (len(lengths), max(lengths)))
    real = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return tokens * real, real


@torch.no_grad()
def generate(model, prompt: torch.Tensor, row: torch.Tensor) -> tuple[list[int], float]:
    """Return the greedy continuation of a row after the prompt, and its smallest margin."""
    generated, margin = [], torch.inf
    for _ in range(NEW_TOKENS):
        if model.config.is_encoder_decoder:
            inputs, kwargs = row, dict(decoder_input_ids=torch.tensor([[0, *generated]]))
        else:
            inputs, kwargs = torch.cat([row, torch.tensor(generated, dtype=int)]), {}
        embeddings = torch.cat([prompt, model.get_input_embeddings()(inputs)])[None]
        logits = model(inputs_embeds=embeddings, use_cache=False, **kwargs).logits[0, -1]
        best = logits.topk(2)
        generated.append(best.indices[0].item())
        margin = min(margin, (best.values[0] - best.values[1]).item())
    return generated, margin


def reference(model) -> tuple[dict, float]:
    """Return the content of golden.npz, and the smallest margin of the generated tokens."""
    vocabulary = model.config.vocab_size
    tokens, real = random_rows(vocabulary, LENGTHS)
    results = dict(tokens=tokens, lengths=LENGTHS)
    if model.config.is_encoder_decoder:
        kind, before = "SEQ_2_SEQ_LM", 0
        targets, scored = random_rows(vocabulary, TARGET_LENGTHS)
        results |= dict(targets=targets, target_lengths=TARGET_LENGTHS)
    else:
        kind, before = "CAUSAL_LM", VIRTUAL_TOKENS
        targets, scored = tokens, real.clone()
        scored[:, 0] = False  # every real token but the first is a target
    batch = dict(
        input_ids=tokens,
        attention_mask=real.long(),
        labels=torch.where(scored, targets, -100),
    )
    with torch.no_grad():
        logits = model(**batch).logits
        spread = model.get_input_embeddings()(torch.arange(vocabulary)).std()

    tuned = peft.get_peft_model(
        model,
        peft.PromptTuningConfig(
            task_type=kind,
            num_virtual_tokens=VIRTUAL_TOKENS,
            prompt_tuning_init="RANDOM",
            num_transformer_submodules=1,  # for T5: only the encoder
        ),
    ).eval()
    prompt = tuned.prompt_encoder.default.embedding.weight
    prompt.data *= spread
    output = tuned(**batch)
    output.loss.backward()

    rows = [tokens[row, :length] for row, length in enumerate(LENGTHS)]
    generated, margins = zip(*(generate(model, prompt, row) for row in rows), strict=True)
    results |= dict(
        logits=logits,
        prompt=prompt.detach(),
        prompted_logits=output.logits.detach()[:, before:],
        generated=generated,
        loss=output.loss.item(),
        prompt_gradient=prompt.grad,
        by="peft",
    )
    return {key: np.asarray(value) for key, value in results.items()}, min(margins)


@torch.no_grad()
def some_logits(model) -> torch.Tensor:
    inputs = dict(input_ids=torch.arange(12)[None])
    if model.config.is_encoder_decoder:
        inputs |= dict(decoder_input_ids=torch.arange(9)[None])
    return model(**inputs).logits


def make(name: str) -> None:
    for attempt in itertools.count():
        torch.manual_seed(sum(map(ord, name)) + 10_000 * attempt)
        made = random_model(name, VARIANTS[name])
        expected = some_logits(made)
        write(name, VARIANTS[name], made)
        model = read(FAMILIES / name)
        torch.testing.assert_close(some_logits(model), expected)  # the files contain the same model
        results, margin = reference(model)
        distinct = min(len(set(row)) for row in results["generated"])
        if margin > MARGIN and distinct >= DISTINCT:
            np.savez_compressed(FAMILIES / name / "golden.npz", **results)
            print(f"{name}: attempt {attempt}, margin {margin:.1e}, {results['logits'].std():.2f}")
            return


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for variant in sys.argv[1:] or VARIANTS:
        make(variant)
