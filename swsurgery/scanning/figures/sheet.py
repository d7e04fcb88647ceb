"""Make the sheet on which every figure is drawn: its style, marks, panels, legend and file.

Drawing opens no window and sets no matplotlib backend for the process. It ignores the user's matplotlib settings, so
the same report always gives the same bytes. The colours are those of Okabe and Ito, which people with any kind of
colour vision can distinguish. Shapes and words repeat what the colours mean.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from swsurgery.errors import TargetError, escape_control
from swsurgery.storage.filesystem import refuse_unwritable, write_report
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


def check_figure_path(path: Path) -> None:
    """Raise TargetError if a figure cannot be written to `path`.

    The file name must have an ending in `FIGURE_FORMATS`, the directory must exist and be writable, and matplotlib must
    be installed. A command calls this function before it runs the model, so that no measurement is lost.
    """
    if path.suffix.lower() not in FIGURE_FORMATS:
        raise TargetError("unknown figure format", path, "end the name in .png, .svg or .pdf")
    refuse_unwritable(path)
    try:
        import matplotlib.figure  # noqa: F401  to find a broken installation too
    except ImportError as error:
        raise TargetError("matplotlib cannot be imported", path, "run pip install 'swsurgery[plot]'") from error


@contextmanager
def set_own_style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def make_sheet(title: str) -> Axes:
    """Make a figure with a title, and return invisible axes that cover the whole figure in units of pixels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), facecolor="white")
    paper = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT), zorder=1)
    paper.set_axis_off()
    line = paper.text(
        LEFT, HEIGHT - 24, escape_control(title), fontsize=13, fontweight="bold", verticalalignment="center"
    )
    line.set_fontsize(13 * min(1, (WIDTH - LEFT - 15) / measure_width(line)))
    return paper


def add_panels(paper: Axes, top: float, count: int) -> list[Axes]:
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


def draw_legend(paper: Axes, top: float, marks: Iterable[Mark]) -> None:
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


def write_note(paper: Axes, text: str) -> None:
    paper.text(RIGHT, 6, escape_control(text), color=GREY, horizontalalignment="right")


def save_figure(paper: Axes, path: Path) -> None:
    ending = path.suffix.lower()
    buffer = io.BytesIO()
    _get_figure(paper).savefig(buffer, format=ending[1:], metadata=FIGURE_FORMATS[ending])
    write_report(path, buffer.getvalue())


def _get_figure(artist: Axes | Text) -> Figure:
    """Return the figure that contains `artist`. A sheet has no subfigures, so the result is never a SubFigure."""
    return cast("Figure", artist.figure)


def measure_width(text: Text) -> float:
    """Measure the width of a text in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(_get_figure(text)).get_renderer()  # type: ignore[no-untyped-call]  # not annotated
    return text.get_window_extent(renderer).width


def format_tick(value: float, _position: float | None = None) -> str:
    """Format a number as in 23,941, 29.6 and 0.0012. A negative number gets a minus sign instead of a hyphen."""
    text = format_number(value, 3)
    return text.replace("-", "\N{MINUS SIGN}") if value < 0 else text
