"""--csv and --latex print the rows of a result, and no name in a row has an effect on what reads them."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from page_documents import COMPARISON, SWEEP
from patched import DOWN, write_patched

import swsurgery
from swsurgery.cli import main
from swsurgery.cli.output import Output
from swsurgery.cli.table_formats import render_table

COMMANDS = ["diff base patched", "diff base base", "inspect base", "lookup llama-7b", "lookup", "lookup patched"]


@pytest.fixture
def room(tmp_path, monkeypatch):
    write_patched(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def find_result(words: list[str]):
    return getattr(swsurgery, words[0])(*words[1:])


@pytest.mark.parametrize("command", COMMANDS)
def test_csv_has_the_rows_of_the_library(room, capsys, command):
    code = main([*command.split(), "--csv"])
    rows = read(text := capsys.readouterr().out)
    result = find_result(command.split())
    assert code == (1 if command == "diff base patched" else 0)
    assert text.splitlines()[0] == ",".join(result.list_columns())
    wanted = [
        {k: "" if v is None else v if isinstance(v, str) else json.dumps(v) for k, v in r.items()}
        for r in result.to_rows()
    ]
    assert rows == wanted


@pytest.mark.parametrize("command", COMMANDS)
def test_latex_has_a_row_for_each_row(room, capsys, command):
    main([*command.split(), "--latex"])
    lines = capsys.readouterr().out.splitlines()
    result = find_result(command.split())
    assert lines[0] == "% needs \\usepackage{booktabs}" and lines[-1] == "\\end{tabular}"
    body = lines[lines.index("\\midrule") + 1 : lines.index("\\bottomrule")]
    assert len(body) == len(result.to_rows())
    width = len(re.fullmatch(r"\\begin\{tabular\}\{([lr]+)\}", lines[1])[1])
    assert width == len(result.list_columns())
    assert all(len(re.findall(r"(?<!\\)&", line)) == width - 1 and line.endswith(" \\\\") for line in body)


def test_sweeps_and_comparisons_are_tables(capsys):
    for result in (SWEEP, COMPARISON):
        Output(table="csv").print_result(result, print)
        rows = read(capsys.readouterr().out)
        assert [list(row) for row in rows] == [list(result.list_columns())] * len(result.to_rows())
        assert {"perplexity", "ratio", "ratio_low", "ratio_high", "kl_high"} <= set(rows[0])
    assert rows[1]["manifest"] == "m/zero.yaml" and float(rows[1]["ratio_high"]) == 6.2


@pytest.mark.parametrize(
    "command",
    [f"inspect base --tensor {DOWN}", "lookup llama-7b --manifest zero", "lookup llama-7b --as modules"],
)
@pytest.mark.parametrize("form", ["csv", "latex"])
def test_a_result_that_is_no_table_is_refused(room, capsys, command, form):
    assert main([*command.split(), f"--{form}"]) == 2
    printed = capsys.readouterr()
    assert (
        printed.out == ""
        and printed.err == f"swsurgery: --{form} needs a table, but this result is none (give --json instead)\n"
    )


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("lookup --json --csv", "--json and --csv"),
        ("lookup --csv --latex", "--csv and --latex"),
        ("lint patched.yaml --json --format sarif", "--json and --format"),
        ("verify patched --json --format json", "--json and --format"),
        ("preflight base --json --format text", "--json and --format"),
    ],
)
def test_two_forms_are_refused(room, capsys, command, what):
    assert main(command.split()) == 2
    printed = capsys.readouterr()
    assert printed.err == f"swsurgery: {what} cannot be combined (give one of them)\n"
    assert bool(printed.out) is ("--json" in command)


def test_the_format_of_an_export_is_no_form_of_the_answer(room, capsys):
    assert main(["export", "patched", "--format", "sparse", "-o", "patch.safetensors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "sparse"


HOSTILE = [
    "=cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(A1)",
    "+1",
    'a"b,c\nd',
    "\x1b[31mred",
    "\u202eabc",
    "a\u2028b",
    "",
    "-inf",
    "nan",
]


def test_a_csv_cell_is_one_line_and_no_formula():
    text = render_table("csv", ["name"], [{"name": name} for name in HOSTILE])
    cells = [row["name"] for row in read(text + "")]
    assert len(text.splitlines()) == len(HOSTILE) + 1
    assert cells[:4] == [f"'{name}" for name in HOSTILE[:4]]
    assert cells[4] == 'a"b,c\\nd' and cells[5] == "\\x1b[31mred" and cells[-2:] == ["-inf", "nan"]


@given(st.lists(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False),
                          st.lists(st.integers(), max_size=3)), min_size=1, max_size=4))  # fmt: skip
def test_numbers_are_read_back_from_csv(cells):
    names = [f"c{number}" for number in range(len(cells))]
    [row] = read(render_table("csv", names, [dict(zip(names, cells, strict=True))]))
    assert [json.loads(cell) if cell else None for cell in row.values()] == cells


PLAIN = {
    "\\textbackslash{}": "\\", "\\textasciicircum{}": "^", "\\textasciitilde{}": "~", "\\textless{}": "<",
    "\\textgreater{}": ">", "\\textbar{}": "|", "\\textquotedbl{}": '"', "{[}": "[", "{*}": "*", "{}": "",
    "\\{": "{", "\\}": "}", "\\$": "$", "\\&": "&", "\\#": "#", "\\%": "%", "\\_": "_",
}  # fmt: skip


def typeset(cell: str) -> str:
    """What LaTeX would print: a reader that knows the commands above and fails for anything else with a meaning."""
    text, at = "", 0
    while at < len(cell):
        command = next((c for c in sorted(PLAIN, key=len, reverse=True) if cell.startswith(c, at)), None)
        assert command or cell[at] not in '\\{}$&#%_^~<>|"[*', cell
        assert command or cell[at : at + 2] not in ("--", "``", "''", "?`", "!`", ",,"), cell
        text += PLAIN[command] if command else cell[at]
        at += len(command or "x")
    return text


@given(st.text(alphabet=st.one_of(st.sampled_from("\\{}$&#%_^~<>|\"[]*-`'?!, a1"), st.characters()), max_size=20))
def test_latex_prints_the_text(name):
    [line] = render_table("latex", ["n"], [{"n": name}]).splitlines()[5:-2]
    assert typeset(line.removesuffix(" \\\\")) == swsurgery.errors.escape_control(name) or name in (
        "nan",
        "inf",
        "-inf",
    )


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (None, "--"), (True, "yes"), (False, "no"), (7, "7"), (-7, "$-7$"), (0.5, "0.5"), (-0.5, "$-0.5$"),
        (29.6123, "29.61"), (15130600000.0, "$1.513\\times 10^{10}$"), (2.5e-07, "$2.5\\times 10^{-7}$"),
        ("inf", "$\\infty$"), ("-inf", "$-\\infty$"), ("nan", "$\\mathrm{nan}$"), ([507, 1229], "{[}507, 1229]"),
        ({"a": 1}, "\\{\\textquotedbl{}a\\textquotedbl{}: 1\\}"),
    ],
)  # fmt: skip
def test_a_latex_cell(cell, text):
    lines = render_table("latex", ["c", "text"], [{"c": cell, "text": "x"}]).splitlines()
    assert lines[5] == f"{text} & x \\\\"
    numeric = cell in (None, "inf", "-inf", "nan") or type(cell) in (int, float)
    assert lines[1] == f"\\begin{{tabular}}{{{'r' if numeric else 'l'}l}}"
