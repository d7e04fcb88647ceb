"""Options take their defaults from the permitted variables, and from no other."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer
from patched import write_patched

from swsurgery.cli import main, make_app
from swsurgery.cli.environment import PERMITTED, REFUSED
from swsurgery.editing import check_options
from swsurgery.storage.hashing import THREADS_VARIABLE

ROOT = Path(__file__).parents[2]
OPTIONS = [
    (name, parameter)
    for name, command in typer.main.get_command(make_app()).commands.items()
    for parameter in command.params
    if parameter.param_type_name == "option" and parameter.name != "help"
]
NEVER = ("--in-place", "-o", "--output", "--base", "--link", "--yes", "--force", "--key", "--register", "--page",
         "--plot", "--manifest", "--dry-run", "--check", "--undo-limit", "--private", "--revision")  # fmt: skip
BAD = {
    "SWSURGERY_WINDOWS": "abc",
    "SWSURGERY_WINDOW": "1",
    "SWSURGERY_STRIDE": "0",
    "SWSURGERY_BOS": "perhaps",
    "SWSURGERY_SCORE_FIRST": "2",
    "SWSURGERY_PROTOCOL": "mine",
    "SWSURGERY_GENERATE": "-1",
    "SWSURGERY_ACTIVATION_BITS": "1",
    "SWSURGERY_ACTIVATION_PER": "row",
    "SWSURGERY_PLACEMENT": "here",
    "SWSURGERY_DEVICE": "gpu",
    "SWSURGERY_TEXT": "nothere.txt",
    "SWSURGERY_QUIET": "perhaps",
    "SWSURGERY_DEBUG": "2",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_patched(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("command", "option"), OPTIONS, ids=lambda value: getattr(value, "name", value))
def test_every_option_is_in_one_table(command, option):
    """A new option fails here until one of the tables of swsurgery/cli/environment.py contains it."""
    assert (option.name in PERMITTED) != (option.name in REFUSED)
    assert option.envvar == PERMITTED.get(option.name)


def test_the_tables_contain_no_option_that_does_not_exist():
    assert {*PERMITTED, *REFUSED} == {option.name for _, option in OPTIONS}


def test_no_variable_chooses_what_is_written():
    refused = {word for _, option in OPTIONS if option.name in REFUSED for word in option.opts}
    assert set(NEVER) - {"--force"} <= refused
    assert not any(set(option.opts) & set(NEVER) for _, option in OPTIONS if option.name in PERMITTED)


def test_the_variables_have_no_other_meaning():
    assert len(set(PERMITTED.values())) == len(PERMITTED)
    assert THREADS_VARIABLE not in PERMITTED.values()
    assert not any(variable.startswith("SWSURGERY_TEST") for variable in PERMITTED.values())
    assert all(variable == f"SWSURGERY_{name.upper()}" for name, variable in PERMITTED.items())


def test_the_page_lists_every_variable():
    page = (ROOT / "docs" / "shell.md").read_text()
    rows = dict(re.findall(r"^\| `(SWSURGERY_\w+)` \| `--([\w-]+)` \|", page, re.M))
    assert rows == {variable: name.replace("_", "-") for name, variable in PERMITTED.items()}


@pytest.mark.parametrize("variable", BAD)
def test_a_bad_value_is_one_line_that_names_the_variable(folder, monkeypatch, capsys, variable):
    monkeypatch.setenv(variable, BAD[variable])
    assert main(["check", "patched"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert f": {variable}={BAD[variable]}" in printed.err


@pytest.mark.parametrize("value", ["0", "65", "-1", "four", "1.5", "٤", " 4", "9" * 5000])
@pytest.mark.parametrize("words", [("inspect", "base"), ("scan", "base"), ("lookup", "smollm2")])
def test_every_command_refuses_a_bad_number_of_threads(folder, monkeypatch, capsys, words, value):
    monkeypatch.setenv(THREADS_VARIABLE, value)
    assert main([*words, "--json"]) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out)["error"]["what"].endswith("(not a number from 1 to 64)")
    assert printed.err.count("\n") == 1 and f": {THREADS_VARIABLE}={value}" in printed.err


@pytest.mark.parametrize("value", ["", "1", "64"])
def test_a_number_of_threads_is_accepted(folder, monkeypatch, capsys, value):
    monkeypatch.setenv(THREADS_VARIABLE, value)
    assert main(["inspect", "base"]) == 0


def test_a_bad_value_is_a_json_error_too(folder, monkeypatch, capsys):
    monkeypatch.setenv("SWSURGERY_WINDOWS", "0")
    assert main(["check", "patched", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["where"] == "SWSURGERY_WINDOWS=0" and error["remedy"] == "change or unset SWSURGERY_WINDOWS"


def test_a_hostile_value_is_escaped(folder, monkeypatch, capsys):
    monkeypatch.setenv("SWSURGERY_DEVICE", "\x1b[31m\n")
    assert main(["check", "patched"]) == 2
    assert capsys.readouterr().err.startswith("swsurgery: no such device: SWSURGERY_DEVICE=\\x1b[31m\\n (")


def test_the_command_line_takes_precedence(folder, monkeypatch, capsys):
    monkeypatch.setenv("SWSURGERY_DEVICE", "gpu")
    assert main(["check", "patched", "--device", "tpu"]) == 2
    assert capsys.readouterr().err.startswith("swsurgery: no such device: tpu (")
    monkeypatch.setenv("SWSURGERY_WINDOWS", "0")
    assert main(["check", "patched", "--windows", "-1"]) == 2
    assert "SWSURGERY" not in capsys.readouterr().err


def test_an_empty_variable_is_unset(folder, monkeypatch, capsys):
    monkeypatch.setenv("SWSURGERY_JSON", "")
    assert main(["verify", "patched"]) == 0
    assert capsys.readouterr().out.startswith("OK")


@pytest.mark.parametrize("value", ["1", "true", "yes", "on", "TRUE"])
def test_json_and_quiet_from_variables(folder, monkeypatch, capsys, value):
    monkeypatch.setenv("SWSURGERY_JSON", value)
    monkeypatch.setenv("SWSURGERY_QUIET", value)
    assert main(["verify", "patched"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["ok"] and printed.err == ""
    assert main(["verify", "nothere"]) == 2 and main(["verfy"]) == 2
    first, second = capsys.readouterr().out.split("}\n{")
    assert json.loads(first + "}")["error"] and json.loads("{" + second)["error"]


def test_a_form_on_the_command_line_takes_precedence_over_json(folder, monkeypatch, capsys):
    monkeypatch.setenv("SWSURGERY_JSON", "1")
    assert main(["inspect", "base", "--csv"]) == 0
    assert not capsys.readouterr().out.startswith("{")
    assert main(["verify", "patched", "--format", "junit"]) == 0
    assert capsys.readouterr().out.startswith("<?xml")


def test_a_variable_does_not_make_an_optional_check_compulsory(folder, monkeypatch):
    found = []
    monkeypatch.setattr(check_options.CheckOptions, "__post_init__", lambda options: found.append(options))
    monkeypatch.setenv("SWSURGERY_WINDOWS", "3")
    main(["apply", "patched.yaml", "-o", "new", "--dry-run"])
    main(["apply", "patched.yaml", "-o", "patched"])
    main(["apply", "patched.yaml", "-o", "patched", "--windows", "3"])
    assert [(options.windows, options.asked) for options in found] == [(3, False), (3, True)]
