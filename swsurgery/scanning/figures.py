"""Draw the figures of a scan and of a sweep; the only module that imports matplotlib.

Drawing opens no window and sets no matplotlib backend for the process. It ignores the user's matplotlib settings, so
the same report always gives the same bytes. The colours are those of Okabe and Ito, which people with any kind of
colour vision can distinguish. Shapes and words repeat what the colours mean.
"""

from __future__ import annotations

import io
import math
import os
import textwrap
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple, cast

from swsurgery.errors import TargetError, escape_control, pluralise
from swsurgery.model.text import describe_measured_text
from swsurgery.scanning.causal_report import Verdict
from swsurgery.scanning.comparison import Comparison
from swsurgery.scanning.expert_report import ExpertScan
from swsurgery.scanning.report import Candidate, PersistentActivation, Profile, Scan, Sweep
from swsurgery.storage.filesystem import write_report
from swsurgery.storage.numbers import format_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.text import Text
    from matplotlib.typing import RcKeyType

# Without these entries, matplotlib stores the current time in the file, so the same figure would give other bytes.
FIGURE_FORMATS = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
"""Maps each supported ending of a file name to the metadata for matplotlib; None omits an entry from the file."""

WIDTH, HEIGHT, DPI = 1200, 800, 100
"""Width and height of the sheet (the whole figure) in pixels, and its resolution in dots per inch. All positions in
this module are in pixels from the sheet's lower left corner."""

LEFT, RIGHT, BOTTOM, TOP = 115, 1000, 62, 740
"""The edges of the area for labels and panels. The title is above this area, and the legend is to the right of it."""

GAP, ROW = 18, 18
"""Distance between two panels, and height of one row of labels, in pixels."""

MAX_LABELS = 14
"""Maximum number of scalars with a label. Their rows then take at most a third of the sheet's height."""

BLACK, GREY, PALE = "#222222", "#808080", "#c8c8c8"
BLUE, VERMILION, ORANGE = "#0072b2", "#d55e00", "#e69f00"

STYLE: dict[RcKeyType, object] = {
    "figure.dpi": DPI,
    "font.family": "DejaVu Sans",  # matplotlib includes this font
    "font.size": 9.5,
    "text.color": BLACK,
    "text.parse_math": False,  # a dollar sign in a name must not start a formula
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",  # text remains text, which can be searched and copied
    "svg.hashsalt": "swsurgery",  # without a fixed salt, the identifiers in the file would be random
}


class Mark(NamedTuple):
    """A marker: its meaning (the text in the legend), its shape in matplotlib's notation, and its two colours."""

    meaning: str
    shape: str
    edge: str
    fill: str

    def draw(self, axes: Axes, x: Sequence[float], y: Sequence[float]) -> Line2D:
        (line,) = axes.plot(
            x,
            y,
            linestyle="none",
            marker=self.shape,
            markersize=7.5,
            markeredgewidth=1.4,
            zorder=5,
            clip_on=False,
            markeredgecolor=self.edge,
            markerfacecolor=self.fill,
            label=self.meaning,
        )
        return line


VERDICT_MARKS: dict[Verdict | None, Mark] = {
    "critical alone": Mark("critical alone", "D", VERMILION, VERMILION),
    "critical jointly": Mark("critical jointly", "^", BLACK, ORANGE),
    None: Mark("not tested", "s", VERMILION, "white"),
    "untested": Mark("untested", "v", BLACK, "white"),
    "inert": Mark("inert", "o", GREY, "white"),
}
"""The marker of each verdict. Candidates get labels in this order of verdicts. None means that the causal test was not
run, and "untested" means that it was run but allowed no verdict."""

BASE = Mark("as stored (factor 1)", "D", VERMILION, VERMILION)
SCALED = Mark("scaled", "o", BLUE, BLUE)
NOT_FINITE = Mark("not finite", "X", BLACK, BLACK)


class Found(NamedTuple):
    """A scalar to mark in the figure, and its verdict, or None if the causal test was not run."""

    candidate: Candidate
    verdict: Verdict | None


def check_figure_path(path: Path) -> None:
    """Raise TargetError if a figure cannot be written to `path`.

    The file name must have an ending in `FIGURE_FORMATS`, the directory must exist and be writable, and matplotlib must
    be installed. A command calls this function before it runs the model, so that no measurement is lost.
    """
    if path.suffix.lower() not in FIGURE_FORMATS:
        raise TargetError("unknown figure format", path, "end the name in .png, .svg or .pdf")
    if path.is_dir():
        raise TargetError("this is a directory", path, "give the name of a file")
    if not path.parent.is_dir():
        raise TargetError("no such directory", path.parent, "create the directory first")
    if not os.access(path.parent, os.W_OK):
        raise TargetError("cannot write", path, "choose a place where you may write")
    try:
        import matplotlib.figure  # noqa: F401  to find a broken installation too
    except ImportError as error:
        raise TargetError("matplotlib cannot be imported", path, "run pip install 'swsurgery[plot]'") from error


def plot_scan(report: Scan, path: Path, model: str | None = None) -> None:
    """Draw the measurements of a scan by layer, mark its candidates, and write the figure to `path`.

    For a scan by activations, three panels show the largest input and the largest output of the down projection and the
    largest hidden state after the layer (arXiv:2411.07191, figures 3 to 5). The values are signed, on a scale that
    shows both 100 and 20,000. For a scan by weights, one panel shows the robust z-score of each candidate and the
    threshold `min_z` from the report's settings.

    `model` replaces the model type in the title. An existing file is replaced. Raises TargetError for the reasons that
    `check_figure_path` gives, and if the file cannot be written.
    """
    check_figure_path(path)
    with _use_own_style():
        paper = _make_sheet(f"{model or report.model_type}, {report.layers} layers: {_format_answer(report)}")
        found = _list_found(report)
        labelled = found[:MAX_LABELS]
        rows = _choose_rows(paper, [f.candidate for f in labelled], report.layers)
        top = TOP - ROW * (max(rows, default=-1) + 1)
        if report.profile is None:
            panels = _add_panels(paper, top, 1)
            _draw_scores(panels[0], report, found)
        else:
            panels = _add_panels(paper, top, 3)
            _draw_profile(panels, report, report.profile, found)
            _name_activations(paper, panels[2], report.activations)
        _set_layer_axis(panels, report.layers)
        for one, row in zip(labelled, rows, strict=True):
            _draw_label(paper, one, row, report.layers, top)
        if len(labelled) < len(found):
            _write_note(paper, f"{len(found) - len(labelled)} more marked without a label")
        verdicts = {f.verdict for f in found}
        _draw_legend(paper, top, [VERDICT_MARKS[v] for v in VERDICT_MARKS if v in verdicts])
        _save(paper, path)


def plot_sweep(report: Sweep, path: Path, model: str | None = None) -> None:
    """Draw perplexity, KL(base || scaled) and stop-word mass by factor, and write the figure to `path`.

    The axis of perplexity is logarithmic. The point at factor 1 is the base. A value that is not finite is a gap in the
    line, with a cross at the top of the panel. `model` begins the title. An existing file is replaced. Raises
    TargetError for the same reasons as `plot_scan`.
    """
    check_figure_path(path)
    with _use_own_style():
        names = [*map(str, report.coordinates), *report.regions]
        scaled = names[0] if len(names) == 1 else f"{len(names)} {'targets' if report.regions else 'scalars'}"
        paper = _make_sheet(f"{model}: {scaled}, scaled" if model else f"{scaled}, scaled")
        points = sorted([*(p for p in report.points if p.factor != 1), report.base], key=lambda point: point.factor)
        factors = [point.factor for point in points]
        curves = {
            "perplexity": [point.perplexity if point.finite else math.nan for point in points],
            "KL(base || scaled)\nnats a token": [point.kl if point.finite else math.nan for point in points],
            "stop-word mass": [point.stopword_mass if point.finite else math.nan for point in points],
        }
        panels = _add_panels(paper, TOP, len(curves))
        for panel, (name, values) in zip(panels, curves.items(), strict=True):
            panel.set_ylabel(name)
            _draw_curve(panel, factors, values)
        _set_log_scale(panels[0], curves["perplexity"])
        _write_values(panels[0], factors, curves["perplexity"])
        for panel in panels[1:]:
            panel.set_ylim(0, max(panel.get_ylim()[1], 1e-3))
        panels[-1].set_xlabel("factor")
        gap = any(not math.isfinite(value) for values in curves.values() for value in values)
        _draw_legend(paper, TOP, [BASE, SCALED, NOT_FINITE] if gap else [BASE, SCALED])
        _write_note(paper, f"{describe_measured_text(report)}, {report.dtype} on {report.device}")
        _save(paper, path)


def plot_comparison(report: Comparison, path: Path) -> None:
    """Draw perplexity, KL(base || model) and stop-word mass of each model, with 95% intervals, and write the figure.

    The models are in the order of the report, from left to right; the base is the first. A value that is not finite is
    left out. Raises TargetError for the same reasons as `plot_scan`.
    """
    check_figure_path(path)
    with _use_own_style():
        models = report.models
        paper = _make_sheet(f"{report.base}: {len({m.manifest for m in models}) - 1} manifests compared")
        base = models[0].perplexity
        figures: dict[str, list[tuple[float, float | None, float | None]]] = {
            "perplexity": [(m.perplexity, *_scale(base, m.ratio_low, m.ratio_high)) for m in models],
            "KL(base || model)\nnats a token": [(m.kl, m.kl_low, m.kl_high) for m in models],
            "stop-word mass": [(m.stopword_mass, None, None) for m in models],
        }
        panels = _add_panels(paper, TOP, len(figures))
        for panel, (name, values) in zip(panels, figures.items(), strict=True):
            panel.set_ylabel(name)
            for at, (value, low, high) in enumerate(values):
                if math.isfinite(value):
                    (BASE if at == 0 else SCALED).draw(panel, [at], [value])
                if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
                    panel.plot([at, at], [low, high], color=GREY, zorder=1)
        _set_log_scale(panels[0], [value for value, _, _ in figures["perplexity"]])
        for panel in panels[1:]:
            panel.set_ylim(0, max(panel.get_ylim()[1], 1e-3))
        panels[-1].set_xlim(-0.5, len(models) - 0.5)
        panels[-1].set_xticks(range(len(models)), [str(number) for number in range(len(models))])
        for number, model in enumerate(models):
            name = "base" if model.manifest is None else Path(model.manifest).stem
            rounded = "" if model.activations == "as computed" else f", {model.activations}"
            lines = textwrap.wrap(escape_control(f"{number}  {name}{rounded}"), 30)
            if number < MAX_LABELS:
                paper.text(
                    RIGHT + 12, TOP - 8 - number * 3 * ROW, "\n".join(lines), verticalalignment="top", fontsize=8
                )
        _write_note(paper, f"{describe_measured_text(report)}, {report.dtype} on {report.device}")
        _save(paper, path)


def _scale(base: float, low: float | None, high: float | None) -> tuple[float | None, float | None]:
    return (None if low is None else base * low, None if high is None else base * high)


# The sheet


@contextmanager
def _use_own_style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def _make_sheet(title: str) -> Axes:
    """Make a figure with a title, and return invisible axes that cover the whole figure in units of pixels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), facecolor="white")
    paper = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT), zorder=1)
    paper.set_axis_off()
    line = paper.text(
        LEFT, HEIGHT - 24, escape_control(title), fontsize=13, fontweight="bold", verticalalignment="center"
    )
    line.set_fontsize(13 * min(1, (WIDTH - LEFT - 15) / _measure_width(line)))
    return paper


def _add_panels(paper: Axes, top: float, count: int) -> list[Axes]:
    """Add `count` panels of equal height, one above the other, from `top` down to `BOTTOM`. The highest comes first."""
    height = (top - BOTTOM - GAP * (count - 1)) / count
    panels: list[Axes] = []
    for number in range(count):
        y = top - (number + 1) * height - number * GAP
        place = (LEFT / WIDTH, y / HEIGHT, (RIGHT - LEFT) / WIDTH, height / HEIGHT)
        panel = paper.figure.add_axes(place, sharex=panels[0] if panels else None, zorder=2, facecolor="none")
        panel.tick_params(color=GREY, labelbottom=number == count - 1)
        panel.yaxis.set_label_coords(-72 / (RIGHT - LEFT), 0.5)
        panels.append(panel)
    return panels


def _draw_legend(paper: Axes, top: float, marks: Iterable[Mark]) -> None:
    handles = [mark.draw(paper, [], []) for mark in marks]
    if handles:
        paper.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(RIGHT + 12, top - 8),
            bbox_transform=paper.transData,
            frameon=False,
            borderpad=0,
            borderaxespad=0,
            handletextpad=0.3,
            labelspacing=0.7,
        )


def _write_note(paper: Axes, text: str) -> None:
    paper.text(RIGHT, 16, escape_control(text), color=GREY, horizontalalignment="right")


def _save(paper: Axes, path: Path) -> None:
    ending = path.suffix.lower()
    buffer = io.BytesIO()
    _get_figure(paper).savefig(buffer, format=ending[1:], metadata=FIGURE_FORMATS[ending])
    write_report(path, buffer.getvalue())


def _get_figure(artist: Axes | Text) -> Figure:
    """Return the figure that contains `artist`. A sheet has no subfigures, so the result is never a SubFigure."""
    return cast("Figure", artist.figure)


def _measure_width(text: Text) -> float:
    """Measure the width of a text in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(_get_figure(text)).get_renderer()  # type: ignore[no-untyped-call]  # not annotated
    return text.get_window_extent(renderer).width


# A scan


def _list_found(report: Scan) -> list[Found]:
    """List the scalars to mark, in the order of `VERDICT_MARKS`. Companions are included only if they are critical."""
    if isinstance(report, ExpertScan):
        test = report.expert_confirmation
        verdicts = {t.candidate.name: t.verdict for t in (test.trials if test else ())}
        return [Found(expert.cause, verdicts.get(expert.name)) for expert in report.experts]
    trials = report.confirmation.trials if report.confirmation else ()
    found = [Found(t.candidate, t.verdict) for t in trials if t.listed or t.verdict.startswith("critical")]
    tested = {trial.candidate.coordinate for trial in trials}
    found += [Found(candidate, None) for candidate in report.candidates if candidate.coordinate not in tested]
    order = list(VERDICT_MARKS)
    return sorted(found, key=lambda one: order.index(one.verdict))


def _format_answer(report: Scan) -> str:
    if isinstance(report, ExpertScan):
        words = pluralise(len(report.super_experts), "super expert") if report.super_experts else "no super expert"
        return f"{words} {'confirmed' if report.confirmed else 'found by experts'}"
    count = len(report.super_weights)
    words = "no super weight" if count == 0 else "1 super weight" if count == 1 else f"{count} super weights"
    if report.confirmation is not None and (report.confirmed or not count):
        return f"{words} confirmed"
    how = "by activations" if report.method == "activations" else "by weights alone"
    return f"{words} found {how}" + (", not confirmed" if count else "")


def _compute_x(layer: int, layers: int) -> float:
    """Compute the x position of the middle of a layer on the sheet, for the axis limits that `_set_layer_axis` sets."""
    return LEFT + (RIGHT - LEFT) * (layer + 0.5) / layers


def _set_layer_axis(panels: Sequence[Axes], layers: int) -> None:
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, layers) if layers / step <= 32)
    panels[-1].set(xlim=(-0.5, layers - 0.5), xticks=range(0, layers, step), xlabel="layer")


def _choose_rows(paper: Axes, candidates: Sequence[Candidate], layers: int) -> list[int]:
    """Choose a row for the label of each candidate, so that no labels overlap. Row 0 is the lowest.

    A label is a vertical line above the candidate's layer, with the candidate's name to the right of the upper end.
    Labels are placed from the last layer to the first. Each label gets the lowest row in which its name crosses no line
    that was placed before.
    """
    poles: list[tuple[float, int]] = []
    rows = dict.fromkeys(range(len(candidates)), 0)
    for number in sorted(rows, key=lambda n: (-candidates[n].layer, n)):
        x = _compute_x(candidates[number].layer, layers)
        text = paper.text(0, 0, _format_name(candidates[number]))
        end = x + _measure_width(text) + 26
        text.remove()
        rows[number] = max((row + 1 for pole, row in poles if x <= pole < end), default=0)
        poles.append((x, rows[number]))
    return list(rows.values())


def _format_name(candidate: Candidate) -> str:
    expert = "" if candidate.expert is None else f" expert {candidate.expert}"
    return f"L{candidate.layer}{expert} [{candidate.row}, {candidate.col}]"


def _draw_label(paper: Axes, found: Found, row: int, layers: int, top: float) -> None:
    x, y = _compute_x(found.candidate.layer, layers), top + ROW * (row + 0.5)
    paper.plot([x, x], [BOTTOM, y], color=GREY, linewidth=0.7, zorder=0)
    VERDICT_MARKS[found.verdict].draw(paper, [x], [y])
    paper.text(x + 11, y, _format_name(found.candidate), verticalalignment="center")


def _draw_profile(panels: Sequence[Axes], report: Scan, profile: Profile, found: Sequence[Found]) -> None:
    sides = (
        ("largest input of\nthe down projection", profile.inputs),
        ("largest output of\nthe down projection", profile.outputs),
        ("largest hidden state\nafter the layer", profile.residuals),
    )
    threshold = _find_threshold([*profile.inputs, *profile.outputs])
    # Spikes found in later rounds may be larger than all values of the unedited model, and must fit into the panels.
    spikes = [
        [v for v in values if v is not None]
        for values in zip(*((f.candidate.input_spike, f.candidate.output_spike) for f in found), strict=True)
    ] or [[], []]
    massive = {layer for a in report.activations for layer in range(a.layer, a.last + 1)}
    for panel, (name, values), marked in zip(panels, sides, [*spikes, []], strict=True):
        panel.set_ylabel(name)
        _draw_bars(panel, values, massive if panel is panels[2] else set())
        _set_signed_scale(panel, [*values, *marked], threshold)
    for candidate, verdict in reversed(found):  # the most important candidate is drawn last, on top
        for panel, spike in zip(panels, (candidate.input_spike, candidate.output_spike), strict=False):
            if spike is not None and math.isfinite(spike):
                VERDICT_MARKS[verdict].draw(panel, [candidate.layer], [spike])


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
    panel.yaxis.set_major_formatter(_format_tick)
    if largest <= threshold:
        panel.set_ylim(-1.25 * (largest or threshold), 1.25 * (largest or threshold))
        return
    panel.set_yscale("symlog", linthresh=threshold, linscale=0.5)
    panel.yaxis.set_major_formatter(_format_tick)
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
        lines += [f"channel {one.channel}: {_format_tick(one.value)}", f"  after layers {one.layer} to {one.last}"]
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
            f" threshold {_format_tick(threshold)}",
            color=BLUE,
            verticalalignment="center",
        )
    if not found:
        why = "\n".join(textwrap.fill(escape_control(note), 90) for note in report.notes)
        panel.text(0.5, 0.5, why, transform=panel.transAxes, horizontalalignment="center")
    for candidate, verdict in reversed(found):
        if candidate.z is not None and math.isfinite(candidate.z):
            VERDICT_MARKS[verdict].draw(panel, [candidate.layer], [candidate.z])
    panel.yaxis.set_major_formatter(_format_tick)
    panel.set_ylim(0, 1.1 * max(panel.get_ylim()[1], 1.0))


# A sweep


def _draw_curve(panel: Axes, factors: Sequence[float], values: Sequence[float]) -> None:
    finite = [math.isfinite(value) for value in values]
    panel.plot(factors, [v if ok else math.nan for v, ok in zip(values, finite, strict=True)], color=BLUE, zorder=3)
    panel.axvline(1, color=GREY, linewidth=0.7, zorder=1)
    panel.grid(axis="y", color=PALE, linewidth=0.6)
    panel.yaxis.set_major_formatter(_format_tick)
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
    panel.yaxis.set_major_formatter(_format_tick)
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
                _format_tick(value),
                (factor, value),
                xytext=(0, 7),
                textcoords="offset points",
                horizontalalignment="center",
                zorder=4,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )


def _format_tick(value: float, _position: float | None = None) -> str:
    """Format a number as in 23,941, 29.6 and 0.0012. A negative number gets a minus sign instead of a hyphen."""
    text = format_number(value, 3)
    return text.replace("-", "\N{MINUS SIGN}") if value < 0 else text
