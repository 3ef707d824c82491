"""The objective that an experiment asks for."""

from collections.abc import Sequence

from softprompt.errors import UserError
from softprompt.experiment.objective_settings import ObjectiveSettings
from softprompt.objectives.cross_entropy import CrossEntropy
from softprompt.objectives.distillation import Distillation
from softprompt.objectives.model import Objective
from softprompt.objectives.preference import Preference


def objective_of(settings: ObjectiveSettings, opening: Sequence[int]) -> Objective:
    """Return the objective of an experiment. Equal arguments give equal objectives.

    Args:
      settings: the section `objective`.
      opening: the ids that every row begins with. Virtual tokens, which are negative, are left out.

    Raises:
      UserError: if the objective is custom, because only Python code can pass it.
    """
    if settings.custom:
        raise UserError(
            "objective.custom: the loss of this experiment is Python code; pass it in Python: "
            "train(..., objective=...)"
        )
    if settings.name == "preference":
        assert settings.beta is not None  # the section fills it in
        text = tuple(int(token) for token in opening if token >= 0)
        return Preference(settings.loss, settings.beta, text)
    if settings.name == "distill":
        return Distillation(settings.temperature)
    return CrossEntropy(settings.label_smoothing)
