"""What each command of the command line does; `cli.py` has their arguments."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt.cli.progress import Bar, duration, print_line
from softprompt.errors import UserError

if TYPE_CHECKING:
    from softprompt.data.records import Record
    from softprompt.inference.prompt import TrainedPrompt
    from softprompt.metrics.scores import Difference, Scores


def train(options: argparse.Namespace) -> None:
    """`softprompt train EXPERIMENT`."""
    from softprompt.experiment.reading import load_experiment
    from softprompt.training.loop import train

    experiment = load_experiment(options.experiment, options.words)
    folder = options.run_dir or Path("runs") / experiment.name
    summary = train(experiment, folder, progress=Bar)
    print(json.dumps(summary, indent=2))
    print(f"prompt: {folder / 'prompt'}", file=sys.stderr)


def sweep(options: argparse.Namespace) -> None:
    """`softprompt sweep EXPERIMENT`."""
    from softprompt.experiment.reading import ExperimentFile
    from softprompt.sweep.outcome import Outcome
    from softprompt.sweep.plan import plan
    from softprompt.sweep.results import ranked, results_table
    from softprompt.sweep.runner import sweep
    from softprompt.sweep.space import Space, format_parameters

    if options.json and not options.dry_run:
        raise UserError("--json is for --dry-run")
    folder = options.folder or Path("runs") / options.experiment.stem
    space = Space(ExperimentFile(options.experiment, options.words), folder)
    if options.dry_run:
        planned = plan(space, progress=Bar)
        if options.json:
            print(json.dumps(dataclasses.asdict(planned)))
            return
        for trial in planned.trials:
            parameters = format_parameters(trial.parameters) or "chosen when it is its turn"
            print(f"trial {trial.number}: {parameters} (program {trial.group}, {trial.state})")
        for number, group in enumerate(planned.groups):
            about = f"{group.at_once} at once, about {duration(group.seconds)}"
            print(f"program {number}: {group.waiting} trials to run, {group.error or about}")
        print(f"in all about {duration(planned.seconds)}")
        return
    trials = sweep(space, progress=Bar)
    print(results_table(trials))
    outcomes = [(trial, Outcome.read(trial.folder)) for trial in trials]
    elsewhere = sum(end is None for _, end in outcomes)
    if any(end and end.state == "finished" for _, end in outcomes):
        best = "best so far" if elsewhere else "best"
        print(f"{best}: {ranked(trials)[0].folder / 'prompt'}", file=sys.stderr)
    if elsewhere:
        print(
            f"{elsewhere} of {len(trials)} trials are left to other processes; "
            "if these were killed, the same command goes on with them",
            file=sys.stderr,
        )
    if failed := [(trial, end) for trial, end in outcomes if end and end.state == "failed"]:
        first, end = failed[0]
        again = f"; without its folder ({first.folder}) it is tried again"
        raise UserError(
            f"{len(failed)} of {len(trials)} trials failed, the first: {first.name}: {end.error}"
            f"{again if space.sweep.how != 'tpe' else ''}"
        )


def evaluate(options: argparse.Namespace) -> None:
    """`softprompt eval RUN...`."""
    from softprompt.data.records import read_records
    from softprompt.data.task import make_examples
    from softprompt.evaluation.evaluate import evaluate
    from softprompt.experiment.metric_names import MODEL_METRICS
    from softprompt.experiment.reading import load_experiment
    from softprompt.inference.ensemble import evaluate_ensemble, shared_task
    from softprompt.inference.prompt import load_prompt
    from softprompt.storage.run_folder import write_predictions

    first, *others = options.runs
    config = first / "config.yaml"
    if not config.is_file():
        raise UserError(f"{first}: is no run's folder (it has no config.yaml)")
    if others and (options.metrics or options.output or options.calibrate or options.normalize):
        raise UserError("--metrics, --output, --normalize and --calibrate are for one run")
    overrides = [f"evaluation.batch_size={options.batch_size}"]
    if options.metrics:
        overrides += [f"evaluation.metrics=[{options.metrics}]", "evaluation.metric=loss"]
    experiment = load_experiment(config, overrides)
    data = experiment.data.model_dump(exclude_none=True)
    if options.split not in data:
        raise UserError(f"{config}: has no data.{options.split}")
    prompt = _with_scoring(load_prompt(first, options.base), options)
    prompts = [prompt, *(load_prompt(run, prompt.base) for run in others)]
    task = shared_task(prompts) if others else prompt.task
    examples = make_examples(task, read_records(data[options.split]), options.split, Bar)
    about = {"split": options.split, "examples": len(examples)}
    if not others:
        answers = options.output or set(experiment.evaluation.metrics) - {*MODEL_METRICS}
        measured = evaluate(
            prompt.backbone,
            prompt.prefix,
            task,
            examples,
            experiment.model_copy(update={"scoring": prompt.scoring}),
            options.split,
            written=None if answers else 0,
            progress=Bar,
        )
        print(json.dumps({**about, **measured.values()}))
        if options.output:
            write_predictions(options.output, measured.samples)
        return
    results = evaluate_ensemble(prompts, examples, options.batch_size, options.split, Bar)
    for name, metrics in zip([*options.runs, "vote", "mean"], results.values(), strict=True):
        print(json.dumps({"run": str(name), **about, **metrics}))


def predict(options: argparse.Namespace) -> None:
    """`softprompt predict RUN`."""
    prompt, records = _prompt_and_inputs(options)
    prompt = _with_scoring(prompt, options)
    for record, prediction in zip(
        records, prompt.classify(records, options.batch_size), strict=True
    ):
        line = {"input": record.fields, **dataclasses.asdict(prediction)}
        print(json.dumps(line, ensure_ascii=False))


def generate(options: argparse.Namespace) -> None:
    """`softprompt generate RUN`."""
    given = {name: getattr(options, name) for name in options.settings}
    settings = {name: value for name, value in given.items() if value is not None}
    prompt, records = _prompt_and_inputs(options)
    if len(records) == 1 and not options.json and _can_stream(prompt, settings):
        for piece in prompt.stream(records[0], **settings):
            print(piece, end="", flush=True)
        print()
        return
    for record, written in zip(
        records, prompt.generate(records, options.batch_size, progress=Bar, **settings), strict=True
    ):
        if options.json:
            line = {"input": record.fields, **dataclasses.asdict(written)}
            print(json.dumps(line, ensure_ascii=False))
        else:
            print("\n".join(written.texts))


def _can_stream(prompt: "TrainedPrompt", settings: dict[str, Any]) -> bool:
    from softprompt.inference.prompt import changed

    how = changed(prompt.generation, settings)
    return sys.stdout.isatty() and how.beams == how.samples == 1


def score(options: argparse.Namespace) -> None:
    """`softprompt score FILE`."""
    from softprompt.evaluation.predictions import compare_answers, read_answers
    from softprompt.experiment.metric_names import CORPUS_METRICS
    from softprompt.metrics.named import measure
    from softprompt.metrics.scores import all_intervals, all_values

    metrics = [name.strip() for name in options.metrics.split(",")]
    if options.each and (of_all := [name for name in metrics if name in CORPUS_METRICS]):
        raise UserError(f"--each: {of_all[0]} is of all examples together")
    answers = read_answers(options.file)
    scores = measure(metrics, answers.predictions, answers.references, stem=options.stem)
    values = all_values(scores)
    if options.against:
        others = read_answers(options.against)
        theirs, differences = compare_answers(answers, others, metrics, stem=options.stem)
        if options.json:
            found = {name: dataclasses.asdict(one) for name, one in differences.items()}
            print(json.dumps({**values, "differences": found}))
        else:
            print(_difference_table(scores, theirs, differences))
    elif options.each:
        for parts in zip(*(one.each() for one in scores.values()), strict=True):
            print(json.dumps({key: v for part in parts for key, v in part.items()}))
    elif options.json:
        intervals = all_intervals(scores)
        signatures = {name: one.signature for name, one in scores.items() if one.signature}
        print(json.dumps({**values, "intervals": intervals, "signatures": signatures}))
    else:
        print(_score_table(scores))


def _score_table(scores: "Mapping[str, Scores]") -> str:
    """Return every value with its bootstrap interval, and the metrics' signatures."""
    from softprompt.report.tables import aligned

    rows = [("metric", "value", "95 % interval")]
    for metric in scores.values():
        intervals = metric.intervals()
        for name, value in metric.values().items():
            low, high = intervals[name]
            rows.append((name, f"{value:.4f}", f"{low:.4f} to {high:.4f}"))
    lines = ["  ".join(line) for line in aligned(rows)]
    lines += [f"{name}: {one.signature}" for name, one in scores.items() if one.signature]
    return "\n".join(lines)


def _difference_table(
    ours: "Mapping[str, Scores]",
    theirs: "Mapping[str, Scores]",
    differences: "Mapping[str, Difference]",
) -> str:
    """Return the values of two systems and their differences."""
    from softprompt.report.tables import aligned

    rows = [("metric", "this", "the other", "difference", "95 % interval", "p")]
    for name in ours:
        values, others = ours[name].values(), theirs[name].values()
        for key, value in values.items():
            found = differences[key]
            cells = f"{value:.4f}", f"{others[key]:.4f}", f"{found.difference:+.4f}"
            low, high = found.interval
            rows.append((key, *cells, f"{low:+.4f} to {high:+.4f}", f"{found.p_value:.3f}"))
    return "\n".join("  ".join(line) for line in aligned(rows))


def _prompt_and_inputs(options: argparse.Namespace) -> "tuple[TrainedPrompt, list[Record]]":
    """The prompt of a command, and the inputs given to it as words or with --input."""
    if bool(options.words) == bool(options.input):
        raise UserError("give either texts or --input FILE")
    if options.jsonl and options.input != "-":
        raise UserError("--jsonl is for standard input (--input -); a file's kind is in its name")
    prompt = _load_prompt(options)
    if options.input:
        return prompt, list(_read_inputs(prompt, options.input, options.jsonl))
    return prompt, [prompt.record(text, f"text {i}") for i, text in enumerate(options.words, 1)]


def _with_scoring(prompt: "TrainedPrompt", options: argparse.Namespace) -> "TrainedPrompt":
    """The prompt, labelling as --normalize and --calibrate say."""
    given: dict[str, Any] = {}
    if options.normalize:
        given["normalize"] = True
    if options.calibrate is not None:
        given["calibrate"] = options.calibrate
    if given and not prompt.task.labels:
        raise UserError("--normalize and --calibrate are for a prompt of labels")
    return dataclasses.replace(prompt, scoring=prompt.scoring.model_copy(update=given))


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


def inspect(options: argparse.Namespace) -> None:
    """`softprompt inspect RUN`."""
    from softprompt.inference.inspect import nearest_tokens

    prompt = _load_prompt(options)
    tokens = nearest_tokens(prompt, options.nearest)
    about = {key: prompt.description[key] for key in ("experiment", "step", "validation")}
    print(f"{len(tokens)} virtual tokens on {prompt.base.name}, {json.dumps(about)}")
    print(f"{'':>4}  {'norm':>7}  nearest tokens (cosine similarity)")
    for number, token in enumerate(tokens):
        near = "  ".join(f"{text!r} {similarity:.2f}" for text, similarity in token.nearest)
        print(f"{number:>4}  {token.norm:>7.3f}  {near}")


def compare(options: argparse.Namespace) -> None:
    """`softprompt compare EXPERIMENT`."""
    from softprompt.storage.files import write_file
    from softprompt.sweep.comparison import compare, table

    folder = options.folder or Path("runs") / "compare" / options.experiment.stem
    rows = compare(options.experiment, options.methods, options.seeds, options.words, folder)
    for name, form in (("compare.md", "markdown"), ("compare.csv", "csv")):
        write_file(folder / name, table(rows, form) + "\n")
    print(table(rows, "text"))


def runs(options: argparse.Namespace) -> None:
    """`softprompt runs`."""
    from softprompt.report.collect import collect, varied
    from softprompt.report.tables import chosen_rows, run_rows, table

    records = collect(options.folders or [Path("runs")])
    asked = [condition.partition("=")[0] for condition in options.where]
    rows = run_rows(records, varied(records, [*asked, options.sort]))
    rows = chosen_rows(rows, options.where, options.sort, reverse=options.reverse)
    if not rows:
        print_line(f"none of {len(records)} runs")
    elif options.json:
        for row in rows:
            print(json.dumps(row))
    else:
        print(table(rows, "text"))


def report(options: argparse.Namespace) -> None:
    """`softprompt report FOLDER...`."""
    from softprompt.report.page import write_report

    print(write_report(options.folders, options.output or options.folders[0]))


def export(options: argparse.Namespace) -> None:
    """`softprompt export RUN DIR`."""
    from softprompt.interop.export import export, push

    export(_load_prompt(options), options.folder, options.format)
    print(options.folder)
    if options.push:
        print(push(options.folder, options.push))


def import_(options: argparse.Namespace) -> None:
    """`softprompt import SOURCE DIR`."""
    from softprompt.backbones.loading import load_base
    from softprompt.experiment.reading import load_experiment
    from softprompt.interop.importing import import_prompt

    experiment = load_experiment(options.experiment) if options.experiment else None
    name = options.base or (experiment.base if experiment else None)
    if name is None:
        raise UserError("give the base model with --base, or an experiment that names it")
    base = load_base(name, **(experiment.compute.model_dump() if experiment else {}))
    import_prompt(options.source, options.folder, base, experiment)
    print(options.folder)


def _load_prompt(options: argparse.Namespace) -> "TrainedPrompt":
    from softprompt.inference.prompt import load_prompt

    return load_prompt(options.run, options.base)
