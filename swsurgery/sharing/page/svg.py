"""Draw figures as SVG: bars, dots with intervals, lines, and bars by layer.

Colours are classes, which the style sheet defines for light and dark. Shapes and words repeat what the colours mean. A
figure is 440 units wide, so that its text is readable on a telephone and on paper. This module knows nothing of the
results that are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from swsurgery.sharing.page.markup import Markup, join, make_tag
from swsurgery.sharing.page.scales import Axis, Kind, make_scale
from swsurgery.storage.numbers import format_number

FIGURE_WIDTH = 440
"""Width of every figure. All positions and sizes are in units of the figure, from its upper left corner."""

AREA_LEFT, AREA_RIGHT = 58, FIGURE_WIDTH - 12
"""Left and right edge of the area in which values are drawn."""

MAX_DOTS = 60
"""Maximum number of rows of one figure."""

MAX_LABEL = 54
"""Maximum number of characters of a label in a figure."""

Shape = Literal["circle", "square", "diamond", "triangle", "cross"]


@dataclass(frozen=True)
class SvgMark:
    """How a value is marked: a shape and the class of its colour. A mark that is not `solid` is an outline."""

    shape: Shape
    colour: str
    solid: bool = True


BASE_MARK = SvgMark("diamond", "vermilion")
OTHER_MARK = SvgMark("circle", "blue")
NULL_MARK = SvgMark("circle", "grey", solid=False)
NOT_FINITE_MARK = SvgMark("cross", "ink")


@dataclass(frozen=True)
class Figure:
    """A drawing of `height` units. `title` describes it to people who cannot see it."""

    title: str
    height: float
    parts: Markup

    def render(self, y: float = 0, style: object = "") -> Markup:
        """Render the figure as an `svg` element, `y` units below the top of the figure that contains it.

        `style` is an element with the style sheet, which a file of its own needs.
        """
        size = {
            "viewBox": f"0 0 {FIGURE_WIDTH} {_format(self.height)}",
            "width": FIGURE_WIDTH,
            "height": _format(self.height),
        }
        place = {"y": _format(y)} if y else {}
        content = (make_tag("title", self.title), style, self.parts)
        return make_tag("svg", *content, xmlns="http://www.w3.org/2000/svg", role="img", **size, **place)


@dataclass(frozen=True)
class DotRow:
    """One row of a figure of dots: a value, and the ends of its interval or None.

    `others` are further values of the row, which are drawn as outlines.
    """

    label: str
    value: float | None
    low: float | None = None
    high: float | None = None
    mark: SvgMark = OTHER_MARK
    others: Sequence[float] = ()


@dataclass(frozen=True)
class BarRow:
    """One row of a figure of bars: a value from 0, and the text to write behind the bar."""

    label: str
    value: float
    text: str


@dataclass(frozen=True)
class Point:
    """One point of a line. A value that is None or not finite is a gap. `mark` replaces the mark of the line."""

    x: float
    y: float | None
    low: float | None = None
    high: float | None = None
    mark: SvgMark | None = None


@dataclass(frozen=True)
class Line:
    """One line of a figure, and how its points are marked."""

    name: str
    points: Sequence[Point]
    mark: SvgMark


def draw_dots(
    title: str, dots: Sequence[DotRow], axis: str, kind: Kind = "log", reference: float | None = 1.0
) -> Figure:
    """Draw one row per value, with its interval as a line. A vertical line marks the value `reference`."""
    shown = dots[:MAX_DOTS]
    values = [value for dot in shown for value in (dot.value, dot.low, dot.high, *dot.others)]
    scale = make_scale([*values, reference], kind, 20, AREA_RIGHT - 8)
    bottom = 8 + 34 * len(shown)
    parts: list[Markup] = [_draw_ticks_below(scale, 8, bottom, axis)]
    if reference is not None:
        parts.append(_draw_line(scale.find_position(reference), 8, scale.find_position(reference), bottom, "reference"))
    for number, dot in enumerate(shown):
        parts += _draw_dot(scale, dot, 20 + 34 * number)
    return Figure(title, bottom + 36, join(parts))


def _draw_dot(scale: Axis, dot: DotRow, y: float) -> list[Markup]:
    written = "" if dot.value is None else format_figure(dot.value)
    parts = [_write(12, y, dot.label), _write(AREA_RIGHT, y, written, anchor="end", class_="value")]
    marked = [other for other in dot.others if math.isfinite(other)]
    parts += [
        draw_mark(NULL_MARK, scale.find_position(other), y + 11, format_figure(other), size=3.4) for other in marked
    ]
    if dot.value is None and dot.others:
        return parts
    if dot.value is None or not math.isfinite(dot.value):
        return [*parts, draw_mark(NOT_FINITE_MARK, AREA_RIGHT - 8, y + 11, written or "not measured")]
    if dot.low is not None and dot.high is not None and not math.isnan(dot.low + dot.high):
        parts.append(
            _draw_line(scale.find_position(dot.low), y + 11, scale.find_position(dot.high), y + 11, "interval")
        )
    return [*parts, draw_mark(dot.mark, scale.find_position(dot.value), y + 11, f"{dot.label}: {written}")]


def draw_bars(title: str, bars: Sequence[BarRow], mark: SvgMark = OTHER_MARK) -> Figure:
    """Draw one horizontal bar per row. The longest bar fills the width."""
    shown = bars[:MAX_DOTS]
    largest = max((bar.value for bar in shown if math.isfinite(bar.value)), default=0) or 1.0
    parts: list[Markup] = []
    for number, bar in enumerate(shown):
        y = 6 + 22 * number
        width = 200 * max(bar.value, 0) / largest if math.isfinite(bar.value) else 200
        parts += [
            _write(148, y + 12, bar.label, anchor="end", limit=21, class_="mono"),
            make_tag("rect", x=156, y=y, width=_format(max(width, 0.5)), height=15, class_=f"fill-{mark.colour}"),
            _write(162 + width, y + 12, bar.text),
        ]
    return Figure(title, 10 + 22 * len(shown), join(parts))


def draw_lines(
    title: str, lines: Sequence[Line], x_axis: str, y_axis: str, kind: Kind = "log", stored: float | None = None
) -> Figure:
    """Draw lines through points, with the intervals of the points. A vertical line marks the x value `stored`."""
    top, bottom = 14 + 16 * len(lines), 214 + 16 * len(lines)
    points = [point for line in lines for point in line.points]
    y_scale = make_scale([value for p in points for value in (p.y, p.low, p.high)], kind, bottom, top + 6)
    x_values = [point.x for point in points] or [0.0]
    low, high = min(x_values), max(x_values)
    x_scale = Axis("linear", low, high if high > low else low + 1, AREA_LEFT + 10, AREA_RIGHT - 10)
    parts = [
        _draw_ticks_left(y_scale, y_axis, top),
        _draw_ticks_below(x_scale, bottom, bottom, x_axis, whole=x_axis == "layer"),
    ]
    if stored is not None and low <= stored <= high:
        parts.append(_draw_line(x_scale.find_position(stored), top, x_scale.find_position(stored), bottom, "reference"))
    for number, line in enumerate(lines):
        parts += [
            draw_mark(line.mark, AREA_LEFT + 6, 10 + 16 * number, line.name),
            _write(AREA_LEFT + 18, 14 + 16 * number, line.name),
        ]
        parts += _draw_points(line, x_scale, y_scale, top)
    return Figure(title, bottom + 36, join(parts))


def _draw_points(line: Line, x_scale: Axis, y_scale: Axis, top: float) -> list[Markup]:
    parts: list[Markup] = []
    for drawn, points in groupby(line.points, key=lambda point: _is_drawn(point, y_scale)):
        run = list(points)
        if drawn and len(run) > 1:
            places = ((x_scale.find_position(p.x), y_scale.find_position(p.y or 0.0)) for p in run)
            path = " ".join(f"{_format(x)},{_format(y)}" for x, y in places)
            parts.append(make_tag("polyline", points=path, class_=f"line line-{line.mark.colour}"))
    for point in line.points:
        x, words = x_scale.find_position(point.x), f"{line.name}, {format_figure(point.x)}"
        if not _is_drawn(point, y_scale) or point.y is None:
            parts.append(draw_mark(NOT_FINITE_MARK, x, top + 4, f"{words}: not finite", size=3.2))
            continue
        if point.low is not None and point.high is not None and not math.isnan(point.low + point.high):
            low, high = (y_scale.find_position(end) for end in (point.low, point.high))
            parts.append(_draw_line(x, low, x, high, "interval"))
        y = y_scale.find_position(point.y)
        parts.append(draw_mark(point.mark or line.mark, x, y, f"{words}: {format_figure(point.y)}", size=3.2))
    return parts


def _is_drawn(point: Point, scale: Axis) -> bool:
    """Return True if a point has a place on the axis. A logarithmic axis has none for 0 and negative values."""
    return point.y is not None and math.isfinite(point.y) and (scale.kind != "log" or point.y > 0)


def draw_layers(
    title: str, values: Sequence[float | None], axis: str, strong: Collection[int], spikes: Sequence[tuple[int, DotRow]]
) -> Figure:
    """Draw one vertical bar per layer, with its sign. Bars of the layers in `strong` have another colour.

    `spikes` are marked values of single layers.
    """
    finite = [value for value in values if value is not None and math.isfinite(value)]
    scale = make_scale([*finite, *(dot.value for _, dot in spikes)], "signed", 164, 12)
    step = (AREA_RIGHT - AREA_LEFT) / max(len(values), 1)
    layers = Axis("linear", -0.5, max(len(values), 1) - 0.5, AREA_LEFT, AREA_RIGHT)
    parts = [_draw_ticks_left(scale, axis, 12), _draw_ticks_below(layers, 164, 164, "layer", whole=True)]
    zero = scale.find_position(0.0)
    for layer, value in enumerate(values):
        if value is None or math.isnan(value):
            continue
        end = scale.find_position(value)
        description = make_tag("title", f"layer {layer}: {format_figure(value)}")
        size = {"x": _format(layers.find_position(layer) - 0.4 * step), "width": _format(0.8 * step)}
        place = {"y": _format(min(zero, end)), "height": _format(max(abs(end - zero), 0.4))}
        colour = "fill-blue" if layer in strong else "fill-pale"
        parts.append(make_tag("rect", description, class_=colour, **size, **place))
    parts.append(_draw_line(AREA_LEFT, zero, AREA_RIGHT, zero, "axis"))
    for layer, dot in spikes:
        if dot.value is not None and math.isfinite(dot.value):
            words = f"{dot.label}: {format_figure(dot.value)}"
            parts.append(draw_mark(dot.mark, layers.find_position(layer), scale.find_position(dot.value), words))
    return Figure(title, 200, join(parts))


def join_figures(title: str, figures: Sequence[tuple[str, Figure]]) -> Figure:
    """Put figures below one another in one figure, each below its heading, on a background of its own."""
    height = 12 + sum(26 + figure.height for _, figure in figures)
    parts = [make_tag("rect", width=FIGURE_WIDTH, height=_format(height), class_="paper")]
    y = 6.0
    for heading, figure in figures:
        parts += [_write(12, y + 14, heading, class_="heading"), figure.render(y + 22)]
        y += 26 + figure.height
    return Figure(title, height, join(parts))


def draw_mark(mark: SvgMark, x: float, y: float, words: str, size: float = 4.6) -> Markup:
    """Draw a mark around a point. `words` appear when the pointer rests on it."""
    colour = f"fill-{mark.colour}" if mark.solid else f"outline-{mark.colour}"
    title = make_tag("title", words)
    if mark.shape == "circle":
        return make_tag("circle", title, cx=_format(x), cy=_format(y), r=size, class_=colour)
    corners = {
        "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "diamond": ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
        "triangle": ((0, -1.25), (1.2, 0.95), (-1.2, 0.95)),
        "cross": ((-1, -1), (0, 0), (1, -1), (0, 0), (1, 1), (0, 0), (-1, 1), (0, 0)),
    }[mark.shape]
    points = " ".join(f"{_format(x + size * dx)},{_format(y + size * dy)}" for dx, dy in corners)
    return make_tag("polygon", title, points=points, class_="cross" if mark.shape == "cross" else colour)


def format_figure(value: float) -> str:
    """Format a number of a figure, such as 23,941, 0.0012 and −5.3, with a minus sign instead of a hyphen."""
    return format_number(value, 3).replace("-", "\N{MINUS SIGN}")


def _draw_ticks_below(scale: Axis, top: float, bottom: float, axis: str, whole: bool = False) -> Markup:
    parts = []
    for tick in scale.list_ticks():
        if whole and not tick.is_integer():
            continue
        x = scale.find_position(tick)
        parts.append(_draw_line(x, top, x, bottom + 4, "grid"))
        parts.append(_write(x, bottom + 16, format_figure(tick), anchor="middle", class_="tick"))
    return join([*parts, _write((scale.begin + scale.end) / 2, bottom + 30, axis, anchor="middle", class_="tick")])


def _draw_ticks_left(scale: Axis, axis: str, top: float) -> Markup:
    parts = []
    for tick in scale.list_ticks():
        y = scale.find_position(tick)
        parts.append(_draw_line(AREA_LEFT, y, AREA_RIGHT, y, "grid"))
        parts.append(_write(AREA_LEFT - 6, y + 4, format_figure(tick), anchor="end", class_="tick"))
    return join([*parts, _write(AREA_RIGHT, top - 4, axis, anchor="end", class_="tick")])


def _draw_line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return make_tag("line", x1=_format(x1), y1=_format(y1), x2=_format(x2), y2=_format(y2), class_=kind)


def _write(
    x: float, y: float, text: str, *, anchor: str = "start", class_: str | None = None, limit: int = MAX_LABEL
) -> Markup:
    words = text if len(text) <= limit else f"{text[: limit - 1]}…"
    return make_tag("text", words, x=_format(x), y=_format(y), text_anchor=anchor, class_=class_)


def _format(position: float) -> str:
    return f"{position:.1f}".removesuffix(".0")
