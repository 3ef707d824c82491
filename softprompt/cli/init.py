"""`softprompt init`: write an experiment for a data file."""

import argparse
import json
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
_MOST_CHARACTERS_PER_TOKEN = 8
_ROW = 256  # tokens of plain text
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
        help="a .jsonl, .csv, .parquet or .txt file, a folder of such files, or a pattern",
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
    _require_fields(guess, records, options.source)
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


def _require_fields(guess: "Guess", records: "Sequence[Record]", where: str) -> None:
    """Require that a template can have these fields, and that all records have text in them."""
    from softprompt.data.guess import Format
    from softprompt.experiment.templates import template_fields, written_field

    for column in (*guess.inputs, guess.target):
        try:
            template_fields(written_field(column.name))
        except ValueError:
            raise UserError(
                f"{where}: a template cannot have a field with the name {shown(column.name)!r}; "
                f"rename it to {_plain_name(column.name)!r}, for example"
            ) from None
        if guess.format is Format.MESSAGES:
            from softprompt.data.conversations import messages_of  # imports JAX

            for record in records:
                messages_of(record, column.name)
        else:
            for record in records:
                record.text(column.name)


def _plain_name(name: str) -> str:
    plain = re.sub(r"\W+", "_", name).strip("_").lower()
    return plain if plain.isidentifier() else f"field_{plain}"


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
    from softprompt.data.guess import Format
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
        *([_verbalizer(guess.target)] if guess.format is Format.LABELS else []),
        _comment("More virtual tokens can learn more, and take longer to train.")
        + "prompt: {length: 20}\n",
        _comment("The learning rate rises in the first steps, which makes training more stable.")
        + "optimizer: {warmup_steps: 20}\n",
        *_training(sizes, guess),
    ]
    return "\n".join(parts)


def _template(guess: "Guess") -> str:
    from softprompt.data.guess import Format
    from softprompt.experiment.templates import written_field

    name = guess.target.name
    why = f"The field {shown(name)} {guess.reason}, so it is what the model "
    if guess.format is Format.MESSAGES:
        why += "learns: the base model's chat template writes it, and every answer is a target."
        return _comment(why) + f"template:\n  messages: {_quoted(name)}\n"
    if guess.format is Format.PLAIN_TEXT:
        why += f"learns. Long texts are divided into rows of {_ROW} tokens."
        return _comment(why) + f"template:\n  text: {_quoted(name)}\n  max_tokens: {_ROW}\n"
    if guess.format is Format.PROMPTS:
        why += "learns to write after it. `{record[prompt]}` is the field; `{prompt}` would mark "
        why += "the place of the virtual tokens."
        return _comment(why) + (
            'template:\n  input: "{record[prompt]}"\n  target: "{completion}"\n'
        )
    lines = [f"{_title(column.name)}: {written_field(column.name)}" for column in guess.inputs]
    text = _quoted("\n".join([*lines, f"{_title(name)}:"]))
    why += "predicts. The input ends without a space, because the text of the target begins with "
    why += "one."
    if guess.left_out:
        names = ", ".join(shown(column.name) for column in guess.left_out)
        why += f" Some records have no text in these fields, so they are left out: {names}."
    target = written_field(name) if guess.format is Format.LABELS else f" {written_field(name)}"
    section = f"template:\n  input: {text}\n  target: {_quoted(target)}\n"
    is_long = sum(column.typical_length() for column in guess.inputs) > _LONG
    if is_long and guess.format is Format.LABELS:
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
    from softprompt.data.guess import Format

    count, of = sizes["train"], "training records"
    if guess.format is Format.PLAIN_TEXT:
        count, of = _fewest_rows(guess.target, count), f"or more rows of {_ROW} tokens at most"
    batch = min(_BATCH, 2 ** (count.bit_length() - 1))
    steps = min(_MOST_STEPS, max(_FEWEST_STEPS, _PASSES * count // batch))
    every = -(-steps // _EVALUATIONS)
    training = _comment(
        f"{steps} steps of {batch} examples read the data about {steps * batch / count:.1f} times: "
        f"it has {count:,} {of}."
    )
    training += f"training: {{steps: {steps}, batch_size: {batch}}}\n"
    why, metric = _metric(guess)
    when = f"every: {every}"
    if sizes["validation"] > _EVALUATED:
        why += f" The first {_EVALUATED} validation examples are used."
        when += f", examples: {_EVALUATED}"
    sections = [training, _comment(why) + f"evaluation: {{{when}, {metric}}}\n"]
    if guess.format in (Format.LABELS, Format.PLAIN_TEXT):
        return sections
    length = guess.target.typical_length()
    tokens = min(_MOST_NEW_TOKENS, max(16, -(-length // _CHARACTERS_PER_TOKEN)))
    why = f"95 % of the targets have at most {length:,} characters, so {tokens} tokens are enough "
    return [*sections, _comment(why + "for most.") + f"generation: {{max_new_tokens: {tokens}}}\n"]


def _metric(guess: "Guess") -> tuple[str, str]:
    """Return why a metric decides, and the settings that say so."""
    from softprompt.data.guess import Format

    if guess.format is Format.PLAIN_TEXT:
        why = "The perplexity decides which prompt is best: how well the model predicts the texts."
        return why, "metrics: [perplexity], metric: perplexity"
    if guess.format is not Format.LABELS:
        why = "chrF decides which prompt is best. It compares the characters of generated and "
        why += "given texts, and suits every language. Texts are generated for 32 validation "
        return why + "records.", "samples: 32, metrics: [chrf], metric: chrf"
    counts = guess.target.values.values()
    if max(counts) < _UNEVEN * min(counts):
        return "The accuracy decides which prompt is best.", "metric: accuracy"
    why = "Some labels are rare, so macro_f1 decides which prompt is best: it weighs all labels "
    return why + "equally, and accuracy does not.", "metrics: [macro_f1], metric: macro_f1"


def _fewest_rows(column: "Column", records: int) -> int:
    """Return a number of rows that texts fill at least, as far as their lengths tell."""
    characters = sum(column.lengths) * records // column.records
    return max(records, characters // (_ROW * _MOST_CHARACTERS_PER_TOKEN))


def _quoted(text: str) -> str:
    """Return a text for YAML, with escapes for characters that do not print."""
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in quoted)


def _title(name: str) -> str:
    """Return the name of a field as a heading in a template, such as `Review text`."""
    words = name.replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def _comment(text: str) -> str:
    lines = textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
    return "".join(f"# {line}\n" for line in lines)
