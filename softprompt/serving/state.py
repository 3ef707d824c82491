"""The state that all parts of the HTTP server share, and the records of requests."""

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

from softprompt.serving.errors import ApiError
from softprompt.serving.jobs import Update
from softprompt.serving.metrics import Metrics
from softprompt.serving.prompts import ServedPrompt
from softprompt.serving.service import Service
from softprompt.serving.token_texts import TokenTexts

if TYPE_CHECKING:
    from softprompt.serving.watch import Folders


@dataclasses.dataclass(frozen=True)
class Options:
    """The settings of the HTTP server.

    Attributes:
      api_key: the key of requests; None if they need no key.
      admin_key: the key to load and remove prompts; None if this is disabled.
      prompts_dir: the folder with the prompts to serve, or None.
      max_body_bytes: the maximum size of a request's body.
      timeout: after how many seconds a request fails.
      drain_seconds: how long running requests may take after SIGTERM.
      cors_origins: the origins of web pages that may use the server.
    """

    api_key: str | None = None
    admin_key: str | None = None
    prompts_dir: Path | None = None
    max_body_bytes: int = 2**20
    timeout: float = 600
    drain_seconds: float = 30
    cors_origins: tuple[str, ...] = ()


class State:
    """The state of the server.

    Args:
      service: runs requests.
      options: the settings.

    Attributes:
      is_ready: whether all programs are compiled and all prompts loaded.
      is_draining: whether the server is stopping.
      folders: the prompts of `prompts_dir`; None without it.
    """

    def __init__(self, service: Service, options: Options):
        self.service, self.options = service, options
        self.is_ready = self.is_draining = False
        self.metrics = Metrics(service)
        self.texts = TokenTexts(service.base.tokenizer)
        self.folders: Folders | None = None

    def prompt(self, name: str, account: "Account") -> ServedPrompt:
        """Return a prompt by its name.

        Raises:
          ApiError: if the prompt does not exist, or the server is not ready.
        """
        self.require_ready()
        prompt = self.service.prompts.get(name)
        if prompt is None:
            raise ApiError(404, f"the model {name!r} does not exist", "model_not_found", "model")
        account.model = name
        return prompt

    def require_ready(self) -> None:
        """Require that requests can be answered.

        Raises:
          ApiError: if they cannot.
        """
        if not self.is_ready:
            raise ApiError(503, "the server is compiling its programs", "not_ready")


class Account:
    """The record of a request, for the log and the metrics.

    Args:
      metrics: are told about the tokens.
      id: the number of the request.

    Attributes:
      begin: when it arrived, on the clock of `time.monotonic`.
      model: the name of the prompt; None if it is not known.
      status: the HTTP status; None as long as there is none.
      read: the number of tokens of its inputs.
      generated: the number of tokens of its answers.
    """

    def __init__(self, metrics: Metrics, id: str):
        self._metrics, self.id = metrics, id
        self.begin = time.monotonic()
        self.model: str | None = None
        self.status: int | None = None
        self.read = self.generated = 0
        self._first: dict[int, float] = {}
        self._counts: dict[int, int] = {}

    @property
    def seconds(self) -> float:
        """The time since the request arrived."""
        return time.monotonic() - self.begin

    def began(self, tokens: int) -> None:
        """Record that inputs with this number of tokens wait for answers."""
        self.read += tokens
        self._metrics.input_tokens.labels(self.model).inc(tokens)

    def received(self, index: int, update: Update) -> None:
        """Record an update of an answer."""
        now, count = time.monotonic(), len(update.tokens)
        self.generated += count
        self._metrics.generated_tokens.labels(self.model).inc(count)
        if index not in self._first:
            self._first[index], self._counts[index] = now, 0
            self._metrics.first_token_seconds.labels(self.model).observe(now - self.begin)
            return
        self._counts[index] += count
        if update.finish is not None and self._counts[index]:
            each = (now - self._first[index]) / self._counts[index]
            self._metrics.token_seconds.labels(self.model).observe(each)
