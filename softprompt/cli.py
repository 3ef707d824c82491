"""The command line: `softprompt train | eval | predict | inspect | export | import`."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from softprompt.errors import Stopped, UserError

if TYPE_CHECKING:
    from softprompt.data.records import Record
    from softprompt.inference.prompt import TrainedPrompt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    0 if it did what was asked, 1 for a mistake of the user's, 128 + n if signal n stopped it.
    """
    try:
        options = _parse(arguments)
        _configure_jax()
        options.command(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.number
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stdout = None  # the reader has gone; there is nobody to tell
        return 1
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Words (overrides, texts) may stand before and behind options."""
    options, rest = _parser().parse_known_args(arguments)
    wrong = [word for word in rest if word.startswith("-") or not hasattr(options, "words")]
    if wrong:
        raise UserError(f"unknown argument {wrong[0]!r}; see softprompt {options.name} --help")
    if rest:
        options.words = [*options.words, *rest]
    return options


def _configure_jax() -> None:
    """Keep compiled programs between runs, unless the user has said otherwise."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(cache / "softprompt" / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _train(options: argparse.Namespace) -> None:
    from softprompt.experiment_file import load_experiment
    from softprompt.training.loop import train

    experiment = load_experiment(options.experiment, options.words)
    folder = options.run_dir or Path("runs") / experiment.name
    summary = train(experiment, folder)
    print(json.dumps(summary, indent=2))
    print(f"prompt: {folder / 'prompt'}", file=sys.stderr)


def _eval(options: argparse.Namespace) -> None:
    from softprompt.data.examples import make_examples
    from softprompt.data.records import read_records
    from softprompt.evaluation.evaluate import evaluate
    from softprompt.experiment_file import load_experiment

    config = options.run / "config.yaml"
    if not config.is_file():
        raise UserError(f"{options.run}: is no run's folder (it has no config.yaml)")
    data = load_experiment(config).data.model_dump(exclude_none=True)
    if options.split not in data:
        raise UserError(f"{config}: has no data.{options.split}")
    records = read_records(data[options.split])
    prompt = _load_prompt(options)
    examples = make_examples(prompt.task, records, options.split)
    metrics = evaluate(prompt.backbone, prompt.prefix, examples, options.batch_size, options.split)
    print(json.dumps({"split": options.split, "examples": len(examples), **metrics}))


def _predict(options: argparse.Namespace) -> None:
    if bool(options.words) == bool(options.input):
        raise UserError("give either texts or --input FILE")
    if options.jsonl and options.input != "-":
        raise UserError("--jsonl is for standard input (--input -); a file's kind is in its name")
    prompt = _load_prompt(options)
    if options.input:
        records = list(_read_inputs(prompt, options.input, options.jsonl))
    else:
        records = [prompt.record(text, f"text {i}") for i, text in enumerate(options.words, 1)]
    for record, prediction in zip(
        records, prompt.classify_records(records, options.batch_size), strict=True
    ):
        line = {"input": record.fields, **dataclasses.asdict(prediction)}
        print(json.dumps(line, ensure_ascii=False))


def _read_inputs(prompt: "TrainedPrompt", name: str, jsonl: bool) -> "Iterator[Record]":
    from softprompt.data.records import parse_jsonl, read_records

    if name.endswith((".jsonl", ".csv")):
        yield from read_records(name)
        return
    where = "standard input" if name == "-" else name
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        lines = content.decode("utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8 text") from None
    if jsonl:
        yield from parse_jsonl(lines, where)
    else:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield prompt.record(line.removesuffix("\r"), f"{where}:{number}")


def _inspect(options: argparse.Namespace) -> None:
    from softprompt.inference.inspect import nearest_tokens

    prompt = _load_prompt(options)
    tokens = nearest_tokens(prompt, options.nearest)
    about = {key: prompt.description[key] for key in ("experiment", "step", "validation")}
    print(f"{len(tokens)} virtual tokens on {prompt.base.name}, {json.dumps(about)}")
    print(f"{'':>4}  {'norm':>7}  nearest tokens (cosine similarity)")
    for number, token in enumerate(tokens):
        near = "  ".join(f"{text!r} {similarity:.2f}" for text, similarity in token.nearest)
        print(f"{number:>4}  {token.norm:>7.3f}  {near}")


def _export(options: argparse.Namespace) -> None:
    from softprompt.interop.export import export, push

    export(_load_prompt(options), options.folder, options.format)
    print(options.folder)
    if options.push:
        print(push(options.folder, options.push))


def _import(options: argparse.Namespace) -> None:
    from softprompt.backbones.loading import load_base
    from softprompt.experiment_file import load_experiment
    from softprompt.interop.importing import import_prompt

    experiment = load_experiment(options.experiment) if options.experiment else None
    name = options.base or (experiment.base if experiment else None)
    if name is None:
        raise UserError("give the base model with --base, or an experiment that names it")
    import_prompt(options.source, options.folder, load_base(name), experiment)
    print(options.folder)


def _load_prompt(options: argparse.Namespace) -> "TrainedPrompt":
    from softprompt.inference.prompt import load_prompt

    return load_prompt(options.run, options.base)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="softprompt",
        description="Learn soft prompts for frozen language models.",
        epilog="""\
examples:
  softprompt train experiments/sentiment.yaml
  softprompt eval runs/sentiment --split test
  softprompt predict runs/sentiment "A dull, lifeless film."
  softprompt inspect runs/sentiment

'softprompt COMMAND --help' says more about a command.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    train = _command(
        commands,
        "train",
        _train,
        "learn a prompt, or go on with a run that was stopped",
        """\
Trains what an experiment file says and leaves in the run's folder: prompt/ (for use),
checkpoints/, config.yaml, metrics.jsonl, summary.json, curves.png. Prints the summary.
A run that was stopped goes on when the same command is given again.

examples:
  softprompt train experiments/sentiment.yaml
  softprompt train experiments/sentiment.yaml prompt.length=50 seed=1 --run-dir runs/long
  softprompt train experiments/sentiment.yaml base=path/to/model optimizer.learning_rate=3e-3""",
    )
    train.add_argument("experiment", type=Path, metavar="EXPERIMENT", help="a YAML file")
    train.add_argument(
        "words", nargs="*", default=[], metavar="key=value", help="instead of what the file says"
    )
    train.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/NAME")

    evaluate = _command(
        commands,
        "eval",
        _eval,
        "measure a trained prompt on a split of its data",
        """\
Prints one line of JSON: the split, its number of examples, loss (nats per target token)
and, where there are labels, accuracy.

examples:
  softprompt eval runs/sentiment
  softprompt eval runs/sentiment --split validation""",
    )
    _add_run(evaluate, "a run's folder")
    _add_batch_size(evaluate)
    evaluate.add_argument(
        "--split", choices=("train", "validation", "test"), default="test", help="default: test"
    )

    predict = _command(
        commands,
        "predict",
        _predict,
        "label texts with a trained prompt",
        """\
Prints one line of JSON for each text: input, label, and the probability of every label.
Blank lines of a file or of standard input are skipped.

examples:
  softprompt predict runs/sentiment "A dull, lifeless film." "A joy."
  softprompt predict runs/sentiment --input reviews.txt         (a text a line)
  softprompt predict runs/sentiment --input reviews.jsonl       (or .csv: fields by name)
  cat reviews.txt | softprompt predict runs/sentiment --input -""",
    )
    _add_run(predict, "a run's folder, or its prompt/")
    _add_batch_size(predict)
    predict.add_argument("words", nargs="*", default=[], metavar="TEXT")
    predict.add_argument(
        "--input", metavar="FILE", help="a file of inputs, or - for standard input"
    )
    predict.add_argument(
        "--jsonl", action="store_true", help="standard input has a JSON object a line"
    )

    inspect = _command(
        commands,
        "inspect",
        _inspect,
        "show each virtual token's norm and nearest vocabulary tokens",
        """\
examples:
  softprompt inspect runs/sentiment
  softprompt inspect runs/sentiment --nearest 10""",
    )
    _add_run(inspect, "a run's folder, or its prompt/")
    inspect.add_argument(
        "--nearest", type=_count, default=5, metavar="N", help="tokens to show (default: 5)"
    )

    export = _command(
        commands,
        "export",
        _export,
        "write what was learned in the form of another program",
        """\
peft: an adapter (a soft prompt as PROMPT_TUNING, prefix tuning as PREFIX_TUNING, LoRA).
peft-prefix: whatever stands in front of every input as PREFIX_TUNING.
merged: a model directory for engines that know nothing of prompts, with new tokens whose
embeddings are the learned vectors, or with LoRA's or the fine-tuned weights.
A README.md beside it is the model card.

examples:
  softprompt export runs/sentiment adapters/sentiment
  softprompt export runs/sentiment models/sentiment --format merged
  softprompt export runs/sentiment adapters/sentiment --push me/sentiment""",
    )
    _add_run(export, "a run's folder, or its prompt/")
    export.add_argument("folder", type=Path, metavar="DIR", help="a new folder")
    export.add_argument(
        "--format", choices=("peft", "peft-prefix", "merged"), default="peft", help="default: peft"
    )
    export.add_argument("--push", metavar="OWNER/NAME", help="upload it to the hub as well")

    import_ = _command(
        commands,
        "import",
        _import,
        "make a prompt for use out of another program's",
        """\
Reads a folder with an adapter of peft (PROMPT_TUNING, P_TUNING, PREFIX_TUNING or LORA, as
safetensors), or a [k, d] array (.npy) of google-research/prompt-tuning. Template and
verbalizer come from the experiment file; without one the input is the text alone.

examples:
  softprompt import adapters/theirs prompts/theirs --base smollm2-135m-instruct
  softprompt import prompt.npy prompts/lester --experiment experiments/sentiment.yaml""",
    )
    import_.add_argument("source", type=Path, metavar="SOURCE", help="a folder, or a .npy file")
    import_.add_argument("folder", type=Path, metavar="DIR", help="a new folder")
    import_.add_argument("--base", metavar="NAME", help="the base model it was trained on")
    import_.add_argument("--experiment", type=Path, metavar="FILE", help="a YAML file")
    return parser


def _command(
    commands: Any, name: str, run: Any, summary: str, text: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.\n\n{text}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(command=run, name=name)
    return command


def _add_run(command: argparse.ArgumentParser, help: str) -> None:
    command.add_argument("run", type=Path, metavar="RUN", help=help)
    command.add_argument("--base", metavar="NAME", help="default: the base the prompt names")


def _add_batch_size(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--batch-size", type=_count, default=32, metavar="N", help="texts a pass (default: 32)"
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be a whole number, 1 or more")
    return int(text)
