"""Draw the result of a scan: the candidates and parts of each layer, the profile of the layers, and the labels.

This module must not compute measurements.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from swsurgery.errors import escape_control, pluralise
from swsurgery.scanning.activation_report import Appearance, PersistentActivation
from swsurgery.scanning.causal_report import Verdict
from swsurgery.scanning.expert_report import ExpertScan
from swsurgery.scanning.figures.sheet import (
    BLACK,
    BLUE,
    BOTTOM,
    GREY,
    HEIGHT,
    LEFT,
    MAX_LABELS,
    ORANGE,
    PALE,
    RIGHT,
    ROW,
    TOP,
    VERMILION,
    Mark,
    add_panels,
    check_figure_path,
    draw_legend,
    format_tick,
    make_sheet,
    measure_width,
    save_figure,
    set_own_style,
    write_note,
)
from swsurgery.scanning.part_report import ModelPart, PartTrial
from swsurgery.scanning.report import Candidate, Profile, Scan

if TYPE_CHECKING:
    from matplotlib.axes import Axes


VERDICT_MARKS: dict[Verdict | None, Mark] = {
    "needed alone": Mark("needed alone", "D", VERMILION, VERMILION),
    "needed jointly": Mark("needed jointly", "^", BLACK, ORANGE),
    None: Mark("not tested", "s", VERMILION, "white"),
    "untested": Mark("untested", "v", BLACK, "white"),
    "inert": Mark("inert", "o", GREY, "white"),
}
"""The marker of each verdict. Candidates get labels in this order of verdicts. None means that the causal test was not
run, and "untested" means that it was run but allowed no verdict."""


class Found(NamedTuple):
    """A scalar or another part of the model to mark in the figure.

    `verdict` is None if the causal test was not run. `inputs`, `outputs` and `residuals` are the values that are marked
    in the panels of these names; None if there is nothing to mark. `z` is the robust z-score in a scan by weights.
    """

    name: str
    layer: int
    verdict: Verdict | None
    inputs: float | None = None
    outputs: float | None = None
    residuals: float | None = None
    z: float | None = None


def plot_scan(report: Scan, path: Path, model: str | None = None) -> None:
    """Draw the measurements of a scan by layer, mark its candidates and parts, and write the figure to `path`.

    For a scan by activations, three panels show the largest input and the largest output of the down projection and the
    largest hidden state after the layer (arXiv:2411.07191, figures 3 to 5). The values are signed, on a scale that
    shows both 100 and 20,000. A part that creates an activation is marked in the last panel, at the value that it adds.
    For a scan by weights, one panel shows the robust z-score of each candidate and the threshold `min_z` from the
    report's settings.

    `model` replaces the model type in the title. An existing file is replaced. Raises TargetError for the reasons that
    `check_figure_path` gives, and if the file cannot be written.
    """
    check_figure_path(path)
    with set_own_style():
        paper = make_sheet(f"{model or report.model_type}, {report.layers} layers: {_format_answer(report)}")
        found = _list_found(report)
        labelled = found[:MAX_LABELS]
        rows = _choose_rows(paper, labelled, report.layers)
        top = TOP - ROW * (max(rows, default=-1) + 1)
        if report.profile is None:
            panels = add_panels(paper, top, 1)
            _draw_scores(panels[0], report, found)
        else:
            panels = add_panels(paper, top, 3)
            _draw_profile(panels, report, report.profile, found)
            _name_activations(paper, panels[2], [a for a in report.activations if a.stream == "residual"])
        _set_layer_axis(panels, report.layers)
        for one, row in zip(labelled, rows, strict=True):
            _draw_label(paper, one, row, report.layers, top)
        if len(labelled) < len(found):
            write_note(paper, f"{len(found) - len(labelled)} more marked without a label")
        verdicts = {f.verdict for f in found}
        draw_legend(paper, top, [VERDICT_MARKS[v] for v in VERDICT_MARKS if v in verdicts])
        save_figure(paper, path)


def _list_found(report: Scan) -> list[Found]:
    """List what to mark, in the order of `VERDICT_MARKS`. Companions are included only if they are critical."""
    if isinstance(report, ExpertScan):
        test = report.expert_confirmation
        verdicts = {t.candidate.name: t.verdict for t in (test.trials if test else ())}
        return [_make_found(expert.cause, verdicts.get(expert.name)) for expert in report.experts]
    trials = report.confirmation.trials if report.confirmation else ()
    found = [_make_found(t.candidate, t.verdict) for t in trials if t.listed or t.verdict.startswith("needed")]
    tested = {trial.candidate.coordinate for trial in trials}
    found += [_make_found(candidate, None) for candidate in report.candidates if candidate.coordinate not in tested]
    found += [_mark_part(part, report.part_trials.get(part.name)) for part in report.parts]
    order = list(VERDICT_MARKS)
    return sorted(found, key=lambda one: order.index(one.verdict))


def _make_found(candidate: Candidate, verdict: Verdict | None) -> Found:
    expert = "" if candidate.expert is None else f" expert {candidate.expert}"
    name = f"L{candidate.layer}{expert} [{candidate.row}, {candidate.col}]"
    spikes = candidate.input_spike, candidate.output_spike
    return Found(name, candidate.layer, verdict, *spikes, z=candidate.z)


def _mark_part(part: ModelPart, trial: PartTrial | None) -> Found:
    """Mark a part by the value that it adds to the hidden state. The embedding is marked at the first layer."""
    name = str(part.name).replace("layer ", "L", 1)
    return Found(name, part.name.layer or 0, trial.verdict if trial else None, residuals=part.added)


def _format_answer(report: Scan) -> str:
    if isinstance(report, ExpertScan):
        words = pluralise(len(report.super_experts), "super expert") if report.super_experts else "no super expert"
        return f"{words} {'confirmed' if report.confirmed else 'found by experts'}"
    parts = pluralise(len(report.found_parts), "part") if report.found_parts else ""
    tested = report.part_confirmation is not None and report.part_confirmation.has_verdicts
    return _format_scalars(report) + (f", {parts} {'needed' if tested else 'not confirmed'}" if parts else "")


def _format_scalars(report: Scan) -> str:
    count, test = len(report.super_weights), report.confirmation
    words = "no super weight" if count == 0 else pluralise(count, "super weight")
    needed = sum(trial.verdict.startswith("needed") for trial in test.trials) if test else 0
    if test is not None and (needed or not count):
        return f"{pluralise(needed, 'super weight') if needed else words} confirmed"
    how = "by activations" if report.method == "activations" else "by weights alone"
    return f"{words} found {how}" + (", not confirmed" if count else "")


def _compute_x(layer: int, layers: int) -> float:
    """Compute the x position of the middle of a layer on the sheet, for the axis limits that `_set_layer_axis` sets."""
    return LEFT + (RIGHT - LEFT) * (layer + 0.5) / layers


def _set_layer_axis(panels: Sequence[Axes], layers: int) -> None:
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, layers) if layers / step <= 32)
    panels[-1].set(xlim=(-0.5, layers - 0.5), xticks=range(0, layers, step), xlabel="layer")


def _choose_rows(paper: Axes, found: Sequence[Found], layers: int) -> list[int]:
    """Choose a row for each label, so that no labels overlap. Row 0 is the lowest.

    A label is a vertical line above the layer of what is marked, with its name to the right of the upper end.
    Labels are placed from the last layer to the first. Each label gets the lowest row in which its name crosses no line
    that was placed before.
    """
    poles: list[tuple[float, int]] = []
    rows = dict.fromkeys(range(len(found)), 0)
    for number in sorted(rows, key=lambda n: (-found[n].layer, n)):
        x = _compute_x(found[number].layer, layers)
        text = paper.text(0, 0, found[number].name)
        end = x + measure_width(text) + 26
        text.remove()
        rows[number] = max((row + 1 for pole, row in poles if x <= pole < end), default=0)
        poles.append((x, rows[number]))
    return list(rows.values())


def _draw_label(paper: Axes, found: Found, row: int, layers: int, top: float) -> None:
    x, y = _compute_x(found.layer, layers), top + ROW * (row + 0.5)
    paper.plot([x, x], [BOTTOM, y], color=GREY, linewidth=0.7, zorder=0)
    VERDICT_MARKS[found.verdict].draw(paper, [x], [y])
    paper.text(x + 11, y, found.name, verticalalignment="center")


def _draw_profile(panels: Sequence[Axes], report: Scan, profile: Profile, found: Sequence[Found]) -> None:
    sides = (
        ("largest input of\nthe down projection", profile.inputs),
        ("largest output of\nthe down projection", profile.outputs),
        ("largest hidden state\nafter the layer", profile.residuals),
    )
    threshold = _find_threshold([*profile.inputs, *profile.outputs])
    spans = [
        (span.first, span.last) if one.recurring else (one.layer, one.last)
        for one in report.activations
        if one.stream == "residual"
        for span in one.appearances or (Appearance(one.layer, one.last, one.value),)
    ]
    massive = {layer for first, last in spans for layer in range(first, last + 1)}
    for panel, (name, values), key in zip(panels, sides, ("inputs", "outputs", "residuals"), strict=True):
        marked = [(one, value) for one in found if (value := getattr(one, key)) is not None]
        panel.set_ylabel(name)
        _draw_bars(panel, values, massive if panel is panels[2] else set())
        # Spikes found in later rounds may be larger than all values of the unedited model, and must fit in.
        _set_signed_scale(panel, [*values, *(value for _, value in marked)], threshold)
        for one, value in reversed(marked):  # the most important one is drawn last, on top
            if math.isfinite(value):
                VERDICT_MARKS[one.verdict].draw(panel, [one.layer], [value])


def _draw_bars(panel: Axes, values: Sequence[float], massive: Collection[int]) -> None:
    """Draw one bar per layer, blue for the layers in `massive`. Write "infinite" instead of an infinite bar."""
    colours = [BLUE if layer in massive else PALE for layer in range(len(values))]
    finite = [value if math.isfinite(value) else 0 for value in values]
    panel.bar(range(len(values)), finite, width=0.8, color=colours)
    panel.axhline(0, color=GREY, linewidth=0.8)
    for layer, value in enumerate(values):
        if math.isinf(value):
            panel.text(layer, 0, " infinite", rotation=90, horizontalalignment="center", verticalalignment="bottom")


def _find_threshold(values: Iterable[float]) -> float:
    """Round twice the median magnitude of `values` up to a power of ten. Most layers have smaller values."""
    typical = median([abs(value) for value in values if math.isfinite(value)] or [0])
    return 10.0 ** math.ceil(math.log10(2 * typical)) if typical else 1.0


def _set_signed_scale(panel: Axes, values: Iterable[float], threshold: float) -> None:
    """Scale a panel for small values and spikes of both signs: linear up to magnitude `threshold`, then logarithmic."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    largest = max(-low, high)
    panel.yaxis.set_major_formatter(format_tick)
    if largest <= threshold:
        panel.set_ylim(-1.25 * (largest or threshold), 1.25 * (largest or threshold))
        return
    panel.set_yscale("symlog", linthresh=threshold, linscale=0.5)
    panel.yaxis.set_major_formatter(format_tick)
    steps = (1, 2, 5) if largest < 10 * threshold else (1,)
    ticks = [s * threshold * 10.0**n for n in range(1 + int(math.log10(largest / threshold))) for s in steps]
    panel.set_yticks([-t for t in ticks if t <= -low] + [0] + [t for t in ticks if t <= high])
    panel.set_yticks([], minor=True)
    panel.set_ylim(min(2 * low, -threshold / 2), max(2 * high, threshold / 2))


def _name_activations(paper: Axes, panel: Axes, activations: Sequence[PersistentActivation]) -> None:
    """Label the super activations (the blue bars).

    Writes the channel, value and layers of the four largest activations to the right of the panel of hidden states.
    """
    if not activations:
        return
    largest = sorted(activations, key=lambda a: -abs(a.value))
    lines = ["super activation" if len(largest) == 1 else f"{len(largest)} super activations"]
    for one in largest[:4]:
        lines += [f"channel {one.channel}: {format_tick(one.value)}", f"  after layers {one.layer} to {one.last}"]
    if len(largest) > 4:
        lines.append(f"and {len(largest) - 4} more")
    top = HEIGHT * panel.get_position().y1
    paper.text(RIGHT + 16, top, "\n".join(lines), color=BLUE, verticalalignment="top", linespacing=1.35)


def _draw_scores(panel: Axes, report: Scan, found: Sequence[Found]) -> None:
    panel.set_ylabel("robust z-score of the neuron's score")
    threshold = report.settings.get("min_z")
    if threshold is not None:
        panel.axhline(threshold, color=BLUE, linewidth=1.2, linestyle=(0, (5, 3)))
        panel.text(
            report.layers - 0.5,
            threshold,
            f" threshold {format_tick(threshold)}",
            color=BLUE,
            verticalalignment="center",
        )
    if not found:
        why = "\n".join(textwrap.fill(escape_control(note), 90) for note in report.notes)
        panel.text(0.5, 0.5, why, transform=panel.transAxes, horizontalalignment="center")
    for one in reversed(found):
        if one.z is not None and math.isfinite(one.z):
            VERDICT_MARKS[one.verdict].draw(panel, [one.layer], [one.z])
    panel.yaxis.set_major_formatter(format_tick)
    panel.set_ylim(0, 1.1 * max(panel.get_ylim()[1], 1.0))
