"""Draw the results of sweeps and comparisons: the model's quality by factor, or by manifest.

This module must not compute measurements.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from swsurgery.errors import escape_control
from swsurgery.model.text import describe_measured_text
from swsurgery.scanning.comparison import ComparedModel, Comparison
from swsurgery.scanning.figures.sheet import (
    BLACK,
    BLUE,
    BOTTOM,
    GREY,
    PALE,
    RIGHT,
    TOP,
    VERMILION,
    Mark,
    add_panels,
    check_figure_path,
    draw_legend,
    format_tick,
    make_sheet,
    save_figure,
    set_own_style,
    write_note,
)
from swsurgery.scanning.report import Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMALL_ROW = 14
"""Height in pixels of one line of the names of compared models."""

BASE = Mark("as stored (factor 1)", "D", VERMILION, VERMILION)
SCALED = Mark("scaled", "o", BLUE, BLUE)
NOT_FINITE = Mark("not finite", "X", BLACK, BLACK)


def plot_sweep(report: Sweep, path: Path, model: str | None = None) -> None:
    """Draw perplexity, KL(base || scaled) and stop-word mass by factor, and write the figure to `path`.

    The axis of perplexity is logarithmic. The point at factor 1 is the base. A value that is not finite is a gap in the
    line, with a cross at the top of the panel. Grey lines are 95% intervals. `model` begins the title. An existing file
    is replaced. Raises TargetError for the same reasons as `plot_scan`.
    """
    check_figure_path(path)
    with set_own_style():
        names = [*map(str, report.coordinates), *report.regions]
        scaled = names[0] if len(names) == 1 else f"{len(names)} {'targets' if report.regions else 'scalars'}"
        paper = make_sheet(f"{model}: {scaled}, scaled" if model else f"{scaled}, scaled")
        points = sorted([*(p for p in report.points if p.factor != 1), report.base], key=lambda point: point.factor)
        factors = [point.factor for point in points]
        curves = {
            "perplexity": [point.perplexity if point.finite else math.nan for point in points],
            "KL(base || scaled)\nnats a token": [point.kl if point.finite else math.nan for point in points],
            "stop-word mass": [point.stopword_mass if point.finite else math.nan for point in points],
        }
        panels = add_panels(paper, TOP, len(curves))
        for panel, (name, values) in zip(panels, curves.items(), strict=True):
            panel.set_ylabel(name)
            _draw_curve(panel, factors, values)
        for point in points:
            _draw_interval(panels[0], point.factor, *_scale(report.base.perplexity, point.ratio_low, point.ratio_high))
            _draw_interval(panels[1], point.factor, point.kl_low, point.kl_high)
        _set_log_scale(panels[0], curves["perplexity"])
        _write_values(panels[0], factors, curves["perplexity"])
        for panel in panels[1:]:
            panel.set_ylim(0, max(panel.get_ylim()[1], 1e-3))
        panels[-1].set_xlabel("factor")
        gap = any(not math.isfinite(value) for values in curves.values() for value in values)
        draw_legend(paper, TOP, [BASE, SCALED, NOT_FINITE] if gap else [BASE, SCALED])
        write_note(paper, _describe_measurement(report))
        save_figure(paper, path)


def plot_comparison(report: Comparison, path: Path) -> None:
    """Draw perplexity, KL(base || model) and stop-word mass of each model, with 95% intervals, and write the figure.

    The models are in the order of the report, from left to right; the base is the first. A value that is not finite is
    left out. Raises TargetError for the same reasons as `plot_scan`.
    """
    check_figure_path(path)
    with set_own_style():
        models = report.models
        paper = make_sheet(f"{report.base}: {len({m.manifest for m in models}) - 1} manifests compared")
        base = models[0].perplexity
        figures: dict[str, list[tuple[float, float | None, float | None]]] = {
            "perplexity": [(m.perplexity, *_scale(base, m.ratio_low, m.ratio_high)) for m in models],
            "KL(base || model)\nnats a token": [(m.kl, m.kl_low, m.kl_high) for m in models],
            "stop-word mass": [(m.stopword_mass, None, None) for m in models],
        }
        panels = add_panels(paper, TOP, len(figures))
        for panel, (name, values) in zip(panels, figures.items(), strict=True):
            panel.set_ylabel(name)
            for at, (value, low, high) in enumerate(values):
                if math.isfinite(value):
                    (BASE if at == 0 else SCALED).draw(panel, [at], [value])
                _draw_interval(panel, at, low, high)
        _set_log_scale(panels[0], [value for value, _, _ in figures["perplexity"]])
        for panel in panels[1:]:
            panel.set_ylim(0, max(panel.get_ylim()[1], 1e-3))
        panels[-1].set_xlim(-0.5, len(models) - 0.5)
        panels[-1].set_xticks(range(len(models)), [str(number) for number in range(len(models))])
        _list_models(paper, models)
        write_note(paper, _describe_measurement(report))
        save_figure(paper, path)


def _describe_measurement(report: Sweep | Comparison) -> str:
    """Describe the text, the protocol, the dtype and the device of a report in one line."""
    text = f"{describe_measured_text(report)}, {report.protocol.describe()}, text sha256 {report.text_sha256[:12]}"
    return f"{text}, {report.dtype} on {report.device}"


def _list_models(paper: Axes, models: Sequence[ComparedModel]) -> None:
    """Write the number and the name of each model beside the panels; models without room there are only counted."""
    labels = [textwrap.wrap(_name_model(number, model), 30) for number, model in enumerate(models)]
    y, gap = float(TOP - 8), SMALL_ROW / 2
    for number, lines in enumerate(labels):
        rest = sum(len(each) * SMALL_ROW + gap for each in labels[number:])
        if len(lines) * SMALL_ROW + SMALL_ROW > y - BOTTOM and rest > y - BOTTOM:
            paper.text(RIGHT + 12, y, f"and {len(labels) - number} more", verticalalignment="top", fontsize=8)
            return
        paper.text(RIGHT + 12, y, "\n".join(lines), verticalalignment="top", fontsize=8)
        y -= len(lines) * SMALL_ROW + gap


def _name_model(number: int, model: ComparedModel) -> str:
    """Return the label of a model: its number on the axis, its manifest, and its rounding or control."""
    name = "base" if model.manifest is None else Path(model.manifest).stem
    rounded = "" if model.activations == "as computed" else f", {model.activations}"
    control = "" if model.control is None else f", control: {model.control}"
    return escape_control(f"{number}  {name}{rounded}{control}")


def _scale(base: float, low: float | None, high: float | None) -> tuple[float | None, float | None]:
    return (None if low is None else base * low, None if high is None else base * high)


def _draw_interval(panel: Axes, x: float, low: float | None, high: float | None) -> None:
    """Draw an interval as a vertical line, if both ends are known and finite."""
    if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
        panel.plot([x, x], [low, high], color=GREY, zorder=1)


def _draw_curve(panel: Axes, factors: Sequence[float], values: Sequence[float]) -> None:
    finite = [math.isfinite(value) for value in values]
    panel.plot(factors, [v if ok else math.nan for v, ok in zip(values, finite, strict=True)], color=BLUE, zorder=3)
    panel.axvline(1, color=GREY, linewidth=0.7, zorder=1)
    panel.grid(axis="y", color=PALE, linewidth=0.6)
    panel.yaxis.set_major_formatter(format_tick)
    for factor, value, ok in zip(factors, values, finite, strict=True):
        if ok:
            (BASE if factor == 1 else SCALED).draw(panel, [factor], [value])
        else:
            panel.axvline(factor, color=GREY, linewidth=0.7, linestyle=(0, (2, 3)), zorder=1)
            NOT_FINITE.draw(panel, [factor], [0.97]).set_transform(panel.get_xaxis_transform())


def _set_log_scale(panel: Axes, values: Iterable[float]) -> None:
    """Make the y axis of a panel logarithmic, with at least two round ticks even if the values are almost equal."""
    finite = [value for value in values if math.isfinite(value) and value > 0] or [1.0]
    low, high = min(finite) / 1.4, max(finite) * 1.7
    widen = max(1.0, math.sqrt(6 / (high / low)))
    low, high = low / widen, high * widen
    panel.set_yscale("log")
    steps = (1, 2, 5) if high / low < 150 else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    panel.set_yticks([s * 10.0**n for n in decades for s in steps if low <= s * 10.0**n <= high])
    panel.set_yticks([], minor=True)
    panel.yaxis.set_major_formatter(format_tick)
    panel.set_ylim(low, high)


def _write_values(panel: Axes, factors: Sequence[float], values: Sequence[float]) -> None:
    """Write the values above their points, except values that would overlap a value already written.

    The order is: the value of the base, the lowest and the highest value, then all other values.
    """
    points = [(f, v) for f, v in zip(factors, values, strict=True) if math.isfinite(v)]
    best, worst = min((v for _, v in points), default=0), max((v for _, v in points), default=0)
    points.sort(key=lambda point: (point[0] != 1, point[1] not in (best, worst)))
    width = (max(factors) - min(factors)) or 1.0
    taken: list[float] = []
    for factor, value in points:
        if all(abs(factor - other) / width > 0.055 for other in taken):
            taken.append(factor)
            panel.annotate(
                format_tick(value),
                (factor, value),
                xytext=(0, 7),
                textcoords="offset points",
                horizontalalignment="center",
                zorder=4,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
