"""What swsurgery 0.1.0 wrote stays readable: records, a journal, and the entry of an own scan.

`assets/written_by_0_1_0.zip` has the bytes that the command of 0.1.0 wrote:
    base                 the unedited checkpoint (`checkpoints.write_llama`)
    copy                 `apply -o`: a zero, a scale and a protect
    chain                `apply --in-place` of the same edits, then of a set
    cut                  the same first edits, killed before the journal was removed
    scanned, data        a checkpoint with a planted super weight, and what `scan --register my-base` remembered
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from checkpoints import FIRST, down, place, stored, tree, write_manifest

from swsurgery import cli

ASSET = Path(__file__).parents[1] / "assets" / "written_by_0_1_0.zip"
OWN = {"swsurgery.json", "manifest.yaml", "SHA256SUMS"}


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A folder with everything that 0.1.0 wrote, and the working directory."""
    with zipfile.ZipFile(ASSET) as file:
        file.extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path


def test_it_was_written_by_0_1_0(old):
    for name in ("copy", "chain", "cut"):
        assert json.loads((old / name / "swsurgery.json").read_text())["swsurgery_version"] == "0.1.0"
    journal = (old / "cut" / ".swsurgery-journal").read_text()
    assert json.loads(journal.splitlines()[0])["version"] == 1


@pytest.mark.parametrize(("name", "proved"), [("copy", 2), ("chain", 1)])
def test_its_records_are_proved(old, capsys, name, proved):
    assert cli.main(["verify", name, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["ok"], said["files"], said["edits"], said["protected"]) == (True, 8, proved, 1)
    assert said["unverified"] == [] and len(said["proved"]) == 8


def test_a_changed_byte_is_found_by_its_record(old, capsys):
    offset, _ = place(old / "copy" / FIRST, down(0), (0, 1))
    data = bytearray((old / "copy" / FIRST).read_bytes())
    data[offset] ^= 1
    (old / "copy" / FIRST).write_bytes(data)
    assert cli.main(["verify", "copy"]) == 1
    assert FIRST in capsys.readouterr().out


def test_its_copy_is_reverted_to_the_base(old):
    assert cli.main(["revert", "copy", "-o", "back"]) == 0
    assert tree(old / "back") == tree(old / "base")


def test_its_edits_in_place_are_reverted_step_by_step(old):
    assert cli.main(["revert", "chain"]) == 0
    assert stored(old / "chain" / FIRST, down(0), (0, 0)) == bytes(2)
    assert cli.main(["verify", "chain"]) == 0
    assert cli.main(["revert", "chain"]) == 0
    assert tree(old / "chain") == tree(old / "base")


def test_an_edit_in_place_goes_on_top(old):
    before = tree(old / "chain")
    edit = {"op": "zero", "tensor": down(0), "index": [3, 3]}
    write_manifest(old / "more.json", {"path": "chain"}, edit)
    assert cli.main(["apply", "--in-place", "more.json", "--check", "off"]) == 0
    assert stored(old / "chain" / FIRST, down(0), (3, 3)) == bytes(2)
    assert cli.main(["verify", "chain"]) == 0
    assert cli.main(["revert", "chain"]) == 0
    after = tree(old / "chain")
    assert {n: d for n, d in after.items() if n not in OWN} == {n: d for n, d in before.items() if n not in OWN}
    for _ in range(2):
        assert cli.main(["revert", "chain"]) == 0
    assert tree(old / "chain") == tree(old / "base")


def test_its_journal_puts_the_base_back(old):
    assert stored(old / "cut" / FIRST, down(0), (0, 0)) == bytes(2)
    assert cli.main(["revert", "cut"]) == 0  # its journal came with a copy, which the other commands leave alone
    assert tree(old / "cut") == tree(old / "base")


def test_its_own_scan_is_found_and_used(old, capsys):
    assert cli.main(["lookup", "my-base", "--json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    (found,) = model["coordinates"]
    assert (found["layer"], found["row"], found["col"]) == (0, 3, 7)
    write_manifest(old / "m.json", {"path": "scanned", "model": "my-base"}, {"op": "zero", "known": "all"})
    assert cli.main(["apply", "m.json", "-o", "zeroed", "--check", "off"]) == 0
    assert stored(old / "scanned" / "model.safetensors", down(0), (3, 7)) != bytes(2)
    assert stored(old / "zeroed" / "model.safetensors", down(0), (3, 7)) == bytes(2)
