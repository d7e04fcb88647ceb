"""revert: the base byte for byte, or nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from patched import DOWN, EDITED, FIRST, MANIFEST, SECOND, apply_text, contents, flip, place, write_base, write_patched

import swsurgery
from swsurgery.cli import main
from swsurgery.editing.revert import revert
from swsurgery.errors import SwsurgeryError, TargetError
from swsurgery.storage.names import OWN_FILES

SECOND_STEP = f"""version: 1
base: {{path: patched}}
edits:
  - {{op: set, tensor: {DOWN}, index: [1, 2], value: 3.0}}
  - {{op: scale, tensor: lm_head.weight, index: [0, 0], factor: 0.5}}
"""


@pytest.fixture
def patched(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_patched(tmp_path)


def test_gives_the_base_back_byte_for_byte(patched, tmp_path):
    before = contents(patched)
    assert contents(tmp_path / "base")[FIRST] != before[FIRST], "there is something to undo"
    shutil.copytree(tmp_path / "base", tmp_path / "kept")
    shutil.rmtree(tmp_path / "base")
    assert revert(patched, tmp_path / "back").notes == ()
    assert contents(tmp_path / "back") == contents(tmp_path / "kept")
    assert contents(patched) == before, "the patched checkpoint is left as it was"


def test_files_that_were_added_since_are_named(patched, tmp_path, capsys):
    for name in ("notes.txt", "README.md"):
        (patched / name).write_text("added")
    assert main(["revert", str(patched), "-o", str(tmp_path / "back")]) == 0
    assert "left out, because the record does not list them: README.md, notes.txt\n" in capsys.readouterr().err
    assert contents(tmp_path / "back") == contents(tmp_path / "base")


def test_undoes_the_last_of_two_manifests_and_then_the_first(patched, tmp_path):
    apply_text(tmp_path, SECOND_STEP, "again")
    revert(tmp_path / "again", tmp_path / "once")
    assert contents(tmp_path / "once") == contents(patched)
    assert set(OWN_FILES) <= set(contents(tmp_path / "once"))
    assert swsurgery.verify(tmp_path / "once").ok
    revert(tmp_path / "once", tmp_path / "twice")
    assert contents(tmp_path / "twice") == contents(tmp_path / "base")


def test_a_checkpoint_applied_again_after_reverting_is_the_same(patched, tmp_path):
    revert(patched, tmp_path / "back")
    again = apply_text(tmp_path, MANIFEST, "again", base=tmp_path / "back")
    ours, theirs = contents(patched), contents(again)
    assert {n: b for n, b in ours.items() if n.startswith("model")} == {
        n: b for n, b in theirs.items() if n.startswith("model")
    }


@pytest.mark.parametrize(("file", "at"), [(FIRST, -1), (SECOND, -1), ("tokenizer.json", 0)])
def test_refuses_a_changed_file_and_leaves_nothing(patched, tmp_path, file, at):
    flip(patched / file, at)
    before = set(tmp_path.iterdir())
    with pytest.raises(SwsurgeryError, match=file):
        revert(patched, tmp_path / "back")
    assert set(tmp_path.iterdir()) == before


def test_refuses_a_changed_edit(patched, tmp_path):
    flip(patched / FIRST, place(patched / FIRST, DOWN, EDITED))
    with pytest.raises(SwsurgeryError):
        revert(patched, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_refuses_a_missing_file(patched, tmp_path):
    (patched / "tokenizer.json").unlink()
    with pytest.raises(SwsurgeryError, match="tokenizer.json"):
        revert(patched, tmp_path / "back")


@pytest.mark.parametrize("key", ["old_bits", "new_bits", "offset"])
def test_refuses_a_record_that_does_not_lead_to_the_base(patched, tmp_path, key):
    path = patched / "swsurgery.json"
    document = json.loads(path.read_text())
    document["edits"][0][key] = 8 if key == "offset" else "0x1234"
    path.write_text(json.dumps(document))
    with pytest.raises(SwsurgeryError):
        revert(patched, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_refuses_bits_of_another_width_as_bad_input(patched, tmp_path):
    path = patched / "swsurgery.json"
    document = json.loads(path.read_text())
    document["edits"][0]["old_bits"] = "0x12"
    path.write_text(json.dumps(document))
    with pytest.raises(SwsurgeryError):
        revert(patched, tmp_path / "back")


def test_refuses_a_checkpoint_without_a_record(patched, tmp_path):
    with pytest.raises(SwsurgeryError, match="no record"):
        revert(tmp_path / "base", tmp_path / "back")


def test_never_overwrites(patched, tmp_path):
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "mine").write_text("mine")
    with pytest.raises(TargetError):
        revert(patched, tmp_path / "back")
    assert contents(tmp_path / "back") == {"mine": b"mine"}


def test_notes_what_the_base_had_besides(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = write_base(tmp_path / "base")
    (base / "pytorch_model.bin").write_bytes(b"another copy of the weights")
    text = MANIFEST.replace("{path: base}", "{path: base, copies: omit}")
    patched = apply_text(tmp_path, text, "patched")
    (note,) = revert(patched, tmp_path / "back").notes
    assert "pytorch_model.bin" in note
    kept = contents(base)
    del kept["pytorch_model.bin"]
    assert contents(tmp_path / "back") == kept


def test_exit_codes_and_json(patched, tmp_path, capsys):
    assert main(["revert", str(patched), "-o", str(tmp_path / "back"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "output": str(tmp_path / "back"),
        "notes": [],
        "schema": "swsurgery/revert/1",
    }
    assert main(["revert", str(patched), "-o", str(tmp_path / "back")]) == 2
