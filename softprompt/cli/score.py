"""`softprompt score`: score a file of predictions, or compare two files."""

import argparse
import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from softprompt.cli.arguments import add_command, names
from softprompt.cli.progress import Bar
from softprompt.cli.tables import print_table
from softprompt.errors import UserError

if TYPE_CHECKING:
    from softprompt.metrics.scores import Difference, Scores


def add_to(subparsers: Any) -> None:
    """Declare the command and its arguments."""
    command = add_command(
        subparsers,
        "score",
        run,
        "score a file of predictions, or compare two files",
        """\
Reads lines of {"prediction": ..., "reference": ...}. A reference may be a list of texts that
are all correct. Prints every value with its 95% bootstrap interval. With --against, prints
the values of both files, their difference with its interval, and its p-value (paired
bootstrap); both files must answer the same examples in the same order.
Metrics of texts: rouge (1, 2, L, Lsum), rouge1 to rouge9, rougeL, rougeLsum, bleu, chrf, ter,
exact_match, token_f1. Metrics of labels: accuracy, precision, recall, macro_f1, micro_f1,
matthews, confusion (a table: a row per reference, a column per prediction).
A text may have at most 500,000 characters. Some metrics take a long time for long texts, so
rougeL and rougeLsum accept at most 50,000 words, and ter at most 500.

examples:
  softprompt score --metrics rouge,bleu predictions.jsonl
  softprompt score --metrics rougeL --json predictions.jsonl
  softprompt score --metrics rouge runs/a/predictions.jsonl --against runs/b/predictions.jsonl""",
    )
    command.add_argument("file", metavar="FILE", help="a .jsonl file of predictions")
    command.add_argument(
        "--metrics",
        type=names,
        default=["rouge", "bleu"],
        metavar="A,B",
        help="metrics, separated by commas (default: rouge,bleu)",
    )
    command.add_argument(
        "--stem",
        action="store_true",
        help="stem English words before ROUGE compares them (Porter stemmer)",
    )
    command.add_argument("--json", action="store_true", help="print one line of JSON")
    form = command.add_mutually_exclusive_group()
    form.add_argument("--each", action="store_true", help="print a line of JSON per prediction")
    form.add_argument("--against", metavar="FILE", help="predictions to compare with")


def run(options: argparse.Namespace) -> None:
    """Score the predictions, and print the values in the chosen form."""
    from softprompt.evaluation.predictions import compare_answers, read_answers
    from softprompt.experiment.metric_names import CORPUS_METRICS
    from softprompt.metrics.named import measure
    from softprompt.metrics.scores import all_intervals, all_values

    corpus_metrics = [name for name in options.metrics if name in CORPUS_METRICS]
    if options.each and corpus_metrics:
        raise UserError(f"--each: {corpus_metrics[0]} is a metric of all examples together")
    answers = read_answers(options.file)
    how = {"stem": options.stem, "progress": Bar}
    scores = measure(options.metrics, answers.predictions, answers.references, **how)
    values = all_values(scores)
    if options.against:
        others = read_answers(options.against)
        theirs, differences = compare_answers(answers, others, options.metrics, **how)
        if options.json:
            found = {name: dataclasses.asdict(one) for name, one in differences.items()}
            print(json.dumps({**values, "differences": found}))
        else:
            _print_differences(scores, theirs, differences)
    elif options.each:
        for parts in zip(*(one.each() for one in scores.values()), strict=True):
            print(json.dumps({key: v for part in parts for key, v in part.items()}))
    elif options.json:
        intervals = all_intervals(scores)
        signatures = {name: one.signature for name, one in scores.items() if one.signature}
        print(json.dumps({**values, "intervals": intervals, "signatures": signatures}))
    else:
        _print_scores(scores)


def _print_scores(scores: "Mapping[str, Scores]") -> None:
    """Print every value with its bootstrap interval, and the signatures of the metrics.

    A confusion matrix is a table of its own.
    """
    from softprompt.metrics.labels import confusion_rows

    rows = []
    for metric, one in scores.items():
        if metric == "confusion":
            continue
        intervals = one.intervals()
        for name, value in one.values().items():
            low, high = intervals[name]
            interval = f"{low:.4f} to {high:.4f}"
            rows.append({"metric": name, "value": f"{value:.4f}", "95% interval": interval})
    every_value = "--json prints all values"
    if rows:
        print_table(rows, every_value)
    if "confusion" in scores:
        print_table(confusion_rows(scores["confusion"].values()), every_value)
    for name, one in scores.items():
        if one.signature:
            print(f"{name}: {one.signature}")


def _print_differences(
    ours: "Mapping[str, Scores]",
    theirs: "Mapping[str, Scores]",
    differences: "Mapping[str, Difference]",
) -> None:
    """Print the values of two systems and their differences."""
    rows = []
    for name, scores in ours.items():
        others = theirs[name].values()
        for key, value in scores.values().items():
            found = differences[key]
            low, high = found.interval
            rows.append(
                {
                    "metric": key,
                    "this": f"{value:.4f}",
                    "the other": f"{others[key]:.4f}",
                    "difference": f"{found.difference:+.4f}",
                    "95% interval": f"{low:+.4f} to {high:+.4f}",
                    "p": f"{found.p_value:.3f}",
                }
            )
    print_table(rows, "--json prints all values")
