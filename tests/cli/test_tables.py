"""Tables, colours and progress on a terminal of 80 columns, and the same without a terminal."""

from __future__ import annotations

import io
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swsurgery.cli import progress_bar
from swsurgery.cli.output import Bar, print_table, print_text
from swsurgery.cli.tables import format_table

TENSOR = "model.layers.{}.mlp.down_proj.weight"
HEADER = ("op", "tensor", "index", "dtype", "old", "new", "file", "offset")

FIRST_LINE = progress_bar.FIRST_LINE
"""The time of the product, which tests replace."""


def make_rows(count: int) -> list[tuple[object, ...]]:
    shard = "model-00003-of-00005.safetensors"
    return [("zero", TENSOR.format(n), f"[507, {n}]", "BF16", 5.875, 0.0, shard, 1000 * n) for n in range(count)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def open_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make stdout a terminal of 80 columns with colours."""
    for name in ("NO_COLOR", "COLUMNS", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    return stream


def test_a_table_without_a_terminal_has_one_line_per_row():
    lines = format_table(HEADER, make_rows(3))
    assert len(lines) == 4 and len(lines[0]) > 110
    assert lines == format_table(HEADER, make_rows(3), width=1000)


def test_equal_cells_are_written_once_above_a_table_that_is_too_wide():
    lines = format_table(HEADER, make_rows(2), width=80)
    assert lines == [
        "file  model-00003-of-00005.safetensors",
        "",
        "op    tensor                               index     dtype    old  new  offset",
        "zero  model.layers.0.mlp.down_proj.weight  [507, 0]  BF16   5.875  0.0       0",
        "zero  model.layers.1.mlp.down_proj.weight  [507, 1]  BF16   5.875  0.0    1000",
    ]


def test_one_row_that_is_too_wide_becomes_one_line_per_cell():
    lines = format_table(HEADER, make_rows(1), width=80)
    assert lines[1] == "tensor  model.layers.0.mlp.down_proj.weight"
    assert len(lines) == len(HEADER) and max(map(len, lines)) <= 80


def test_a_row_continues_on_an_indented_line():
    rows = [[f"{letter}{n}" * 5 for letter in "abcdef"] for n in range(2)]
    lines = format_table("abcdef", rows, width=40)
    assert max(map(len, lines)) <= 40
    assert [line.startswith("    ") for line in lines] == [False, True] * 3


@given(
    st.integers(1, 5).flatmap(
        lambda n: st.lists(st.lists(st.text("ab1 ", max_size=12), min_size=n, max_size=n), min_size=1, max_size=4)
    ),
    st.integers(10, 60),
)
def test_a_narrow_table_contains_every_cell_and_fits(rows: list[list[str]], width: int):
    header = [f"h{n}" for n in range(len(rows[0]))]
    lines = format_table(header, rows, width)
    text = "\n".join(lines)
    assert all(cell.strip() in text for row in rows for cell in row)
    assert max(map(len, lines), default=0) <= max(width, 16)


def test_a_verdict_has_a_colour_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch):
    terminal = open_terminal(monkeypatch)
    print_text("OK: it is the base\nNOTHING\nFAILED    a bound")
    monkeypatch.setenv("NO_COLOR", "1")
    print_text("OK: plain")
    monkeypatch.setattr(sys, "stdout", plain := io.StringIO())
    monkeypatch.delenv("NO_COLOR")
    print_text("NO: 1 finding")
    assert terminal.getvalue().splitlines() == [
        "\x1b[1;32mOK\x1b[0m: it is the base",
        "NOTHING",
        "\x1b[1;31mFAILED\x1b[0m    a bound",
        "OK: plain",
    ]
    assert plain.getvalue() == "NO: 1 finding\n"


def test_a_table_escapes_control_characters_once(monkeypatch: pytest.MonkeyPatch):
    terminal = open_terminal(monkeypatch)
    print_table(("a", "b"), [("x\n", "\x1b[31m")])
    assert terminal.getvalue().splitlines() == ["a    b", "x\\n  \\x1b[31m"]


def test_a_long_task_prints_lines_without_a_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress_bar, "FIRST_LINE", 0.02)
    monkeypatch.setattr(progress_bar, "SHORT_TASK", 0.02)
    monkeypatch.setattr(progress_bar, "NEXT_LINE", 0.1)
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    bar = Bar()
    bar.start(4, "layer", "4 layers")
    bar.advance(1)
    time.sleep(0.3)
    bar.close()
    lines = log.getvalue().splitlines()
    assert set(lines) == {"swsurgery: 4 layers, 25% ..."} and 2 <= len(lines) <= 4
    bar.start(1, "layer", "another task")
    bar.close()
    Bar(quiet=True).start(0, "", "a task")
    time.sleep(0.1)
    assert log.getvalue().splitlines() == lines, "a short task, and a task with --quiet, print nothing"


def test_each_kind_of_task_prints_a_line_without_a_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress_bar, "PHASE_LINE", 0.05)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    bar = Bar()
    bar.start(0, "", "loading torch")
    assert log.getvalue() == "swsurgery: loading torch ...\n", "a task of unknown length prints a line at once"
    for number in (1, 2):
        bar.start(2, "layer", f"round {number}")
        time.sleep(0.3)
    bar.start(0, "", "loading torch")
    time.sleep(0.1)
    bar.close()
    lines = log.getvalue().splitlines()
    assert lines == ["swsurgery: loading torch ...", "swsurgery: round 1, 0% ..."], "similar tasks print one line"


@pytest.mark.parametrize(("earlier", "seconds"), [(0.0, 0.25), (0.125, 0.125), (0.24, 0.05), (9.0, 0.05)])
def test_the_first_line_is_due_a_quarter_of_a_second_after_the_command_began(
    monkeypatch: pytest.MonkeyPatch, earlier: float, seconds: float
):
    monkeypatch.setattr(progress_bar, "FIRST_LINE", FIRST_LINE)
    waits: list[float] = []
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    monkeypatch.setattr(progress_bar, "_Lines", lambda total, label, wait: waits.append(wait))
    Bar(began=1000.0 - earlier).start(4, "layer", "4 layers")
    assert waits == [seconds]


def test_a_terminal_shows_a_task_of_unknown_length_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    bar = Bar()
    bar.start(0, "", "loading torch")
    assert "loading torch ..." in screen.getvalue()
    bar.close()
