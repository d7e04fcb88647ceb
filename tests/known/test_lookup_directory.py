"""lookup of a directory: the record of the patched checkpoint in it, for people and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from patched import DOWN, SECOND, apply_text, write_patched

from swsurgery.cli import main


@pytest.fixture
def patched(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_patched(tmp_path)


def test_shows_every_edit_and_protected_scalar(patched, capsys):
    assert main(["lookup", str(patched)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if DOWN in line]
    assert [(row[0], "".join(row[2:4])) for row in rows] == [
        ("zero", "[1,2]"),
        ("scale", "[3,5]"),
        ("protect", "[0,4]"),
    ]


def test_json_is_the_record(patched, capsys):
    assert main(["lookup", str(patched), "--json"]) == 0
    record = json.loads((patched / "swsurgery.json").read_text())
    assert json.loads(capsys.readouterr().out) == record | {"schema": "swsurgery/lookup/1"}


def test_shows_the_steps_of_two_manifests(patched, tmp_path, capsys):
    text = "version: 1\nbase: {path: patched}\nedits:\n  - {op: zero, tensor: lm_head.weight, index: [0, 0]}\n"
    again = apply_text(tmp_path, text, "again")
    assert main(["lookup", str(again)]) == 0
    shown = capsys.readouterr().out
    first, second = shown.index("step 1"), shown.index("step 2")
    assert first < shown.index(DOWN) < second < shown.index("lm_head.weight")
    assert SECOND in shown[second:]


def test_a_relative_name_is_the_directory_too(patched, monkeypatch, capsys):
    monkeypatch.chdir(patched.parent)
    assert main(["lookup", "patched", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["edits"]) == 2


@pytest.mark.parametrize("name", ["{}", "base", "./base"])
def test_a_directory_without_a_record_is_bad_input(patched, monkeypatch, capsys, name):
    monkeypatch.chdir(patched.parent)
    assert main(["lookup", name.format(patched.parent / "base")]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith("swsurgery: ")


def test_a_damaged_record_is_bad_input(patched, capsys):
    (patched / "swsurgery.json").write_text("{")
    assert main(["lookup", str(patched)]) == 2
    assert capsys.readouterr().err.startswith("swsurgery: is not valid JSON")
