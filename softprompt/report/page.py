"""The report: a self-contained HTML page, and its tables as CSV and Markdown."""

import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

from softprompt.data.splits import read_split
from softprompt.errors import FolderError, UserError
from softprompt.experiment.methods import method_class
from softprompt.experiment.reading import load_experiment
from softprompt.files.folders import require_usable
from softprompt.files.reading import read_text
from softprompt.files.writing import write_errors, write_file
from softprompt.inference.inspect import nearest_tokens
from softprompt.inference.prompt import TrainedPrompt, load_prompt
from softprompt.report import figures
from softprompt.report.collect import RunRecord, best, collect, varied
from softprompt.report.rows import PATH_COLUMNS, run_rows, seed_rows
from softprompt.report.tables import cell, shorten, shorten_path, table

_log = logging.getLogger(__name__)

_PAGE = "report.html"
_FORMS = {"csv": "csv", "md": "markdown"}  # by file extension
_SAMPLES = 8  # number of predictions on the page
_TOKENS = 20  # number of virtual tokens on the page
_MAX_CELL = 100  # characters
_MAX_TEXT = 2_000  # characters of an input, a prediction, or an error
_MAX_CONFIG = 20_000  # characters


def write_report(paths: Sequence[Path], folder: Path, rerun_command: Callable[[Path], str]) -> Path:
    """Write `report.html`, `runs.csv`, `runs.md`, `settings.csv` and `settings.md` to a folder.

    Args:
      paths: folders of runs or sweeps; see `collect`.
      folder: where to write; it is created if necessary.
      rerun_command: gives the command that repeats a run, from the path of its `config.yaml`.

    Returns:
      The path of the page.

    Raises:
      UserError: if there are no runs, or the folder cannot be written.
      FolderError: if the folder has files with these names that are not from a report.
    """
    require_usable(folder)
    everything = collect(paths)
    metric = everything[0].metric
    records = [record for record in everything if record.metric == metric]
    if others := len(everything) - len(records):
        _log.info(
            f"runs with a metric other than {metric}: {others} (only in the table of all runs)"
        )
    keys = varied(records)
    rows, by_settings = run_rows(everything, varied(everything), folder), seed_rows(records, keys)
    tables = {"runs": rows, "settings": by_settings}
    _require_report(folder, [_PAGE, *(f"{name}.{end}" for name in tables for end in _FORMS)])
    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"cell": _cell, "excerpt": _excerpt}
    page = environment.from_string(template).render(
        title=shorten(_title(records), _MAX_CELL),
        facts=_facts(records),
        metric=metric,
        figures=_figures(records),
        by_settings=by_settings,
        paths=PATH_COLUMNS,
        rows=[{k: v for k, v in row.items() if k != "error"} for row in rows],
        failures={row["run"]: row["error"] for row in rows if row.get("error")},
        best=_best_run(records, keys, rerun_command),
    )
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, of_table in tables.items():
            if of_table:
                for end, form in _FORMS.items():
                    text = table(of_table, form, left={"error"}, paths=PATH_COLUMNS)
                    write_file(folder / f"{name}.{end}", text + "\n")
        write_file(folder / _PAGE, page)
    return folder / _PAGE


def _require_report(folder: Path, names: Sequence[str]) -> None:
    """Require that files with these names, if they exist, come from an earlier report."""
    page, there = folder / _PAGE, [folder / name for name in names if (folder / name).exists()]
    ours = page.is_file() and "· softprompt</title>" in page.read_text("utf-8", errors="replace")
    if there and not ours:
        raise FolderError(f"{there[0]}: not written by a report; choose another folder")


def _cell(value: Any, is_path: bool = False) -> str:
    """A cell of a table, on one line."""
    return (shorten_path if is_path else shorten)(cell(value), _MAX_CELL)


def _excerpt(text: str, limit: int = _MAX_TEXT) -> str:
    """The beginning of a text, with its line breaks."""
    lines = text[:limit].split("\n")
    kept = "\n".join(shorten(line, None) for line in lines)
    return kept if len(text) <= limit else f"{kept}… ({len(text):,} characters)"


def _title(records: Sequence[RunRecord]) -> str:
    return ", ".join(dict.fromkeys(record.settings["name"] for record in records))


def _facts(records: Sequence[RunRecord]) -> dict[str, str]:
    """Key figures of the runs, by label."""
    states = [record.state for record in records]
    seconds = [record.seconds for record in records if record.seconds is not None]
    memory = [r.peak_memory_bytes for r in records if r.peak_memory_bytes is not None]
    facts = {
        "runs": ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)),
        "method": ", ".join(
            dict.fromkeys(method_class(r.settings["method"]).label for r in records)
        ),
        "base model": ", ".join(dict.fromkeys(Path(r.settings["base"]).name for r in records)),
        "steps": f"{sum(record.step for record in records):,}",
    }
    if seconds:
        facts["training"] = f"{sum(seconds) / 60:,.1f} min"
    if memory:
        facts["peak memory"] = f"{max(memory) / 1e9:.2f} GB"
    return {name: shorten(fact, _MAX_CELL) for name, fact in facts.items()}


def _figures(records: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """Pairs of a caption and a figure."""
    finished = [r for r in records if r.state == "finished" and figures.is_drawable(r.quality)]
    keys, axis, found = varied(finished), _main_setting(finished), []
    others = [key for key in keys if key != axis]
    lines = _combinations(finished, others)
    with matplotlib.rc_context(figures.STYLE):
        if axis:
            by = others if lines <= figures.MAX_LINES else []
            caption = f"{axis}: mean over the runs, and the range from the worst to the best run"
            found.append((caption, figures.spread_figure(finished, axis, by)))
        if len(keys) == 2 and _fills_heat_map(finished, keys):
            found.append((f"{keys[0]} and {keys[1]}", figures.heat_map(finished, keys[0], keys[1])))
        if len(keys) > 1:
            shown = keys[: figures.MAX_SETTINGS]
            part = "its" if shown == keys else f"the first {len(shown)} of {len(keys)}"
            caption = f"one line per run through {part} settings; lighter lines are better"
            found.append((caption, figures.parallel_coordinates(finished, shown)))
        if any(record.records for record in records):
            found.append(
                ("learning curves", figures.curves_figure(records, _main_setting(records)))
            )
    return found


def _main_setting(records: Sequence[RunRecord]) -> str | None:
    """The setting of the main figure: the prompt length, or the setting with most values."""
    keys = varied(records)
    if "prompt.length" in keys:
        return "prompt.length"
    return max(keys, key=lambda key: _combinations(records, [key]), default=None)


def _combinations(records: Sequence[RunRecord], keys: Sequence[str]) -> int:
    """The number of possible combinations of the values of some settings."""
    return math.prod(len({json.dumps(r.settings.get(key)) for r in records}) for key in keys)


def _fills_heat_map(records: Sequence[RunRecord], keys: Sequence[str]) -> bool:
    """Whether at least half of a heat map for two settings is filled, and it is not too large."""
    sizes = [_combinations(records, [key]) for key in keys]
    if max(sizes) > figures.MAX_CELLS:
        return False
    return 2 * len(seed_rows(records, keys)) >= math.prod(sizes)


def _best_run(
    records: Sequence[RunRecord], keys: Sequence[str], rerun_command: Callable[[Path], str]
) -> dict[str, Any] | None:
    """The best run: settings, metrics, command, predictions and nearest tokens."""
    found = best(records)
    if found is None:
        return None
    about: dict[str, Any] = {
        "run": str(found.folder),
        "settings": {key: found.settings.get(key) for key in [*keys, "seed"]},
        "validation": found.validation,
        "test": found.test,
        "forgetting": found.forgetting,
        "command": rerun_command(found.folder / "config.yaml"),
        "config": _excerpt(read_text(found.folder / "config.yaml"), _MAX_CONFIG),
        "tokens": [],
        "samples": [],
    }
    try:
        prompt = load_prompt(found.folder)
        about["samples"] = _samples(prompt, found)
        if prompt.method.plain_vectors() is not None:
            about["tokens"] = nearest_tokens(prompt, 5)[:_TOKENS]
    except UserError as error:
        _log.info(f"{found.folder}: no predictions or nearest tokens on the page ({error})")
    return about


def _samples(prompt: TrainedPrompt, found: RunRecord) -> list[dict[str, str]]:
    """Inputs, references and predictions of the first validation examples."""
    experiment = load_experiment(found.folder / "config.yaml")
    records = read_split(experiment, "validation")[:_SAMPLES]
    task = prompt.task
    if task.labels:
        examples = list(task.examples(records))
        references = [task.labels[example.answer or 0] for example in examples]
        predictions = [prediction.label for prediction in prompt.classify(records)]
    else:
        references = [task.reference(record) for record in records]
        predictions = [generated.text.strip() for generated in prompt.generate(records)]
    inputs = ["\n".join(task.input_fields(record).values()) for record in records]
    return [
        {"input": text, "reference": reference, "prediction": prediction}
        for text, reference, prediction in zip(inputs, references, predictions, strict=True)
    ]
