"""The service behind the HTTP server: one base model and its prompts."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from softprompt.backbones.loading import Base
from softprompt.data.examples import Example
from softprompt.errors import UserError
from softprompt.evaluation.scoring import normalized_scores
from softprompt.experiment.schema import GenerationSettings
from softprompt.generation.engine import sample_seed
from softprompt.inference.prompt import Prediction, predictions
from softprompt.runtime.progress import Progress, silent
from softprompt.serving.bank import Bank
from softprompt.serving.device import Device
from softprompt.serving.jobs import Job, Update
from softprompt.serving.prompts import Kind, Prompts, ServedPrompt
from softprompt.serving.scheduler import Scheduler
from softprompt.serving.scorer import Scored


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of a server.

    Attributes:
      slots: the number of requests that generate at the same time.
      tokens: the maximum tokens of a request: prefix, input and new tokens.
      bank_tokens: the maximum tokens of all prefixes together.
      waiting: the maximum number of requests that wait for a slot.
    """

    slots: int = 16
    tokens: int = 1024
    bank_tokens: int = 4096
    waiting: int = 256


class TooLong(UserError):
    """A request has more tokens than the server allows."""


class Service:
    """Runs requests for a base model and its prompts.

    Args:
      base: the base model, which must be causal.
      name: the name of the base model in requests.
      limits: the limits.

    Raises:
      UserError: if the base model is an encoder-decoder or has a shorter context window.
    """

    def __init__(self, base: Base, name: str, limits: Limits):
        backbone = base.backbone
        if backbone.separate_targets:
            raise UserError(f"base {base.name!r} is an encoder-decoder, which cannot be served")
        if base.tokenizer.eos_token_id is None:
            raise UserError("the base model's tokenizer has no end-of-text token to stop at")
        if limits.tokens > backbone.arch.context_length:
            raise UserError(
                f"--max-tokens {limits.tokens}: the context window of the base model has only "
                f"{backbone.arch.context_length} tokens"
            )
        self.base, self.name, self.limits = base, name, limits
        self._device = Device(backbone, limits.slots, limits.tokens, limits.bank_tokens)
        self.bank = Bank(limits.bank_tokens)
        self.scheduler = Scheduler(self._device, self.bank, base.tokenizer, limits.waiting)
        self.prompts: Prompts

    def start(self, *, labels: bool, progress: Progress = silent) -> None:
        """Compile all programs and start to run requests.

        Args:
          labels: whether prompts with labels will be loaded.
          progress: shows how many programs are compiled.
        """
        self._device.compile(labels=labels, progress=progress)
        self.scheduler.start()
        self.prompts = Prompts(self.name, self.base, self.scheduler)

    def stop(self, *, drain: bool) -> None:
        """Stop. With `drain`, finish all requests first; otherwise they fail."""
        self.scheduler.stop(drain=drain)
        self.prompts.close()

    def submit(
        self,
        prompt: ServedPrompt,
        kind: Kind,
        tokens: Sequence[int],
        settings: GenerationSettings,
        deliver: Callable[[Update], None],
        *,
        sample: int = 0,
        top: int | None = None,
        score_input: bool = False,
    ) -> Job:
        """Continue an input.

        Args:
          prompt: the prompt.
          kind: the template with which the input was encoded.
          tokens: the ids of the input, at least one.
          settings: the generation settings.
          deliver: receives the updates, see `Job`.
          sample: the number of the sample, which changes the seed.
          top, score_input: see `Job`.

        Raises:
          UserError: if the input has no tokens.
          TooLong: if the prefix, the input and the new tokens exceed the limit.
          Busy: if too many requests wait.
          Removed: if the prompt has been removed.
        """
        if not tokens:
            raise UserError("the input has no tokens")
        prefix = prompt.reading(kind).prefix
        total = prefix.length + len(tokens) + settings.max_new_tokens
        if total > self.limits.tokens:
            raise TooLong(
                f"this model's maximum context length is {self.limits.tokens} tokens, but the "
                f"request needs {total}: {prefix.length} in the prefix, {len(tokens)} in the input "
                f"and {settings.max_new_tokens} new tokens"
            )
        job = Job(
            prompt=prompt.name,
            prefix=prefix,
            tokens=tokens,
            settings=settings,
            seed=sample_seed(tokens, settings.seed, sample),
            deliver=deliver,
            top=top,
            score_input=score_input,
        )
        self.scheduler.submit(job)
        return job

    def score(self, prompt: ServedPrompt, examples: Sequence[Example]) -> list[Scored]:
        """Score the labels of encoded inputs. `predict` waits for the results.

        Raises:
          Busy: if too many inputs wait.
          Removed: if the prompt has been removed.
          UserError: if an input is too long.
        """
        return self.scheduler.score(prompt.reading("own").prefix, examples)

    def predict(self, prompt: ServedPrompt, scored: Sequence[Scored]) -> list[Prediction]:
        """Wait for scores, and return the label of each input, as `TrainedPrompt.classify` does."""
        scores = np.stack([each.result() for each in scored])
        scoring, candidates = prompt.scoring, prompt.candidates
        if prompt.bias is not None:
            scores = scores - prompt.bias
        if scoring.normalize:
            scores = normalized_scores(scores, candidates)
        return predictions(scores, prompt.task.labels)
