"""The figures of a report, as SVG elements for an HTML page."""

import io
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from softprompt.experiment.metric_names import lower_is_better
from softprompt.report.collect import RunRecord
from softprompt.report.rows import PATH_COLUMNS, seed_rows
from softprompt.report.tables import cell, shorten, shorten_path
from softprompt.training.curves import step_ticks

STYLE: Any = {  # matplotlib settings that the caller activates around these functions
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa3ad",
    "axes.labelcolor": "#37414b",
    "xtick.color": "#37414b",
    "ytick.color": "#37414b",
    "grid.color": "#e3e7eb",
    "svg.fonttype": "none",
    "text.parse_math": False,
}
_COLORS = ["#1f6feb", "#d9480f", "#2b8a3e", "#862e9c", "#c2255c", "#0b7285", "#a16207", "#495057"]
_SHADES = "viridis"
_LABEL = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1}  # behind a text on lines
MAX_LINES = len(_COLORS)  # in `spread_figure`
_MAX_LEGEND = 12  # entries in the legend of the learning curves
MAX_CELLS = 30  # in a row or a column of `heat_map`
MAX_SETTINGS = 10  # in `parallel_coordinates`
_MAX_COLUMN_CHARACTERS = 10  # of a label of a column in `heat_map`; longer ones are rotated
_MAX_POINTS = 20_000  # of all learning curves in a panel together
_MAX_TICK_CHARACTERS = 60  # of all tick labels together; longer labels are rotated
_CHARACTER = 0.015  # width of a character of a tick label, relative to the axis
_LINE = 0.05  # height of a line of text, relative to the axis
_FEW = 8  # labels on an axis of `parallel_coordinates` that may be as close as lines of text
_LARGEST = 1e100  # numbers beyond are not drawn, because arithmetic with them may overflow


def spread_figure(records: Sequence[RunRecord], axis: str, others: Sequence[str]) -> str:
    """Plot the metric against a setting: the mean over seeds, their range, and every run.

    Args:
      records: finished runs.
      axis: the setting, numeric or not. Only numeric values are joined by lines.
      others: settings that also differ; each of their combinations gets its own line.

    Returns:
      The SVG element.
    """
    metric = _metric(records)
    lines: dict[str, list[RunRecord]] = {}
    for record in records:
        lines.setdefault(_line_label(record, others), []).append(record)
    values = _ordered({_key(r.settings.get(axis)): r.settings.get(axis) for r in records})
    numeric = all(map(is_drawable, values))
    positions = values if numeric else list(range(len(values)))
    position = {_key(value): x for value, x in zip(values, positions, strict=True)}
    figure, axes = _figure(7.4, 4.2)
    for (name, group), color in zip(lines.items(), _COLORS, strict=False):
        rows = sorted(seed_rows(group, [axis]), key=lambda row: position[_key(row[axis])])
        x = [position[_key(row[axis])] for row in rows]
        means = [row["mean"] for row in rows]
        low, high = [row["lowest"] for row in rows], [row["highest"] for row in rows]
        if numeric:
            axes.fill_between(x, low, high, color=color, alpha=0.14, linewidth=0)
        else:
            axes.vlines(x, low, high, color=color, alpha=0.4)
        axes.plot(
            x,
            means,
            linestyle="-" if numeric else "none",
            color=color,
            marker="o",
            markersize=4.5,
            label=name or None,
        )
        runs_x = [position[_key(r.settings.get(axis))] for r in group]
        axes.scatter(runs_x, [r.quality or 0 for r in group], 12, color, alpha=0.45, linewidth=0)
    logarithmic = numeric and min(positions) > 0 and max(positions) / min(positions) >= 10
    if logarithmic:
        axes.set_xscale("log")
    if numeric:
        axes.minorticks_off()
    texts = [_tick(value, axis) for value in values]
    rotated = sum(map(len, texts)) > _MAX_TICK_CHARACTERS and not numeric
    if rotated:
        axes.tick_params("x", rotation=20)
    heights = _normalized(np.log(positions) if logarithmic else np.array(positions, np.float64))
    least = _LINE if rotated else _CHARACTER * (2 + max(map(len, texts)))
    shown = _apart(heights.tolist(), least)
    axes.set_xticks([positions[i] for i in shown], [texts[i] for i in shown])
    axes.set(xlabel=axis, ylabel=metric)
    if others:
        axes.legend(frameon=False, fontsize=9)
    return _svg(figure, f"spread {axis}")


def curves_figure(records: Sequence[RunRecord], axis: str | None) -> str:
    """Plot the training loss and the validation metric against steps, one line per run.

    Args:
      records: any runs.
      axis: the setting shown by the color of a line, or None.

    Returns:
      The SVG element.
    """
    metric = records[0].metric
    of_runs = [record.settings.get(axis) if axis else None for record in records]
    values = _ordered({_key(value): value for value in of_runs})
    shades = matplotlib.colormaps[_SHADES](np.linspace(0.05, 0.85, max(len(values), 1)))
    colors = dict(zip(map(_key, values), shades, strict=True))
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    panels = [("train", "loss"), ("validation", metric)]
    steps = [[r["step"] for run in records for r in run.records if _has(r, *p)] for p in panels]
    ticks = step_ticks(steps[1] or steps[0])
    most = max(2, _MAX_POINTS // len(records))
    for axes, (split, name) in zip(figure.subplots(1, 2), panels, strict=True):
        for record, value in zip(records, of_runs, strict=True):
            points = [
                (r["step"], r[name] if is_drawable(r[name]) else math.nan)
                for r in record.records
                if _has(r, split, name)
            ]
            if not points:
                continue
            marker = "o" if split == "validation" or len(points) == 1 else None
            axes.plot(
                *zip(*_thinned(points, most), strict=True),
                color=colors[_key(value)],
                alpha=0.75,
                linewidth=1.2,
                marker=marker,
                markersize=3.5,
            )
        _style_axes(axes)
        axes.set(xlabel="step", ylabel=f"{split} {name}")
        axes.set_xticks(ticks)
    if axis and 1 < len(values) <= _MAX_LEGEND:
        names = [Line2D([], [], color=colors[_key(value)]) for value in values]
        figure.legend(
            names,
            [_tick(value, axis) for value in values],
            title=axis,
            loc="outside right upper",
            frameon=False,
            fontsize=8,
            title_fontsize=8,
        )
    return _svg(figure, "curves")


def heat_map(records: Sequence[RunRecord], rows: str, columns: str) -> str:
    """Plot the metric for two settings: the mean over all runs with the same two values.

    Args:
      records: finished runs.
      rows: the setting of the rows.
      columns: the setting of the columns.

    Returns:
      The SVG element.
    """
    ys = _ordered({_key(r.settings.get(rows)): r.settings.get(rows) for r in records})
    xs = _ordered({_key(r.settings.get(columns)): r.settings.get(columns) for r in records})
    means = np.full((len(ys), len(xs)), np.nan)
    for row in seed_rows(records, [rows, columns]):
        y = [_key(value) for value in ys].index(_key(row[rows]))
        x = [_key(value) for value in xs].index(_key(row[columns]))
        means[y, x] = row["mean"]
    figure, axes = _figure(max(4.6, 2.4 + 0.95 * len(xs)), 1.5 + 0.5 * len(ys))
    axes.grid(False)
    axes.imshow(_merit(means, records), cmap=_SHADES, aspect="auto")
    shown = _merit(means, records)
    middle = (np.nanmin(shown) + np.nanmax(shown)) / 2
    for (y, x), value in np.ndenumerate(means):
        if np.isfinite(value):
            dark = shown[y, x] <= middle
            axes.text(x, y, f"{value:.3f}", ha="center", va="center", color="w" if dark else "k")
    texts = [_tick(value, columns) for value in xs]
    axes.set_xticks(range(len(xs)), texts)
    if max(map(len, texts)) > _MAX_COLUMN_CHARACTERS:
        axes.tick_params("x", rotation=20)
    axes.set_yticks(range(len(ys)), [_tick(value, rows) for value in ys])
    axes.set(xlabel=columns, ylabel=rows, title=_metric(records))
    return _svg(figure, f"heat {rows} {columns}")


def parallel_coordinates(records: Sequence[RunRecord], keys: Sequence[str]) -> str:
    """Plot one line per run through its settings and its metric; lighter lines are better.

    Args:
      records: finished runs.
      keys: the settings, at least one.

    Returns:
      The SVG element.
    """
    figure, axes = _figure(max(7.4, 1.8 * (len(keys) + 1)), 4.4)
    axes.grid(False)
    quality = np.array([record.quality for record in records], np.float64)
    scales = [_scale([r.settings.get(key) for r in records], key) for key in keys]
    scales.append(_scale([float(value) for value in quality], _metric(records)))
    merit = _normalized(_merit(quality, records))
    for number in np.argsort(merit):
        heights = [heights[number] for heights, _ in scales]
        color = matplotlib.colormaps[_SHADES](0.05 + 0.85 * merit[number])
        axes.plot(range(len(scales)), heights, color=color, alpha=0.8, linewidth=1.4)
    for x, (_, ticks) in enumerate(scales):
        axes.axvline(x, color="#9aa3ad", linewidth=0.8)
        least = _LINE if len(ticks) <= _FEW else 3 * _LINE
        shown = _apart([height for height, _ in ticks], least)
        for height, text in (ticks[i] for i in shown):
            axes.text(x - 0.03, height, text, ha="right", va="center", fontsize=8.5, bbox=_LABEL)
    axes.set_xticks(range(len(scales)), [_in_lines(name) for name in [*keys, _metric(records)]])
    axes.set_yticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xlim(-0.6, len(scales) - 0.7)
    return _svg(figure, "parallel")


def _scale(values: Sequence[Any], key: str) -> tuple[list[float], list[tuple[float, str]]]:
    """Place the values of a setting on an axis from 0 to 1.

    Numbers that span a factor of 10 or more are placed on a logarithmic axis.

    Returns:
      The height of each value, and the height and text of each tick.
    """
    if not all(is_drawable(v) and not isinstance(v, bool) for v in values):
        names = _ordered({_key(value): value for value in values})
        keys = [_key(name) for name in names]
        step = 1 / max(len(names) - 1, 1)
        ticks = [(i * step, _tick(name, key, 18)) for i, name in enumerate(names)]
        return [keys.index(_key(value)) * step for value in values], ticks
    numbers = np.array(values, np.float64)
    logarithmic = numbers.min() > 0 and numbers.max() / numbers.min() >= 10
    heights = _normalized(np.log(numbers) if logarithmic else numbers)
    texts = {round(float(h), 4): cell(v) for h, v in zip(heights, values, strict=True)}
    return heights.tolist(), sorted(texts.items())


def _apart(heights: Sequence[float], least: float) -> list[int]:
    """Choose labels that do not overlap: the lowest, the highest, and others between them.

    Args:
      heights: ascending.
      least: the smallest distance between two labels.

    Returns:
      The indices of the labels to show.
    """
    last = len(heights) - 1
    chosen = [0]
    for i in range(1, last):
        if heights[i] - heights[chosen[-1]] >= least and heights[last] - heights[i] >= least:
            chosen.append(i)
    return chosen if last == 0 else [*chosen, last]


def is_drawable(value: Any) -> bool:
    """Whether a value is a number that a figure can show."""
    return isinstance(value, int | float) and abs(value) < _LARGEST


def _thinned(points: Sequence[tuple[int, float]], most: int) -> list[tuple[int, float]]:
    """At most this many of the points, at regular distances, with the last one."""
    stride = -(-len(points) // most)
    return list(reversed(points[::-1][::stride]))


def _normalized(numbers: np.ndarray) -> np.ndarray:
    low, high = np.nanmin(numbers), np.nanmax(numbers)
    return np.full(numbers.shape, 0.5) if low == high else (numbers - low) / (high - low)


def _merit(values: np.ndarray, records: Sequence[RunRecord]) -> np.ndarray:
    return -values if lower_is_better(records[0].metric) else values


def _metric(records: Sequence[RunRecord]) -> str:
    return f"{records[0].split} {records[0].metric}"


def _line_label(record: RunRecord, keys: Sequence[str]) -> str:
    label = ", ".join(f"{key} {_tick(record.settings.get(key), key)}" for key in keys)
    return shorten(label)


def _tick(value: Any, key: str, width: int = 24) -> str:
    return (shorten_path if key in PATH_COLUMNS else shorten)(cell(value), width)


def _in_lines(key: str) -> str:
    """A name under an axis, on a line of its own after each dot."""
    return "\n".join(shorten(part, 24) for part in key.replace(".", ".\n").split("\n"))


def _key(value: Any) -> str:
    return json.dumps(value)


def _ordered(values: Mapping[str, Any]) -> list[Any]:
    """Distinct values: numbers in ascending order, others in order of appearance."""
    found = list(values.values())
    numeric = all(map(is_drawable, found))
    return sorted(found) if numeric else found


def _has(record: Mapping[str, Any], split: str, name: str) -> bool:
    return record["split"] == split and name in record


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    _style_axes(axes)
    return figure, axes


def _style_axes(axes: Axes) -> None:
    axes.grid(True, linewidth=0.8)
    axes.set_axisbelow(True)


def _svg(figure: Figure, name: str) -> str:
    """The `<svg>` element; the name makes its ids differ from those of other figures.

    On a narrow page it becomes at most a quarter smaller, so that its text can be read.
    """
    written = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        # The browser chooses the fonts, so a character that matplotlib's font lacks is no problem.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(written, format="svg", metadata=no_metadata, transparent=True)
    text = written.getvalue()
    least = f'<svg style="min-width: {0.75 * 72 * figure.get_figwidth():.0f}pt"'
    return text[text.index("<svg") :].replace("<svg", least, 1)
