"""From another program's prompt or adapter to a folder that `load_prompt` reads."""

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
    """Save a `peft` adapter, or a prompt of google-research/prompt-tuning, as our own.

    Args:
      source: an adapter's folder, or a `.npy` file.
      folder: to make, or an empty one.
      base: the base model that it was trained on, which its file does not hold.
      experiment: says template and verbalizer; by default the input is the text alone.

    Raises:
      UserError: if the source is damaged, of another kind, or does not fit the base model,
        or the experiment asks for what an adapter does not have.
    """
    if experiment and (experiment.shots or experiment.prompt.tasks):
        raise UserError(f"experiment {experiment.name}: shots and tasks cannot be imported to")
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
    folder.rmdir()  # it is made anew, whole or not at all
    save_prompt(
        folder,
        method.load(arrays, description, task.opening),
        base,
        task,
        experiment=experiment.name if experiment else source.stem,
        scoring=experiment.scoring if experiment else None,
        generation=experiment.generation if experiment else None,
    )
