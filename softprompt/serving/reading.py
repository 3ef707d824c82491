"""Encode inputs of requests with a template as ids that follow a prefix in the bank."""

import contextlib
import threading
from typing import Any

import jax
import numpy as np
from flax import nnx

from softprompt.backbones.loading import Base
from softprompt.data.examples import Example
from softprompt.data.records import Record
from softprompt.data.task import Input, Task
from softprompt.errors import UserError
from softprompt.experiment.schema import GenerationSettings
from softprompt.methods.method import Method
from softprompt.serving.bank import Content, Stored
from softprompt.serving.scheduler import Removed


class Reading:
    """A task whose opening is in the bank. Close it after use.

    Args:
      task: encodes inputs.
      prefix: the opening, with everything that was learned.
    """

    def __init__(self, task: Task, prefix: Stored):
        self.task, self.prefix = task, prefix
        # Computed once, because it starts a process.
        self._stops = task.stopping(GenerationSettings()).stop
        self._lock = threading.Lock()  # the encoder of conversations is one process
        self._closed = False
        self._open = contextlib.ExitStack()
        self._encode = self._open.enter_context(task.encoder())

    def stopping(self, settings: GenerationSettings) -> GenerationSettings:
        """Return the settings with the token that ends an answer, as `Task.stopping` does."""
        more = [stop for stop in self._stops if stop not in settings.stop]
        return settings.model_copy(update={"stop": [*settings.stop, *more]}) if more else settings

    def close(self) -> None:
        """End the process that renders conversations, if there is one."""
        with self._lock:
            self._closed = True
            self._open.close()

    def example(self, input: Input, where: str) -> Example:
        """Encode an input.

        Args:
          input: a text, or fields by name.
          where: names the input in error messages.

        Raises:
          UserError: if it does not fit the template.
        """
        return self.of_record(self.task.record(input, where))

    def conversation(self, messages: Any) -> Example:
        """Encode a conversation.

        Args:
          messages: a list of objects with `role` and `content`.

        Raises:
          UserError: if the messages are malformed. A template without conversations reads only the
            content of one user message.
        """
        if field := self.task.template.messages:
            return self.of_record(Record({field: messages}, "request"))
        if len(messages) != 1 or messages[0]["role"] != "user":
            raise UserError(
                "messages: this prompt was trained on single inputs, so send exactly one user "
                "message"
            )
        return self.example(messages[0]["content"], "messages")

    def content_free(self, text: str) -> Example:
        """Encode a text without content, for calibration. It has the labels as candidates."""
        return self.task.content_free(text)

    def of_record(self, record: Record) -> Example:
        """Encode a record, without its answer.

        Raises:
          UserError: see `example`.
          Removed: if it was closed meanwhile.
        """
        with self._lock:
            if self._closed:  # the encoder would start its process again
                raise Removed
            return self._encode([record], False)[0]


def content_of(method: Method, task: Task, base: Base) -> Content:
    """Return the content from which the prefix of a method is computed.

    Args:
      method: holds everything learned in its prefix.
      task: the task that the method was loaded for.
      base: the base model.

    Raises:
      UserError: if the method changes the model, or virtual tokens are inside the inputs.
    """
    if not method.is_pure_prefix or None in task.pieces:
        reason = "virtual tokens are inside its inputs"
        if not method.is_pure_prefix:
            reason = f"method {method.name} changes the model"
        raise UserError(
            f"{reason}, so it cannot share the base model with other prompts; export it with "
            "--format merged and serve that model"
        )
    # On the host, because on the device each new length would compile programs.
    graph, state = nnx.split(method)
    on_host = nnx.merge(graph, jax.tree.map(np.asarray, state))
    arrays: Any = {"vectors": on_host.plain_vectors()}
    prefix = on_host.learned_prefix(base.backbone)
    if prefix is not None:
        arrays |= {"keys": prefix.keys, "values": prefix.values}
    return Content(tuple(task.opening), **arrays)
