"""The command line: what each command of `softprompt` takes; `commands.py` does the work."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from softprompt.cli import commands
from softprompt.cli.arguments import (
    add_base,
    add_batch_size,
    add_command,
    add_generation,
    add_inputs,
    add_run,
    add_scoring,
    count,
    numbers,
)
from softprompt.cli.progress import printed_log
from softprompt.errors import Stopped, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    0 if it did what was asked, 1 for a mistake of the user's, 128 + n if signal n stopped it.
    """
    try:
        options = _parse(arguments)
        from softprompt.runtime.compilation import use_compilation_cache  # JAX is slow to import

        use_compilation_cache()
        with printed_log():
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
    chosen = parser.add_subparsers(metavar="COMMAND", required=True)

    train = add_command(
        chosen,
        "train",
        commands.train,
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

    sweep = add_command(
        chosen,
        "sweep",
        commands.sweep,
        "try many settings of an experiment side by side, and print a table",
        """\
The section sweep of the file has lists of values for keys of the experiment; every
combination is a trial, and trials that can share a compiled program train together. Each
is a run of its own in --folder/trials/. A sweep that was stopped goes on when the same
command is given again. The exit status is 1 if a trial failed.

examples:
  softprompt sweep experiments/sentiment-length.yaml --dry-run
  softprompt sweep experiments/sentiment-length.yaml training.steps=40 --folder runs/short
  softprompt sweep experiments/sentiment-length.yaml "sweep.seed=[0]" sweep.at_once=1""",
    )
    sweep.add_argument("experiment", type=Path, metavar="EXPERIMENT", help="a YAML file")
    sweep.add_argument(
        "words", nargs="*", default=[], metavar="key=value", help="instead of what the file says"
    )
    sweep.add_argument("--folder", type=Path, metavar="DIR", help="default: runs/FILE")
    sweep.add_argument(
        "--dry-run", action="store_true", help="list the trials and the time they will take"
    )
    sweep.add_argument("--json", action="store_true", help="with --dry-run: as JSON")

    evaluate = add_command(
        chosen,
        "eval",
        commands.evaluate,
        "measure a trained prompt, or several together, on a split of its data",
        """\
Prints one line of JSON: the split, its number of examples, loss (nats per target token),
where there are labels accuracy, and the experiment's metrics or those of --metrics. Of
several prompts of one task there is a line for each, evaluated in one pass, and for what
they choose by vote and by mean probability.

examples:
  softprompt eval runs/sentiment
  softprompt eval runs/sentiment --split validation --metrics macro_f1,matthews
  softprompt eval runs/summarize --output predictions.jsonl       (for softprompt score)
  softprompt eval runs/seed-0 runs/seed-1 runs/seed-2""",
    )
    evaluate.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder")
    add_base(evaluate)
    add_batch_size(evaluate)
    evaluate.add_argument(
        "--split", choices=("train", "validation", "test"), default="test", help="default: test"
    )
    evaluate.add_argument("--metrics", metavar="A,B", help="default: the experiment's")
    evaluate.add_argument(
        "--output", type=Path, metavar="FILE", help="write inputs, references and predictions"
    )
    add_scoring(evaluate)

    predict = add_command(
        chosen,
        "predict",
        commands.predict,
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
    add_run(predict, "a run's folder, or its prompt/")
    add_batch_size(predict)
    add_inputs(predict)
    add_scoring(predict)

    generate = add_command(
        chosen,
        "generate",
        commands.generate,
        "write on from texts with a trained prompt",
        """\
Prints what the model writes behind each text, on a terminal as it is written. By default the
likeliest token is taken each time, and settings are those that the prompt was trained with;
in float32 on a CPU the output is that of stock transformers with the vectors in front.

examples:
  softprompt generate runs/summarize "A tool that shows the manual of a command."
  softprompt generate runs/summarize --input texts.txt --json
  softprompt generate runs/summarize --temperature 0.8 --top-p 0.9 --samples 3 --seed 1 "..."
  softprompt generate runs/summarize --beams 4 --length-penalty 0.8 --input texts.txt""",
    )
    add_run(generate, "a run's folder, or its prompt/")
    add_batch_size(generate)
    add_inputs(generate)
    generate.add_argument("--json", action="store_true", help="a line of JSON for each text")
    add_generation(generate)

    score = add_command(
        chosen,
        "score",
        commands.score,
        "score a file of predictions, or compare two",
        """\
Reads lines of {"prediction": ..., "reference": ...}; a reference may be a list of texts of
which any will do. Prints every value with its 95 % bootstrap interval. With --against, the
two files answer the same examples, and each value is printed for both, with the difference,
its interval, and p, how often chance would make it as large (paired bootstrap).
Metrics: rouge (1, 2, L, Lsum), rouge1 to rouge9, rougeL, rougeLsum, bleu, chrf, ter,
exact_match, token_f1; of labels accuracy, precision, recall, macro_f1, micro_f1, matthews,
confusion.

examples:
  softprompt score --metrics rouge,bleu predictions.jsonl
  softprompt score --metrics rougeL --json predictions.jsonl
  softprompt score --metrics rouge runs/a/predictions.jsonl --against runs/b/predictions.jsonl""",
    )
    score.add_argument("file", metavar="FILE", help="a .jsonl file")
    score.add_argument("--metrics", default="rouge,bleu", metavar="A,B", help="default: rouge,bleu")
    score.add_argument(
        "--stem", action="store_true", help="ROUGE compares English words without their endings"
    )
    score.add_argument("--json", action="store_true", help="one line of JSON")
    form = score.add_mutually_exclusive_group()
    form.add_argument("--each", action="store_true", help="a line of JSON for each prediction")
    form.add_argument("--against", metavar="FILE", help="another's predictions")

    inspect = add_command(
        chosen,
        "inspect",
        commands.inspect,
        "show each virtual token's norm and nearest vocabulary tokens",
        """\
examples:
  softprompt inspect runs/sentiment
  softprompt inspect runs/sentiment --nearest 10""",
    )
    add_run(inspect, "a run's folder, or its prompt/")
    inspect.add_argument(
        "--nearest", type=count, default=5, metavar="N", help="tokens to show (default: 5)"
    )

    compare = add_command(
        chosen,
        "compare",
        commands.compare,
        "try several methods on one experiment, and print a table",
        """\
Trains what is missing in --folder (each method and seed in a run of its own), and prints
what each method is worth and what it costs. The table is also written there, as Markdown
and CSV. Methods: none (the base model alone), few-shot (with 4 solved examples as text, or
as many as the experiment's shots), prompt, prefix, dept, lora, full.

examples:
  softprompt compare experiments/sentiment.yaml
  softprompt compare experiments/sentiment.yaml --methods none,prompt,lora --seeds 0,1,2
  softprompt compare experiments/sentiment.yaml training.steps=80 --folder runs/short""",
    )
    compare.add_argument("experiment", type=Path, metavar="EXPERIMENT", help="a YAML file")
    compare.add_argument(
        "words", nargs="*", default=[], metavar="key=value", help="for all methods"
    )
    compare.add_argument(
        "--methods",
        type=lambda text: text.split(","),
        default=["none", "few-shot", "prompt", "prefix", "lora", "full"],
        metavar="A,B",
        help="default: none,few-shot,prompt,prefix,lora,full",
    )
    compare.add_argument("--seeds", type=numbers, default=[0], metavar="N,M", help="default: 0")
    compare.add_argument("--folder", type=Path, metavar="DIR", help="default: runs/compare/NAME")

    runs = add_command(
        chosen,
        "runs",
        commands.runs,
        "list runs in a table",
        """\
Finds the runs in the folders and below them (by default in runs/), and prints a line for
each: the settings in which they differ, how far they came, and the metric that decides. A
column can be named by its end: length for prompt.length, accuracy for validation accuracy.

examples:
  softprompt runs
  softprompt runs runs/sentiment-length --sort accuracy
  softprompt runs --where method=lora --where seed=0 --json""",
    )
    runs.add_argument("folders", type=Path, nargs="*", metavar="FOLDER", help="default: runs")
    runs.add_argument("--sort", metavar="COLUMN", help="of metrics the best come first")
    runs.add_argument("--reverse", action="store_true", help="sort the other way round")
    runs.add_argument(
        "--where", action="append", default=[], metavar="COLUMN=VALUE", help="only these"
    )
    runs.add_argument("--json", action="store_true", help="a line of JSON for each")

    report = add_command(
        chosen,
        "report",
        commands.report,
        "write a page of figures and tables about runs or a sweep",
        """\
Writes report.html, one file that needs no network, and its tables as .csv and .md: the metric
against the prompt's length or another setting with the spread over seeds, learning curves,
all settings together, the best run with the command that runs it again, what it says, and
the tokens nearest to its vectors.

examples:
  softprompt report runs/sentiment-length
  softprompt report runs/sentiment runs/long --output runs/report""",
    )
    report.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="runs, or a sweep")
    report.add_argument("--output", type=Path, metavar="DIR", help="default: the first FOLDER")

    export = add_command(
        chosen,
        "export",
        commands.export,
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
    add_run(export, "a run's folder, or its prompt/")
    export.add_argument("folder", type=Path, metavar="DIR", help="a new folder")
    export.add_argument(
        "--format", choices=("peft", "peft-prefix", "merged"), default="peft", help="default: peft"
    )
    export.add_argument("--push", metavar="OWNER/NAME", help="upload it to the hub as well")

    import_ = add_command(
        chosen,
        "import",
        commands.import_,
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
