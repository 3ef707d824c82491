"""The prompt of a run's best step, in the folder `prompt/` of the run."""

from pathlib import Path
from typing import Any

from flax import nnx

from softprompt.errors import UserError
from softprompt.evaluation.scoring import prepare_model
from softprompt.experiment.schema import Experiment
from softprompt.inference.prompt import load_prompt
from softprompt.methods.saved import SavedPrompt, read_description, save_prompt
from softprompt.objectives.model import Model
from softprompt.parallel.hosts import result_of_main
from softprompt.storage.checkpoints import Checkpoints
from softprompt.training.preparation import Prepared
from softprompt.training.state import RunState, TrainState


class BestPrompt:
    """Saves and loads the best prompt of a run.

    Args:
      experiment: the experiment of the run.
      folder: the run folder.
      prepared: the base model and the task.
      state: the arrays of the run. A checkpoint has arrays of the same shapes.
    """

    def __init__(self, experiment: Experiment, folder: Path, prepared: Prepared, state: TrainState):
        self._experiment, self._folder = experiment, folder / "prompt"
        self._prepared, self._state = prepared, state

    @property
    def step(self) -> int:
        """The step of the saved prompt; -1 if there is none or it is damaged."""
        try:
            return read_description(self._folder)["step"]
        except UserError:
            return -1

    def save(self, trainable: nnx.State, run: RunState) -> None:
        """Save the trainable state of the best step."""
        method, backbone, _ = self._state.unpadded_model(trainable)
        save_prompt(
            self._folder,
            method.folded(),
            self._prepared.base,
            self._prepared.task,
            backbone=backbone,
            experiment=self._experiment.name,
            step=run.best_step,
            validation=run.best_metrics,
            scoring=self._experiment.scoring,
            generation=self._experiment.generation,
        )

    def load(self, run: RunState, checkpoints: Checkpoints) -> tuple[Model, Any, Any]:
        """Load the best prompt. If it is missing or damaged, write it from its checkpoint first.

        Returns:
          The model, the adapted backbone to run, and its prefix.
        """
        base, task = self._prepared.base, self._prepared.task
        teacher = self._prepared.teacher
        if result_of_main(lambda: self.step) != run.best_step:
            trainable, _ = checkpoints.load(run.best_step, self._state.saved_shapes())
            self.save(trainable, run)
        if self._state.padded_length is None:
            trained = load_prompt(self._folder, base)
            return Model(trained.method, base.backbone, teacher), trained.backbone, trained.prefix
        method, _ = SavedPrompt.read(self._folder).method(base, task.opening)
        method = method.padded(self._state.padded_length)
        return Model(method, base.backbone, teacher), *prepare_model(method, base.backbone)
