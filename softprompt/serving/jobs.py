"""Jobs of the scheduler, and the updates that it reports about them.

Axis letters: T tokens of an input.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from softprompt.experiment.schema import GenerationSettings
from softprompt.generation.slots import Scores
from softprompt.serving.bank import Stored


@dataclasses.dataclass(frozen=True)
class ScoredToken:
    """A token with its log-probability.

    Attributes:
      id: the id.
      score: its log-probability in nats, before temperature and penalties; None if it was not
        requested, or if the token is the first one.
      top: the most likely ids with their log-probabilities, the most likely first.
    """

    id: int
    score: float | None = None
    top: Sequence[tuple[int, float]] = ()


@dataclasses.dataclass(frozen=True)
class Update:
    """New results of a job.

    Attributes:
      text: the text that became final.
      tokens: the tokens that were generated.
      input: the scored tokens of the input, if the job asks for them. Only in the first update.
      finish: why the answer ended: "stop" at an end-of-text token or a stop text, "length" at the
        limit; None if it continues.
      error: the reason why the job failed, or None. An update with an error is the last one.
    """

    text: str = ""
    tokens: Sequence[ScoredToken] = ()
    input: Sequence[ScoredToken] = ()
    finish: str | None = None
    error: Exception | None = None

    @property
    def is_last(self) -> bool:
        """Whether this is the last update of the job."""
        return self.finish is not None or self.error is not None


@dataclasses.dataclass(eq=False)
class Job:
    """An input to continue.

    Attributes:
      prompt: the name of the prompt, for metrics.
      prefix: the prefix before the input, or None. The bank counts it as used until the job
        has its slot.
      tokens: `[T]`, the ids of the input, at least one.
      settings: the generation settings. Beams and samples have no effect.
      seed: the seed of the random key.
      deliver: is called with each update, in the thread of the scheduler. It must not wait.
      top: the number of most likely tokens to report with each token; None for no scores.
      score_input: whether to also score the tokens of the input.
    """

    prompt: str
    prefix: Stored | None
    tokens: Sequence[int]
    settings: GenerationSettings
    seed: int
    deliver: Callable[[Update], None]
    top: int | None = None
    score_input: bool = False
    cancelled: bool = False

    def cancel(self) -> None:
        """Ask the scheduler to drop the job. Its slot is free after the current call."""
        self.cancelled = True


def scored_tokens(
    ids: Sequence[int], scores: Scores, where: int | slice, top: int | None
) -> list[ScoredToken]:
    """Return tokens with their scores.

    Args:
      ids: T ids.
      scores: `[...]`.
      where: selects the scores of the ids: one score, or at least T.
      top: see `Job`.
    """
    if top is None:
        return [ScoredToken(token) for token in ids]
    chosen, best, best_ids = (np.atleast_1d(np.asarray(array)[where]) for array in scores)
    best, best_ids = best.reshape(-1, best.shape[-1]), best_ids.reshape(-1, best.shape[-1])
    return [
        ScoredToken(
            token,
            float(chosen[i]),
            list(zip(best_ids[i, :top].tolist(), best[i, :top].tolist(), strict=True)),
        )
        for i, token in enumerate(ids)
    ]
