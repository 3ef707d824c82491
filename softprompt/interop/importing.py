"""Import an adapter or a prompt of another program as a folder that `load_prompt` reads."""

from pathlib import Path

from softprompt.backbones.loading import Base
from softprompt.data.task import make_task
from softprompt.errors import UserError
from softprompt.experiment.methods import method_class
from softprompt.experiment.schema import Experiment, TemplateSettings
from softprompt.interop.export import make_folder
from softprompt.interop.peft_import import import_adapter, import_array
from softprompt.methods.saved import save_prompt


def import_prompt(
    source: Path, folder: Path, base: Base, experiment: Experiment | None = None
) -> None:
    """Convert a `peft` adapter, or a prompt of google-research/prompt-tuning.

    Args:
      source: the folder of an adapter, or a `.npy` file.
      folder: a folder that does not exist or is empty.
      base: the base model that the adapter was trained on.
      experiment: gives the template and the verbalizer; by default the input is the text alone.

    Raises:
      UserError: if the source is damaged or of an unsupported kind, does not fit the base model,
        or does not fit the experiment.
    """
    if experiment and (experiment.shots or method_class(experiment.method).tasks(experiment)):
        raise UserError(f"experiment {experiment.name}: an import supports neither shots nor tasks")
    read = import_array if source.suffix == ".npy" else import_adapter
    name, arrays, description = read(source, base)
    method = method_class(name)
    shapes = {key: array.shape for key, array in arrays.items()}
    virtual, before = method.saved_virtual_tokens(shapes)
    template = experiment.template if experiment else TemplateSettings(input="{text}")
    try:
        task = make_task(
            base,
            template,
            experiment.verbalizer if experiment else None,
            virtual_tokens=virtual,
            prefix_length=before,
        )
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    make_folder(folder)
    folder.rmdir()  # `save_prompt` creates it, complete or not at all
    save_prompt(
        folder,
        method.load(arrays, description, task.opening),
        base,
        task,
        experiment=experiment.name if experiment else source.stem,
        scoring=experiment.scoring if experiment else None,
        generation=experiment.generation if experiment else None,
    )
