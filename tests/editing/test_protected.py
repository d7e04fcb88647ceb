"""What a manifest protects stays protected in every later one: apply refuses to edit it, and verify holds it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from patched import DOWN, MANIFEST, PROTECTED, SECOND, apply_text, contents, flip, place, write_base

import swsurgery
from swsurgery.checkpoint.record import read_record
from swsurgery.cli import main
from swsurgery.editing.check_options import CheckOptions
from swsurgery.editing.revert import revert
from swsurgery.errors import PlanError
from swsurgery.sharing.card import render_body
from swsurgery.storage.folder import Folder

HEAD = "lm_head.weight"
FIRST_STEP = MANIFEST + f"  - {{op: protect, tensor: {HEAD}, index: [0, 0]}}\n"
NEIGHBOUR = f"{{op: zero, tensor: {HEAD}, index: [0, 1]}}"
BROKEN = f"{{op: zero, tensor: {HEAD}, index: [0, 0]}}"
REMEDY = "(revert that step, or start from the first base)"


def step(base: str, *edits: str) -> str:
    return f"version: 1\nbase: {{path: {base}}}\nedits:\n" + "".join(f"  - {edit}\n" for edit in edits)


@pytest.fixture
def once(tmp_path) -> Path:
    write_base(tmp_path / "base")
    return apply_text(tmp_path, FIRST_STEP, "once")


def test_an_edit_of_it_is_refused_with_all_other_faults(once, tmp_path, capsys):
    manifest = tmp_path / "second.yaml"
    scaled = f"{{op: scale, tensor: {DOWN}, index: {list(PROTECTED)}, factor: 2.0}}"
    manifest.write_text(step("once", BROKEN, NEIGHBOUR, scaled, "{op: zero, tensor: nowhere, index: [0]}"))
    before = contents(once)
    for options in (["--dry-run"], ["-o", str(tmp_path / "twice")], ["--in-place"]):
        assert main(["apply", str(manifest), "--check", "off", *options]) == 2
        lines = capsys.readouterr().err.splitlines()
        head, middle, other = (line.removeprefix("swsurgery: ") for line in lines)
        where = "is protected by step 1 of the base's record"
        assert head == f"{manifest}:4:5: edits[0]: {HEAD}[0, 0] {where} {REMEDY}"
        assert middle == f"{manifest}:6:5: edits[2]: {DOWN}{list(PROTECTED)} {where} {REMEDY}"
        assert "no such tensor: nowhere" in other
    assert contents(once) == before and not (tmp_path / "twice").exists()


def test_later_steps_hold_it_and_count_it(once, tmp_path, capsys):
    twice = apply_text(tmp_path, step("once", NEIGHBOUR), "twice")
    thrice = apply_text(tmp_path, step("twice", f"{{op: protect, tensor: {HEAD}, index: [0, 1]}}"), "thrice")
    assert [swsurgery.verify(each).record.protected for each in (once, twice, thrice)] == [2, 2, 3]
    assert main(["verify", str(thrice)]) == 0
    assert "protected 3 scalars with the base's bits" in capsys.readouterr().out
    for edit, number in ((BROKEN, 1), (NEIGHBOUR, 3)):
        (tmp_path / "fourth.yaml").write_text(step("thrice", edit))
        with pytest.raises(PlanError, match=f"is protected by step {number} of "):
            swsurgery.plan(tmp_path / "fourth.yaml")


def test_the_plan_and_the_card_name_what_earlier_steps_protect(once, tmp_path, capsys):
    manifest = tmp_path / "second.yaml"
    for edit, said in ((NEIGHBOUR, "protects 0, and 2 that earlier steps protect"),
                       (f"{{op: protect, tensor: {HEAD}, index: [0, 0]}}",
                        "protects 1, and 1 that earlier steps protect")):  # fmt: skip
        manifest.write_text(step("once", edit))
        assert main(["apply", str(manifest), "--dry-run"]) == 0
        assert said in capsys.readouterr().out
    assert main(["apply", str(tmp_path / "once.yaml"), "--dry-run"]) == 0
    assert "protects 2\n" in capsys.readouterr().out
    twice = read_record(Folder.at(apply_text(tmp_path, manifest.read_text(), "twice")))
    table = render_body(twice.record, "org/name", twice.manifest_raw).split("## Protected")[1].split("##")[0]
    assert table.count(HEAD.replace("_", "\\_")) + table.count(HEAD) == 1 and "0, 4" in table


def test_protecting_it_once_more_counts_it_once(once, tmp_path):
    twice = apply_text(tmp_path, step("once", f"{{op: protect, tensor: {HEAD}, index: [0, 0]}}"), "twice")
    found = swsurgery.verify(twice)
    assert (found.ok, found.record.protected) == (True, 2)


def test_a_neighbour_is_edited_and_the_steps_are_undone_one_by_one(once, tmp_path):
    twice = apply_text(tmp_path, step("once", NEIGHBOUR), "twice")
    assert main(["verify", str(twice), "--manifest", str(tmp_path / "twice.yaml"), "--base", str(once)]) == 0
    revert(twice, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(once)
    revert(tmp_path / "back", tmp_path / "first")
    assert contents(tmp_path / "first") == contents(tmp_path / "base")
    (tmp_path / "free.yaml").write_text(step("first", BROKEN))
    swsurgery.apply(tmp_path / "free.yaml", output=tmp_path / "free", check=CheckOptions("off"))


def test_verify_finds_it_changed(once, tmp_path):
    twice = apply_text(tmp_path, step("once", NEIGHBOUR), "twice")
    flip(twice / SECOND, place(twice / SECOND, HEAD, (0, 0)))
    findings = swsurgery.verify(twice).findings
    assert [(f.tensor, f.index) for f in findings if f.rule == "protected-changed"] == [(HEAD, (0, 0))]


def test_an_edit_in_place_is_held_to_it_too(once, tmp_path, capsys):
    (tmp_path / "second.yaml").write_text(step("once", NEIGHBOUR))
    assert main(["apply", str(tmp_path / "second.yaml"), "--in-place", "--check", "off"]) == 0
    assert swsurgery.verify(once).record.protected == 2
    (tmp_path / "third.yaml").write_text(step("once", BROKEN))
    assert main(["apply", str(tmp_path / "third.yaml"), "--in-place", "--check", "off"]) == 2
    assert "is protected by step 1 of " in capsys.readouterr().err
    assert len(json.loads((once / "swsurgery.json").read_text())["history"]) == 1


def test_a_protected_scalar_of_other_weights_does_not_confuse_verify(tmp_path):
    base = write_base(tmp_path / "base")
    (base / "model.safetensors").write_bytes((base / SECOND).read_bytes())
    both = "{path: base, weights: index, copies: keep}"
    apply_text(tmp_path, FIRST_STEP.replace("{path: base}", both), "once")
    second = step("once", NEIGHBOUR).replace("path: once", "path: once, weights: single, copies: keep")
    found = swsurgery.verify(apply_text(tmp_path, second, "twice"))
    assert (found.ok, found.record.protected) == (True, 0), "its file is held by its digest"
    broken = step("once", BROKEN).replace("path: once", "path: once, weights: single, copies: keep")
    with pytest.raises(PlanError, match="is protected by step 1 of "):
        apply_text(tmp_path, broken, "thrice")
