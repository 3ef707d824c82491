"""Chat templates: conversations as text, rendered with limits because templates are programs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from softprompt.errors import UserError
from softprompt.files.confined import ConfinedProcess
from softprompt.files.reading import MEBIBYTE

RENDERING_MEMORY = 1024 * MEBIBYTE
"""The most memory for the process that renders a chat template."""

RENDERING_SECONDS = 5
"""The most CPU time for one conversation."""

_WORKER = Path(__file__).with_name("chat_worker.py")


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
        template = tokenizer.chat_template
        if isinstance(template, Mapping):  # templates by name
            template = template.get("default")
        if not isinstance(template, str):
            raise UserError("the base model has no chat template")
        self._template, self._special = template, tokenizer.special_tokens_map
        self._where = f"the chat template of {tokenizer.name_or_path or 'the base model'}"
        self._process = ConfinedProcess(_WORKER, RENDERING_MEMORY, RENDERING_SECONDS)

    def close(self) -> None:
        """End the process."""
        self._process.close()

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return a conversation as text that ends where the answer begins.

        Args:
          messages: the turns, with `role` and `content`.

        Raises:
          UserError: if the template fails, or needs too much time or memory.
        """
        variables = {
            **self._special,
            "messages": [dict(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
        }
        request = {"template": self._template, "variables": variables}
        return str(self._process.ask(request, self._where))
