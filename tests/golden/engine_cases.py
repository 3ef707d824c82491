"""Exports and the tokens that softprompt generates with them, for checks in other engines.

`write_cases` runs in softprompt's environment. `read_cases` needs no packages.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

COUNT = 20  # inputs of each export
NEW_TOKENS = 16
REVIEWS = [
    "A joy from start to end.",
    "A dull, lifeless film.",
    "It's 2 hours long, and I wanted 3 more.",
    "I left after 20 minutes.",
    "The acting is superb; the plot isn't.",
    "Café scenes in Paris, naïve but charming.",
    "NOT worth the $15 ticket!!!",
    "A masterpiece :-)",
    "My kids loved it, and so did I.",
    "Flat jokes, flat faces, flat ending.",
    "Beautifully shot in Iceland.",
    "The sound was broken in row 7.",
    "She carries the whole film on her shoulders.",
    "An hour of car chases and nothing else.",
    "Funny, warm and a little sad.",
    "Why was this made?",
    "Better than the book, which is rare.",
    "The 1998 version had more heart.",
    "I have seen it four times.",
    "Forgettable.",
]


def small_texts(letters: str) -> list[str]:
    """Return inputs of two to six words of random letters."""
    import random

    chosen = random.Random(0)
    return [
        " ".join(
            "".join(chosen.choices(letters, k=chosen.randint(1, 7)))
            for _ in range(chosen.randint(2, 6))
        )
        for _ in range(COUNT)
    ]


def smollm2_prompt(base: Any, chat: bool = False) -> Any:
    """Return a prompt whose vectors are like the embeddings of an instruction."""
    import numpy as np
    from softprompt import SoftPrompt
    from softprompt.data.task import make_task
    from softprompt.experiment.schema import TemplateSettings
    from softprompt.inference.prompt import TrainedPrompt

    text = "Say whether the review of a film is positive or negative, in one word."
    ids = base.tokenizer(text, add_special_tokens=False).input_ids
    vectors = np.array(base.backbone.embedding(np.array(ids)))
    noise = np.random.default_rng(0).normal(size=vectors.shape)
    template = TemplateSettings(input="Review: {text}\nSentiment:", target="{answer}", chat=chat)
    task = make_task(base, template, None, virtual_tokens=len(ids))
    method = SoftPrompt((vectors + 0.02 * noise).astype(np.float32))
    return TrainedPrompt.from_method(method, base, task)


def write_cases(
    folder: Path, prompts: dict[str, tuple[Any, list[str]]], export: Callable[..., str]
) -> None:
    """Export prompts and write what softprompt generates.

    Args:
      folder: a new folder.
      prompts: each prompt with its inputs, by name.
      export: writes a prompt to a folder, and returns the form of an input.
    """
    from small_bases import greedy_tokens

    folder.mkdir(parents=True)
    cases = {}
    for name, (prompt, texts) in prompts.items():
        (folder / name).mkdir()
        written = export(prompt, folder / name)
        cases[name] = {
            "texts": texts,
            "inputs": [written.format(text=text) for text in texts],
            "tokens": greedy_tokens(prompt, texts, NEW_TOKENS),
            "end": prompt.base.tokenizer.eos_token_id,
        }
        print(f"exported {name}")
    (folder / "cases.json").write_text(json.dumps(cases))


def read_cases(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of each export, and its cases."""
    yield from json.loads((folder / "cases.json").read_text()).items()


def report(engine: str, name: str, found: list[Any], expected: list[Any], exact: bool) -> bool:
    """Print in how many cases the tokens agree, and return whether the check passed."""
    same = sum(one == other for one, other in zip(found, expected, strict=True))
    print(f"{engine}: {name}: {same} of {len(expected)} the same", flush=True)
    for one, other in zip(found, expected, strict=True):
        if exact and one != other:
            print(f"  {one}\n  instead of {other}")
    return same == len(expected) or not exact
