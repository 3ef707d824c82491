"""Seed prompts of self-study, and how questions and answers are read from the model's texts.

The five kinds come from Cartridges (Eyuboglu et al. 2025, arXiv:2506.06266, section 4). The texts
are our own. The model continues a list of questions, so that even a small model without a chat
template can write them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class SeedPrompt(NamedTuple):
    """What the model is asked to do after it has read a chunk of a document.

    Attributes:
      text: the heading of a list of questions.
      begin: the first words of the question. The model continues them.
      end: the mark that ends the question.
    """

    text: str
    begin: str
    end: str


_REQUEST, _QUESTION = ".", "?"

_TASKS: Mapping[str, tuple[str, Mapping[str, Sequence[str]]]] = {
    "structuring": (
        "Requests to present facts from this document as lists, tables and JSON:",
        {
            _REQUEST: [
                "List all the",
                "Make a table of the",
                "Write a JSON object with the",
                "List the names of the",
                "List in order the",
                "Make a table that shows who",
            ]
        },
    ),
    "summarization": (
        "Requests to summarize parts of this document:",
        {
            _REQUEST: [
                "Summarize what the document says about the",
                "Explain in two sentences why the",
                "Give a short overview of the",
                "Summarize the reasons for the",
                "Describe briefly how the",
            ]
        },
    ),
    "question": (
        "Questions about facts in this document:",
        {
            _QUESTION: [
                "What is the",
                "Which",
                "Who",
                "When",
                "Why",
                "How many",
                "Where",
                "What does",
                "What happens",
            ]
        },
    ),
    "use_case": (
        "Questions of people who need this document for practical work:",
        {
            _QUESTION: [
                "How can I",
                "What should I do if",
                "Which steps are needed to",
                "Do I have to",
                "How do I find out",
                "Can I",
            ]
        },
    ),
    "creative": (
        "Creative tasks about the subject of this document:",
        {
            _REQUEST: [
                "Write a short story about a",
                "Write a poem about the",
                "Explain to a child what the",
                "Invent a slogan for the",
            ],
            _QUESTION: ["What would happen if the", "What would a critic say about the"],
        },
    ),
}

SEED_PROMPTS: Mapping[str, Sequence[SeedPrompt]] = {
    kind: [SeedPrompt(text, begin, end) for end, texts in begins.items() for begin in texts]
    for kind, (text, begins) in _TASKS.items()
}
"""The seed prompts of each kind."""

KINDS = list(SEED_PROMPTS)

_FEWEST_WORDS, _MOST_WORDS = 4, 40
_FEWEST_TOPICS = 1
_REPEATED_WORDS = 8


def question_in(text: str, prompt: SeedPrompt, chunk: str) -> str | None:
    """Return the question that a seed prompt and the model wrote; None if it is not usable.

    A usable question has 4 to 40 words. At least one word that the model wrote occurs in the chunk
    but not in the seed prompt, and has at least five letters, a capital letter or a digit.

    Args:
      text: what the model wrote, up to the end of the first sentence.
      prompt: the seed prompt.
      chunk: the chunk of the document that the question is about.
    """
    continued = text.rstrip(" .?!:;,\"'*")
    if not _FEWEST_WORDS <= len(_words(prompt.begin + continued)) <= _MOST_WORDS:
        return None
    topics = {*_topics(continued)} & {*_topics(chunk)} - {*_topics(prompt.text)}
    return prompt.begin + continued + prompt.end if len(topics) >= _FEWEST_TOPICS else None


def answer_in(text: str) -> str:
    """Return an answer, cut off where it repeats eight words in a row, as small models often do.

    The answer is empty if the text has no letters or digits.
    """
    words = list(re.finditer(r"\S+", text))
    seen = set()
    for i in range(len(words) - _REPEATED_WORDS + 1):
        run = tuple(word[0] for word in words[i : i + _REPEATED_WORDS])
        if run in seen:
            text = text[: words[i].start()]
            break
        seen.add(run)
    return text.strip() if _words(text) else ""


def same_question(question: str) -> str:
    """Return a key that is equal for questions that differ only in case and punctuation."""
    return " ".join(_words(question.casefold()))


def _topics(text: str) -> list[str]:
    """Return the words that can name a topic."""
    return [w.casefold() for w in _words(text) if len(w) > 4 or w != w.lower() or not w.isalpha()]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)
