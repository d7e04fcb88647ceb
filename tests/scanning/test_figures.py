"""Figures of scans and sweeps: what is drawn where, in which format, and what is refused before it is drawn."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import re
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import matplotlib
import pytest
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath

from swsurgery.errors import TargetError
from swsurgery.scanning.activation_report import PersistentActivation
from swsurgery.scanning.causal_report import Effect
from swsurgery.scanning.comparison import ComparedModel, Comparison
from swsurgery.scanning.figures import check_figure_path, curve_figures, plot_scan, plot_sweep, scan_figure
from swsurgery.scanning.part_report import ModelPart, PartConfirmation, PartName, PartTrial
from swsurgery.scanning.report import (
    Candidate,
    Confirmation,
    Profile,
    Scan,
    Sweep,
    SweepPoint,
    Trial,
)
from swsurgery.storage.coordinate import Coordinate

DOWN = "model.layers.{}.mlp.down_proj.weight"
MAGIC = {"png": b"\x89PNG\r\n\x1a\n", "svg": b"<?xml", "pdf": b"%PDF-"}
PIXEL = 0.72  # of a figure of 100 pixels an inch, in an SVG's points


def candidate(layer, row, col, value=1.0, expert=None, **measured) -> Candidate:
    name = DOWN.format(layer)
    return Candidate(Coordinate(name, (row, col)), layer, row, col, expert, value, 1.0, 1, **measured)


# As measured on SmolLM2-135M-Instruct; the layers without a spike are made up.
MAKER = candidate(11, 507, 1229, 5.875, input_spike=4072.0, output_spike=23880.0)
HELPER = candidate(2, 507, 90, 5.094, input_spike=95.5, output_spike=486.0)
ERASER = candidate(28, 507, 678, -4.78, input_spike=4990.0, output_spike=-23800.0)
COMPANION = candidate(11, 88, 1229, 0.61)


def profile() -> Profile:
    ordinary = random.Random(0)
    inputs, outputs = ([ordinary.uniform(-20, 20) for _ in range(30)] for _ in range(2))
    for one in (MAKER, HELPER, ERASER):
        inputs[one.layer], outputs[one.layer] = one.input_spike, one.output_spike
    residuals = [3.0] * 2 + [480.0] * 9 + [23941.0] * 17 + [120.0] * 2
    return Profile(tuple(inputs), tuple(outputs), tuple(residuals))


REPORT = Scan(
    method="activations",
    model_type="llama",
    layers=30,
    candidates=(MAKER, HELPER, ERASER),
    activations=(PersistentActivation(11, 27, 507, 23941.0, 14, 0, 0, 4),),
    profile=profile(),
)
WEIGHTS = Scan(
    "weights", "llama", 30, (candidate(28, 507, 678, z=14.2), candidate(11, 507, 1229, z=13.6)), settings={"min_z": 7.5}
)


def confirmed(report: Scan, **verdicts: str) -> Scan:
    """REPORT's scalars by name, with a verdict each."""
    effect = Effect(1.0, 0.9, 1.1, 0.0)
    trials = [
        Trial(globals()[name], effect, effect, verdict.replace("_", " "), listed=name != "COMPANION")
        for name, verdict in verdicts.items()
    ]
    confirmation = Confirmation(tuple(trials), effect, (), (), 29.6, 16, 512, "ab" * 32, "float32", "cpu", 8176)
    return dataclasses.replace(report, confirmation=confirmation)


def point(factor: float, perplexity: float, kl: float, mass: float, finite: bool = True) -> SweepPoint:
    return SweepPoint(factor, perplexity, perplexity / 29.6, kl, mass, finite, 23000.0)


SWEEP = Sweep(
    coordinates=(MAKER.coordinate,),
    base=point(1, 29.6, 0, 0.31),
    points=(point(2, 71, 0.9, 0.36), point(0, 165, 2.1, 0.05), point(0.5, 44, 0.5, 0.22), point(1, 29.6, 0, 0.31)),
    windows=16,
    window_tokens=512,
    text_sha256="ab" * 32,
    dtype="float32",
    device="cpu",
    method="whole",
    scored_tokens=8176,
)


def texts(path: Path) -> list[tuple[str, float, float]]:
    """Every text of an SVG with its x and y, in points from the upper left corner."""
    found = []
    for element in xml.parse(path).iter("{http://www.w3.org/2000/svg}text"):
        place = re.search(r"(?:rotate\(\S+|translate\()\s*([-\d.]+)\s+([-\d.]+)\)", element.get("transform", ""))
        x, y = place.groups() if place else (element.get("x"), element.get("y"))
        found.append(("".join(element.itertext()).strip(), float(x), float(y)))
    return found


def words(report: Scan | Sweep, path: Path, model: str | None = None) -> list[str]:
    (plot_scan if isinstance(report, Scan) else plot_sweep)(report, path, model)
    return [text for text, _, _ in texts(path)]


@pytest.fixture
def svg(tmp_path) -> Path:
    return tmp_path / "figure.svg"


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """The panels of a report's figure, from above, with all that was drawn in them."""

    def draw(report: Scan | Sweep):
        sheets: list[Figure] = []
        for module in (scan_figure, curve_figures):
            monkeypatch.setattr(module, "save_figure", lambda paper, path: sheets.append(paper.figure))
        (plot_scan if isinstance(report, Scan) else plot_sweep)(report, tmp_path / "figure.png")
        return sheets[0].axes[1:]

    return draw


def marks(panel) -> dict[str, set[tuple[float, float]]]:
    """What a panel marks: the mark's meaning -> where it stands."""
    found: dict[str, set[tuple[float, float]]] = {}
    for line in panel.lines:
        if line.get_linestyle() == "None":
            found.setdefault(line.get_label(), set()).update(zip(line.get_xdata(), line.get_ydata(), strict=True))
    return found


# Parts


def make_parts(tested: bool) -> Scan:
    """REPORT without scalars, but with a row, a channel of attention and one of the embedding, which is inert."""
    names = (PartName("row", 3, None, 39), PartName("attention", 5, None, 40), PartName("embedding", None, None, 41))
    parts = tuple(ModelPart(name, (39,), 90.0 + number) for number, name in enumerate(names))
    effect = Effect(1.0, 0.9, 1.1, 0.0)
    trials = [PartTrial(part, effect, effect, "needed alone") for part in parts[:2]]
    trials.append(PartTrial(parts[2], effect, effect, "inert"))
    test = PartConfirmation(tuple(trials), effect, (), (), 29.6, 16, 512, "ab" * 32, "float32", "cpu", 8176)
    return dataclasses.replace(REPORT, candidates=(), parts=parts, part_confirmation=test if tested else None)


@pytest.mark.parametrize("tested", [False, True])
def test_parts_are_marked_in_the_panel_of_hidden_states(draw, tested):
    *others, states = draw(make_parts(tested))
    assert all(marks(panel) == {} for panel in others)
    everything = {(3.0, 90.0), (5.0, 91.0), (0.0, 92.0)}
    apart = {"needed alone": {(3.0, 90.0), (5.0, 91.0)}, "inert": {(0.0, 92.0)}}
    assert marks(states) == (apart if tested else {"not tested": everything})


@pytest.mark.parametrize("tested", [False, True])
def test_parts_are_named(svg, tested):
    plot_scan(make_parts(tested), svg)
    words = {text for text, _, _ in texts(svg)}
    assert {"L3 row 39", "L5 attention channel 40", "embedding channel 41"} <= words
    answer = "2 parts needed" if tested else "3 parts not confirmed"
    assert f"llama, 30 layers: no super weight found by activations, {answer}" in words


# The file


@pytest.mark.parametrize("ending", MAGIC)
@pytest.mark.parametrize("report", [REPORT, SWEEP], ids=["scan", "sweep"])
def test_the_ending_decides_the_format_and_one_report_gives_one_file(tmp_path, ending, report):
    plot = plot_scan if report is REPORT else plot_sweep
    first, second, other = (tmp_path / name for name in (f"a.{ending}", f"b.{ending.upper()}", f"c.{ending}"))
    plot(report, first)
    with matplotlib.rc_context({"font.size": 30, "axes.labelcolor": "red", "lines.linewidth": 9}):
        plot(report, second)
        assert matplotlib.rcParams["font.size"] == 30, "the reader's settings are as they were"
    plot(report, other, model="another")
    data = first.read_bytes()
    assert data.startswith(MAGIC[ending])
    assert second.read_bytes() == data
    assert other.read_bytes() != data
    assert b"CreationDate" not in data and b"dc:date" not in data


def test_a_png_has_1200_by_800_pixels(tmp_path):
    plot_scan(REPORT, tmp_path / "figure.png")
    header = (tmp_path / "figure.png").read_bytes()[16:24]
    assert (int.from_bytes(header[:4]), int.from_bytes(header[4:])) == (1200, 800)


def test_an_older_figure_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    (tmp_path / "figure.svg").write_text("older")
    plot_scan(WEIGHTS, tmp_path / "figure.svg")
    assert b"L11 [507, 1229]" in (tmp_path / "figure.svg").read_bytes()
    assert os.listdir(tmp_path) == ["figure.svg"]


def test_no_window_and_no_backend_for_the_process(tmp_path):
    script = (
        "import sys\n"
        "import swsurgery.scanning.figures\n"
        "assert 'matplotlib' not in sys.modules\n"
        "import test_figures, pathlib\n"
        "swsurgery.scanning.figures.plot_scan(test_figures.WEIGHTS, pathlib.Path('figure.png'))\n"
        "import matplotlib\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert matplotlib.get_backend(auto_select=False) == 'tkagg', matplotlib.get_backend(auto_select=False)\n"
    )
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "MPLBACKEND": "tkagg"}
    environment.pop("DISPLAY", None)
    subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "figure.png").read_bytes().startswith(MAGIC["png"])


# What is refused early


def refused(path: Path) -> str:
    with pytest.raises(TargetError) as early:
        check_figure_path(path)
    for plot, report in ((plot_scan, REPORT), (plot_sweep, SWEEP)):
        with pytest.raises(TargetError) as late:
            plot(report, path)
        assert str(late.value) == str(early.value)
    assert early.value.exit_code == 2 and "\n" not in str(early.value)
    return str(early.value)


@pytest.mark.parametrize("name", ["figure.gif", "figure", ".png", "figure.png.txt"])
def test_another_ending_is_refused_and_the_endings_are_named(tmp_path, name):
    line = refused(tmp_path / name)
    assert name in line and all(ending in line for ending in (".png", ".svg", ".pdf"))
    assert not (tmp_path / name).exists()


def test_a_missing_directory_is_refused(tmp_path):
    directory = tmp_path / "no"
    assert refused(directory / "figure.png") == f"no such directory: {directory} (create the directory first)"


def test_a_directory_of_the_name_is_refused(tmp_path):
    (tmp_path / "figure.png").mkdir()
    assert "this is a directory" in refused(tmp_path / "figure.png")


def test_a_directory_that_may_not_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not (Path(path) == tmp_path and mode & os.W_OK))
    assert "choose a place where you may write" in refused(tmp_path / "figure.png")


def test_without_matplotlib_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'swsurgery[plot]'" in refused(tmp_path / "figure.png")


def test_a_path_that_can_be_written_passes_and_is_not_touched(tmp_path):
    check_figure_path(tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())


# A scan by activations


def test_bars_are_the_profile_and_blue_where_a_super_activation_persists(draw):
    panels = draw(REPORT)
    sides = (REPORT.profile.inputs, REPORT.profile.outputs, REPORT.profile.residuals)
    for panel, values in zip(panels, sides, strict=True):
        assert [bar.get_height() for bar in panel.patches] == list(values)
        assert [bar.get_x() + bar.get_width() / 2 for bar in panel.patches] == pytest.approx(range(30))
        low, high = panel.get_ylim()
        assert low < min(values) and max(values) < high
    colours = [[bar.get_facecolor() for bar in panel.patches] for panel in panels]
    assert len(set(colours[0] + colours[1])) == 1
    assert [layer for layer in range(30) if colours[2][layer] != colours[0][0]] == list(range(11, 28))


def test_marks_stand_on_the_spikes_with_the_shape_of_their_verdict(draw):
    report = confirmed(REPORT, MAKER="needed alone", HELPER="needed jointly", ERASER="inert")
    inputs, outputs, residuals = draw(report)
    assert marks(inputs) == {
        "needed alone": {(11, 4072.0)},
        "needed jointly": {(2, 95.5)},
        "inert": {(28, 4990.0)},
    }
    assert marks(outputs) == {
        "needed alone": {(11, 23880.0)},
        "needed jointly": {(2, 486.0)},
        "inert": {(28, -23800.0)},
    }
    assert marks(residuals) == {}
    shapes = {line.get_label(): line.get_marker() for line in inputs.lines if line.get_linestyle() == "None"}
    assert len(set(shapes.values())) == 3


def test_an_untested_candidate_has_a_mark_of_its_own_and_an_untested_companion_none(draw):
    report = confirmed(REPORT, MAKER="needed alone", HELPER="untested", ERASER="inert", COMPANION="untested")
    inputs, _, _ = draw(report)
    assert marks(inputs)["untested"] == {(2, 95.5)}
    shapes = {line.get_label(): line.get_marker() for line in inputs.lines if line.get_linestyle() == "None"}
    assert len(set(shapes.values())) == 3


def test_a_spike_that_only_an_edited_model_shows_stays_in_its_panel(draw):
    later = candidate(2, 7, 90, input_spike=-4e5, output_spike=9e6, round=2)
    panels = draw(dataclasses.replace(REPORT, candidates=(*REPORT.candidates, later)))
    for panel, spike in zip(panels, (-4e5, 9e6), strict=False):
        low, high = panel.get_ylim()
        assert low < spike < high


def test_labels_legend_and_title_say_what_was_found(svg):
    found = words(REPORT, svg, "SmolLM2")
    assert "SmolLM2, 30 layers: 3 super weights found by activations, not confirmed" in found
    assert {"L11 [507, 1229]", "L2 [507, 90]", "L28 [507, 678]", "not tested"} <= set(found)
    assert not {"needed alone", "needed jointly", "inert"} & set(found)
    assert "channel 507: 23,941" in found and "after layers 11 to 27" in found


def test_after_a_causal_test_only_the_critical_ones_are_counted(svg):
    report = confirmed(REPORT, MAKER="needed alone", HELPER="needed jointly", ERASER="inert")
    found = words(report, svg)
    assert "llama, 30 layers: 2 super weights confirmed" in found
    assert {"L11 [507, 1229]", "L2 [507, 90]", "L28 [507, 678]"} <= set(found)
    assert {"needed alone", "needed jointly", "inert"} <= set(found) and "not tested" not in found


def test_a_candidate_that_no_trial_looked_at_is_not_tested(svg):
    found = words(confirmed(REPORT, MAKER="needed alone"), svg)
    assert {"needed alone", "not tested", "L2 [507, 90]"} <= set(found)


@pytest.mark.parametrize(("verdict", "named"), [("needed jointly", True), ("inert", False)])
def test_a_companion_is_named_only_where_it_matters(svg, verdict, named):
    found = words(confirmed(REPORT, MAKER="needed alone", COMPANION=verdict), svg)
    assert ("L11 [88, 1229]" in found) is named


def test_an_expert_is_named(svg):
    report = dataclasses.replace(REPORT, candidates=(candidate(1, 2070, 7310, expert=5), candidate(3, 1, 2, expert=0)))
    assert {"L1 expert 5 [2070, 7310]", "L3 expert 0 [1, 2]"} <= set(words(report, svg))


def test_labels_stand_at_their_layers(svg):
    plot_scan(REPORT, svg)
    places = {text: x for text, x, _ in texts(svg)}
    for one in REPORT.candidates:
        label = places[f"L{one.layer} [{one.row}, {one.col}]"]
        assert label - places[str(one.layer)] == pytest.approx(11 * PIXEL, abs=0.1), "a mark's width right of the tick"


@pytest.mark.parametrize("layers", [[1, 1, 1, 2, 2, 3], [29, 29, 28, 28, 27], [0, 4, 4, 5, 9, 9, 15, 16, 17, 21, 28]])
def test_no_label_is_written_over_another_or_over_a_pole(svg, layers):
    found = tuple(candidate(layer, 4000 + n, 11000 + n) for n, layer in enumerate(layers))
    plot_scan(dataclasses.replace(REPORT, candidates=found), svg)
    labels = [(text, x, y) for text, x, y in texts(svg) if re.match(r"L\d+ \[", text)]
    assert len(labels) == len(layers)
    for text, x, y in labels:
        end = x + TextPath((0, 0), text, size=9.5).get_extents().x1
        assert end < 1200 * PIXEL and y > 40 * PIXEL, "on the sheet, and below the title"
        for _, other, height in labels:
            if (other, height) != (x, y) and abs(height - y) < 12 * PIXEL:
                assert other > end or other < x, "two labels in one row are apart"
            if x < other - 11 * PIXEL < end:
                assert height > y, "a pole under the text ends below it"


def test_what_finds_no_room_for_a_label_is_still_marked_and_counted(draw, svg):
    many = tuple(candidate(layer, 8, 9, input_spike=100.0 + layer, output_spike=5.0) for layer in range(20))
    report = dataclasses.replace(REPORT, candidates=many)
    assert marks(draw(report)[0]) == {"not tested": {(layer, 100.0 + layer) for layer in range(20)}}


def test_how_many_have_no_label_is_said(svg):
    many = tuple(candidate(layer, 8, 9) for layer in range(20))
    found = words(dataclasses.replace(REPORT, candidates=many), svg)
    assert sum(text.startswith("L") for text in found) == 14 and "6 more marked without a label" in found
    assert not any("without a label" in text for text in words(REPORT, svg))


def test_nothing_found_is_said_in_the_title(svg, draw):
    quiet = tuple(float(n % 7 - 3) for n in range(30))
    report = dataclasses.replace(REPORT, candidates=(), activations=(), profile=Profile(quiet, quiet, quiet))
    found = words(report, svg)
    assert "llama, 30 layers: no super weight found by activations" in found
    assert not any(text.startswith("L") or text in ("not tested", "super activation") for text in found)
    assert [panel.get_yscale() for panel in draw(report)] == ["linear"] * 3, "no spike, no decades"


def test_spikes_and_ordinary_layers_share_a_scale_of_decades(draw):
    inputs, outputs, residuals = draw(REPORT)
    for panel in (inputs, outputs, residuals):
        assert panel.get_yscale() == "symlog"
    heights = residuals.transData.transform([(0, y) for y in (0, 3, 480, 23941)])[:, 1]
    axis = residuals.bbox.height
    assert heights[1] - heights[0] < 0.02 * axis, "an ordinary layer is flat"
    assert heights[2] - heights[0] > 0.2 * axis and heights[3] - heights[2] > 0.2 * axis, "both spikes are seen"


def test_layers_without_a_value_or_with_an_infinite_one_are_drawn_as_such(draw):
    values = (math.nan, 2.0, math.inf, -math.inf, 3.0)
    report = Scan("activations", "llama", 5, (), profile=Profile(values, values, values))
    for panel in draw(report):
        assert [bar.get_height() for bar in panel.patches] == [0, 2, 0, 0, 3]
        assert [(text.get_position()[0], text.get_text().strip()) for text in panel.texts] == [
            (2, "infinite"),
            (3, "infinite"),
        ]
        assert all(math.isfinite(limit) for limit in panel.get_ylim())


def test_a_profile_of_zeros_or_of_nothing_is_drawn(draw):
    for value in (0.0, math.nan):
        report = dataclasses.replace(REPORT, candidates=(), profile=Profile(*[(value,) * 30] * 3))
        assert all(low < 0 < high for low, high in (panel.get_ylim() for panel in draw(report)))


def test_names_from_a_file_cannot_break_the_title(svg):
    assert "$x$\\n{y} $, 30 layers: 3 super weights found by activations, not confirmed" in words(
        REPORT, svg, "$x$\n{y} $"
    )


# A scan by weights


def test_scores_stand_at_their_layers_above_the_threshold(draw):
    (panel,) = draw(WEIGHTS)
    assert marks(panel) == {"not tested": {(28, 14.2), (11, 13.6)}}
    assert [list(line.get_ydata()) for line in panel.lines if line.get_linestyle() == "--"] == [[7.5, 7.5]]
    low, high = panel.get_ylim()
    assert low == 0 and high > 14.2


def test_the_threshold_and_the_method_are_named(svg):
    found = words(WEIGHTS, svg)
    assert "llama, 30 layers: 2 super weights found by weights alone, not confirmed" in found
    assert {"threshold 7.5", "L28 [507, 678]", "L11 [507, 1229]"} <= set(found)


def test_no_score_above_the_threshold_is_explained(svg):
    note = "the largest robust z-score is 5.2"
    found = words(dataclasses.replace(WEIGHTS, candidates=(), notes=(note,)), svg)
    assert "llama, 30 layers: no super weight found by weights alone" in found and note in found
    assert note not in words(dataclasses.replace(WEIGHTS, notes=(note,)), svg)


# A sweep


def test_curves_are_the_points_in_order_with_the_base_marked_once(draw):
    perplexity, kl, mass = draw(SWEEP)
    wanted = ([165, 44, 29.6, 71], [2.1, 0.5, 0, 0.9], [0.05, 0.22, 0.31, 0.36])
    for panel, values in zip((perplexity, kl, mass), wanted, strict=True):
        curve = panel.lines[0]
        assert list(curve.get_xdata()) == [0, 0.5, 1, 2] and list(curve.get_ydata()) == values
        assert marks(panel) == {
            "as stored (factor 1)": {(1, values[2])},
            "scaled": {(0, values[0]), (0.5, values[1]), (2, values[3])},
        }
    assert [panel.get_yscale() for panel in (perplexity, kl, mass)] == ["log", "linear", "linear"]
    assert [text.get_text() for text in perplexity.texts] == ["29.6", "165", "44", "71"]


def test_a_base_that_was_not_swept_is_drawn_too(draw):
    without = dataclasses.replace(SWEEP, points=SWEEP.points[:3])
    assert list(draw(without)[0].lines[0].get_xdata()) == [0, 0.5, 1, 2]


def test_what_is_not_finite_is_a_gap_with_a_cross(draw):
    points = (point(0.5, 44, 0.5, 0.2), point(2, math.inf, 3.0, 0.4), point(4, 50, 1.0, 0.1, finite=False))
    perplexity, kl, _ = draw(dataclasses.replace(SWEEP, points=points))
    assert {x for x, _ in marks(perplexity)["not finite"]} == {2, 4}
    assert {x for x, _ in marks(kl)["not finite"]} == {4}
    assert [math.isfinite(y) for y in perplexity.lines[0].get_ydata()] == [True, True, False, False]
    assert [math.isfinite(y) for y in kl.lines[0].get_ydata()] == [True, True, True, False]


def test_a_sweep_of_nothing_finite_is_drawn(draw):
    lost = point(1, math.nan, math.nan, math.nan, finite=False)
    report = dataclasses.replace(SWEEP, base=lost, points=(dataclasses.replace(lost, factor=0.0),))
    assert all(set(marks(panel)) == {"not finite"} for panel in draw(report))


def test_a_sweep_names_what_was_scaled_and_measured(svg):
    found = words(SWEEP, svg, "SmolLM2")
    assert "SmolLM2: model.layers.11.mlp.down_proj.weight[507, 1229], scaled" in found
    assert (
        "16 windows of 512 tokens (8,176 scored), default: without overlap, BOS as the tokenizer adds it, "
        "text sha256 abababababab, float32 on cpu" in found
    )
    assert "as stored (factor 1)" in found and "not finite" not in found
    several = dataclasses.replace(SWEEP, coordinates=(MAKER.coordinate, HELPER.coordinate))
    assert "2 scalars, scaled" in words(several, svg)


@pytest.mark.parametrize("perplexities", [(29.6, 29.7), (29.6, 300.0), (5.0, 5.0e7)])
def test_the_perplexity_axis_has_round_ticks_for_any_range(draw, perplexities):
    points = tuple(point(float(n * 2), p, 0.1, 0.3) for n, p in enumerate(perplexities))
    panel = draw(dataclasses.replace(SWEEP, points=points))[0]
    low, high = panel.get_ylim()
    ticks = [tick for tick in panel.get_yticks() if low <= tick <= high]
    assert low < min(perplexities) and max(perplexities) < high
    assert 2 <= len(ticks) <= 10 and {f"{tick:e}"[0] for tick in ticks} <= {"1", "2", "5"}


@pytest.mark.parametrize("count", [2, 15, 24, 70])
def test_compared_models_are_named_beside_the_panels_or_counted(tmp_path, count):
    kinds = ("as computed", "8 bits per token", "8 bits per token, super activation held out")
    figures = (1, 2, 0.5, 0.1, 30.0, 1.0, None, None, 0.1, None, None, 0.4, True)
    models = tuple(
        ComparedModel(f"m{n}.yaml" if n > 2 else None, kinds[n % 3] if n else kinds[0], *figures) for n in range(count)
    )
    report = Comparison("base", models, 2, 128, 254, "ab" * 32, "float32", "cpu", "whole")
    curve_figures.plot_comparison(report, tmp_path / "figure.svg")
    names = [(text, y) for text, x, y in texts(tmp_path / "figure.svg") if x > 1000 * PIXEL]
    assert all(0 < y < 750 * PIXEL for _, y in names)
    named = {int(text.split()[0]) for text, _ in names if text[0].isdigit()}
    left = [int(text.split()[1]) for text, _ in names if text.startswith("and ")]
    assert named == set(range(len(named))) and len(named) + sum(left) == count
    assert bool(left) == (count > 24)
