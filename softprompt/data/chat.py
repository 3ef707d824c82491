"""Chat templates: conversations as text, rendered with limits because templates are programs."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from softprompt.errors import UserError
from softprompt.files.confined import ConfinedProcess
from softprompt.files.reading import MEBIBYTE

RENDERING_MEMORY = 1024 * MEBIBYTE
"""The most memory for the process that renders a chat template."""

RENDERING_SECONDS = 5
"""The most CPU time for one request to that process."""

Messages = Sequence[Mapping[str, str]]
"""The turns of a conversation, with `role` and `content`."""

_WORKER = Path(__file__).with_name("chat_worker.py")


class Rendered(NamedTuple):
    """A conversation as text.

    Attributes:
      text: the text.
      answers: start and stop of each answer in the text, with the token that ends it.
    """

    text: str
    answers: Sequence[tuple[int, int]]


class ChatRenderer:
    """Renders conversations with the chat template of a tokenizer.

    The template runs in a process of its own, which starts with the first conversation. Close
    it after use, for example with `contextlib.closing`.

    Args:
      tokenizer: the base model's.

    Raises:
      UserError: if the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._template = require_chat_template(tokenizer)
        self._special = tokenizer.special_tokens_map
        added = tokenizer.added_tokens_decoder.values()
        self._tokens = [token.content for token in added if token.content.strip()]
        self._where = f"the chat template of {tokenizer.name_or_path or 'the base model'}"
        self._process = ConfinedProcess(_WORKER, RENDERING_MEMORY, RENDERING_SECONDS)
        self._ending: tuple[str, int] | None = None

    def close(self) -> None:
        """End the process."""
        self._process.close()

    def render(self, messages: Messages) -> str:
        """Return a conversation as text that ends where the answer begins.

        Raises:
          UserError: if the template fails, or needs too much time or memory.
        """
        (text,) = self._ask([messages], add_generation_prompt=True)
        return str(text)

    def render_answers(self, conversations: Sequence[Messages]) -> list[Rendered]:
        """Return conversations as text, with the places of their answers.

        A template that has `{% generation %}` marks the answers itself, and this function equals
        `apply_chat_template(..., return_assistant_tokens_mask=True)` in transformers. With other
        templates, an answer is what follows the generation prompt, up to and including the first
        special token after its content.

        Args:
          conversations: each ends with a turn of the assistant.

        Raises:
          UserError: see `render`, and if the answers cannot be separated from the rest.
        """
        return [self._placed(*each) for each in self._ask(conversations, answers=True)]

    def _placed(self, text: str, spans: Sequence[tuple[int, int]], marked: bool) -> Rendered:
        answers = [(start, stop) for start, stop in spans]
        if not marked:
            ending, kept = self.turn_ending()
            if not all(text[:stop].endswith(ending) for _, stop in answers):
                raise UserError(
                    f"{self._where}: it does not end every answer with {ending!r}, so that the "
                    "answers cannot be separated exactly"
                )
            answers = [(start, stop - len(ending) + kept) for start, stop in answers]
        if not answers or any(start < 1 or stop <= start for start, stop in answers):
            raise UserError(f"{self._where}: it writes no answer, or nothing before it")
        return Rendered(text, answers)

    def turn_ending(self) -> tuple[str, int]:
        """Return the text after the content of an answer, and how much of it the model writes.

        Raises:
          UserError: see `render`, and if the template leaves out or repeats the answer.
        """
        if self._ending is None:
            # A private-use character is an answer that no template changes.
            mark = "\U000f0000"
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
            (text,) = self._ask([turns])
            if text.count(mark) != 1:
                raise UserError(f"{self._where}: it leaves out or repeats an answer")
            ending = text.partition(mark)[2]
            found = [(ending.find(t), -len(t)) for t in self._tokens if t in ending]
            place, size = min(found, default=(0, 0))
            self._ending = ending, place - size
        return self._ending

    def _ask(
        self,
        conversations: Sequence[Messages],
        *,
        add_generation_prompt: bool = False,
        answers: bool = False,
    ) -> list[Any]:
        variables = {
            **self._special,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        request = {
            "template": self._template,
            "conversations": [[dict(turn) for turn in turns] for turns in conversations],
            "variables": variables,
            "answers": answers,
        }
        return self._process.ask(request, self._where)


def require_chat_template(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the chat template of a tokenizer.

    Raises:
      UserError: if it has none.
    """
    template = tokenizer.chat_template
    if isinstance(template, Mapping):  # templates by name
        template = template.get("default")
    if not isinstance(template, str):
        raise UserError("the base model has no chat template")
    return template


def turn_end(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the text that the model writes after the content of an answer, such as `<|eot_id|>`.

    Raises:
      UserError: see `ChatRenderer.turn_ending`.
    """
    with contextlib.closing(ChatRenderer(tokenizer)) as renderer:
        ending, kept = renderer.turn_ending()
    return ending[:kept].strip()
