"""`softprompt init`: write an experiment for a data file."""

import argparse
import os
import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt.cli.arguments import add_command
from softprompt.errors import UserError, shown

if TYPE_CHECKING:
    from softprompt.data.columns import Column
    from softprompt.data.guess import Guess
    from softprompt.data.records import Record

_SPLIT_NAMES = {
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
_SHARE = 0.1  # of the training data, for a split without a file
_ENOUGH = 1000  # records of such a split
_EVALUATED = 500  # validation records
_BATCH = 16
_PASSES = 3  # over the training data
_FEWEST_STEPS, _MOST_STEPS = 60, 400
_EVALUATIONS = 4
_UNEVEN = 3  # times as many records of one label as of another
_SHOWN_LABELS = 8
_RARE = 5  # records of a label
_LONG = 2000  # characters of an input
_CHARACTERS_PER_TOKEN = 2  # at least, in most languages
_MOST_NEW_TOKENS = 512
_WIDTH = 96  # of a comment


def add_to(subparsers: Any) -> None:
    """Declare the command and its arguments."""
    command = add_command(
        subparsers,
        "init",
        run,
        "write an experiment for a data file",
        """\
Reads the data, guesses the task from its fields, and writes an experiment into the current
folder, with a comment for each choice: template, labels, splits, metric and steps. Prints the
path of the experiment and the next command. Change the file where you know better.
Files for validation and test data are found by their names, such as train.csv, validation.csv
and test.csv. Otherwise they are shares of the training data.

examples:
  softprompt init tickets.csv
  softprompt init data/train.jsonl
  softprompt init 'data/*.parquet' --force""",
    )
    command.add_argument(
        "source",
        metavar="DATA",
        help="a .jsonl, .csv or .parquet file, a folder of such files, or a pattern",
    )
    command.add_argument(
        "--force", action="store_true", help="replace an experiment that already exists"
    )


def run(options: argparse.Namespace) -> None:
    """Write the experiment, and print its path and the next command.

    Raises:
      UserError: if the data cannot be read or shows no task, or the experiment exists already.
    """
    from softprompt.data.columns import columns_of
    from softprompt.data.guess import guess_task
    from softprompt.data.records import read_source
    from softprompt.data.splits import divide
    from softprompt.files.writing import write_errors, write_file

    path = Path(f"{_name(options.source)}.yaml")
    if os.path.lexists(path) and not options.force:
        raise UserError(f"{path}: exists already; use --force to replace it")
    files = {"train": options.source, **_other_files(options.source)}
    splits = {split: read_source(source) for split, source in files.items()}
    records = [record for part in splits.values() for record in part]
    guess = guess_task(columns_of(records), options.source)
    for column in (*guess.inputs, guess.target):
        _require_field(column, records, options.source)
    shares = _shares(files, splits["train"])
    sizes = {split: len(part) for split, part in splits.items()}
    if shares:  # an error if there are too few records
        sizes |= {split: len(part) for split, part in divide(splits["train"], shares, 0).items()}
    text = _experiment(files, shares, sizes, guess, path)
    with write_errors(path):
        write_file(path, text)
    print(path)
    print(f"next: softprompt train {shlex.quote(str(path))}")


def _name(source: str) -> str:
    """Return a name for the experiment: of the file, or of the folder if the file is `train`."""
    path = Path(os.path.abspath(source.removeprefix("hub:").partition("#")[0]))
    names = (re.sub(r"[^\w.-]+", "-", each.stem).strip("-.")[:50] for each in (path, *path.parents))
    return next((name for name in names if name not in ("", "train")), "experiment")


def _other_files(source: str) -> dict[str, str]:
    """Return the files of other splits, whose names have another word in the place of `train`."""
    folder, name = os.path.split(source)
    found = {}
    for split, words in _SPLIT_NAMES.items():
        paths = [os.path.join(folder, name.replace("train", word)) for word in words]
        existing = [path for path in paths if path != source and os.path.exists(path)]
        if existing:
            found[split] = existing[0]
    return found


def _shares(files: Mapping[str, str], train: "Sequence[Record]") -> dict[str, float]:
    """Return the share of the training data for each split that has no file."""
    share = min(_SHARE, float(f"{_ENOUGH / len(train):.1g}"))
    return {split: share for split in _SPLIT_NAMES if split not in files}


def _require_field(column: "Column", records: "Sequence[Record]", where: str) -> None:
    """Require that a template can have this field, and that all records have text in it."""
    if not column.name.isidentifier() or column.name == "prompt":
        raise UserError(
            f"{where}: a template cannot have a field with the name {shown(column.name)!r}; rename "
            f"it to {_plain_name(column.name)!r}, for example"
        )
    for record in records:
        record.text(column.name)


def _plain_name(name: str) -> str:
    plain = re.sub(r"\W+", "_", name).strip("_").lower()
    return plain if plain.isidentifier() and plain != "prompt" else f"field_{plain}"


def _experiment(
    files: Mapping[str, str],
    shares: Mapping[str, float],
    sizes: Mapping[str, int],
    guess: "Guess",
    path: Path,
) -> str:
    """Return the experiment as YAML with comments.

    Args:
      files: the data by split.
      shares: the share of the training data of each other split.
      sizes: the number of records by split.
      guess: the task.
      path: the file of the experiment.
    """
    from softprompt.experiment.yaml_values import dump_yaml

    why = "Validation data chooses the best prompt, and test data measures it at the end."
    if shares:
        why += (
            f" There is no file for {' and '.join(shares)}, so this share of the training data "
            "is held out. The seed chooses the records, and equal records stay together."
        )
    fields = ", ".join(shown(column.name) for column in (*guess.inputs, guess.target))
    parts = [
        _comment(
            f"Written by `softprompt init {shown(files['train'])}`, which used the fields "
            f"{fields}. Change what you know better, then run: softprompt train "
            f"{shlex.quote(str(path))}"
        ),
        _comment("The default base model. It is small enough for a laptop.")
        + "base: smollm2-135m-instruct\n",
        _comment(why) + dump_yaml({"data": {**files, **shares}}),
        _template(guess),
        *([_verbalizer(guess.target)] if guess.target.has_labels else []),
        _comment("More virtual tokens can learn more, and take longer to train.")
        + "prompt: {length: 20}\n",
        _comment("The learning rate rises in the first steps, which makes training more stable.")
        + "optimizer: {warmup_steps: 20}\n",
        *_training(sizes, guess),
    ]
    return "\n".join(parts)


def _template(guess: "Guess") -> str:
    from softprompt.experiment.yaml_values import dump_yaml

    lines = [f"{_title(column.name)}: {{{column.name}}}" for column in guess.inputs]
    text = "\\n".join([*lines, f"{_title(guess.target.name)}:"])
    why = f"The field {shown(guess.target.name)} {guess.reason}, so it is what the model predicts."
    if guess.target.has_labels:
        target = f"{{{guess.target.name}}}"
        why += " The input ends without a space, because the text of a label begins with one."
    else:
        target = f" {{{guess.target.name}}}"
        why += " The input ends without a space, because the target begins with one."
    if guess.left_out:
        names = ", ".join(shown(column.name) for column in guess.left_out)
        why += f" Some records have no text in these fields, so they are left out: {names}."
    section = f'template:\n  input: "{text}"\n' + _indented(dump_yaml({"target": target}))
    if sum(column.typical_length() for column in guess.inputs) > _LONG and guess.target.has_labels:
        why += (
            " Many inputs are long. They are truncated, because shorter rows train faster and "
            "need less memory."
        )
        section += "  max_tokens: 512\n"
    return _comment(why) + section


def _verbalizer(target: "Column") -> str:
    from softprompt.experiment.yaml_values import dump_yaml

    labels = sorted(target.values, key=lambda label: (len(label) if target.numeric else 0, label))
    why = "The text that the model produces for each label. Every label of the data is listed."
    if target.numeric:
        why += " The labels are numbers: words that say what they mean usually work better."
    rare = [shown(label) for label in labels if target.values[label] < _RARE]
    if rare:
        more = ", ..." if len(rare) > _SHOWN_LABELS else ""
        why += f" Few records have these labels: {', '.join(rare[:_SHOWN_LABELS])}{more}."
    return _comment(why) + dump_yaml({"verbalizer": {label: f" {label}" for label in labels}})


def _training(sizes: Mapping[str, int], guess: "Guess") -> list[str]:
    """Return the sections `training`, `evaluation` and `generation`."""
    count = sizes["train"]
    batch = min(_BATCH, 2 ** (count.bit_length() - 1))
    steps = min(_MOST_STEPS, max(_FEWEST_STEPS, _PASSES * count // batch))
    every = -(-steps // _EVALUATIONS)
    training = _comment(
        f"{steps} steps of {batch} examples read the {count:,} training records about "
        f"{steps * batch / count:.1f} times."
    )
    training += f"training: {{steps: {steps}, batch_size: {batch}}}\n"
    first = min(_EVALUATED, sizes["validation"])
    some, when = "", f"every: {every}"
    if first < sizes["validation"]:
        some = f" The first {first} validation records are used."
        when += f", examples: {first}"
    if guess.target.has_labels:
        counts = guess.target.values.values()
        if max(counts) >= _UNEVEN * min(counts):
            why = "Some labels are rare, so macro_f1 decides which prompt is best: it weighs all "
            why += "labels equally, and accuracy does not."
            metric = "metrics: [macro_f1], metric: macro_f1"
        else:
            why, metric = "The accuracy decides which prompt is best.", "metric: accuracy"
        evaluation = _comment(why + some) + f"evaluation: {{{when}, {metric}}}\n"
        return [training, evaluation]
    evaluation = _comment(
        "chrF decides which prompt is best. It compares the characters of generated and given "
        f"texts, and suits every language. Texts are generated for 32 validation records.{some}"
    )
    evaluation += f"evaluation: {{{when}, samples: 32, metrics: [chrf], metric: chrf}}\n"
    length = guess.target.typical_length()
    tokens = min(_MOST_NEW_TOKENS, max(16, -(-length // _CHARACTERS_PER_TOKEN)))
    generation = _comment(
        f"95 % of the targets have at most {length:,} characters, so {tokens} tokens are enough "
        "for most."
    )
    return [training, evaluation, generation + f"generation: {{max_new_tokens: {tokens}}}\n"]


def _title(name: str) -> str:
    """Return the name of a field as a heading in a template, such as `Review text`."""
    words = name.replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def _comment(text: str) -> str:
    lines = textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
    return "".join(f"# {line}\n" for line in lines)


def _indented(text: str) -> str:
    return textwrap.indent(text, "  ")
