"""Changed regions are proved from the undo file or by computing them again, and reverted; every tampering is found."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from checkpoints import tree, write_manifest

import swsurgery
from swsurgery.errors import CheckpointError

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parents[1] / "editing"))
from test_regions import EVERYTHING, ONE, TWO, UNDO, apply, check_equal, name, read, write_base  # noqa: E402

EDITS = (*EVERYTHING, {"op": "protect", "tensor": "lm_head.weight", "slice": "11"})


@pytest.fixture
def patched(tmp_path) -> Path:
    write_base(tmp_path / "base")
    apply(tmp_path, *EDITS)
    return tmp_path / "out"


def found(checkpoint: Path, **options) -> set[tuple[str, str]]:
    return {(f.rule, f.file) for f in swsurgery.verify(checkpoint, **options).findings if f.level == "error"}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_record_with_regions_is_proved_without_the_base(patched):
    shutil.rmtree(patched.parent / "base")
    proof = swsurgery.verify(patched)
    assert proof.ok and {ONE, TWO} <= set(proof.record.proved)
    assert proof.record.needs_base == ()


def test_a_record_is_proved_by_computing_it_again_from_the_base(patched):
    assert found(patched, base=patched.parent / "base") == set()


def test_a_byte_that_an_operation_did_not_make_is_found_with_the_base_even_if_the_record_was_made_to_fit(tmp_path):
    write_base(tmp_path / "base")
    apply(tmp_path, {"op": "scale", "tensors": "lm_head.weight", "factor": 2}, undo_limit=0)
    twin = tmp_path / "twin"
    shutil.copytree(tmp_path / "out", twin)
    record = json.loads((twin / "swsurgery.json").read_text())
    record["changes"][0]["options"]["factor"] = 3.0
    (twin / "swsurgery.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    rules = {rule for rule, _ in found(twin, base=tmp_path / "base")}
    assert "undeclared-change" in rules


def test_without_an_undo_file_nothing_is_called_proved(tmp_path):
    write_base(tmp_path / "base")
    apply(tmp_path, *EDITS, undo_limit=0)
    proof = swsurgery.verify(tmp_path / "out")
    assert proof.ok and set(proof.record.needs_base) == {ONE, TWO}
    assert not {ONE, TWO} & set(proof.record.proved)
    assert "the proof needs the base" in proof.checked
    assert found(tmp_path / "out", base=tmp_path / "base") == set()


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_every_changed_byte_of_a_shard_is_found(tmp_path, limit):
    write_base(tmp_path / "base")
    apply(tmp_path, *EDITS, undo_limit=limit)
    size = (tmp_path / "out" / TWO).stat().st_size
    for at in range(size - 300, size, 37):
        flip(tmp_path / "out" / TWO, at)
        assert found(tmp_path / "out") & {("digest", TWO), ("edit-changed", TWO)}
        flip(tmp_path / "out" / TWO, at)
    assert found(tmp_path / "out") == set()


def test_an_undo_file_that_was_modified_is_found(patched):
    flip(patched / UNDO, -1)
    assert ("digest", UNDO) in found(patched)
    with pytest.raises(CheckpointError, match="the undo file was changed, or belongs to another record"):
        swsurgery.revert(patched, patched.parent / "back")
    assert not (patched.parent / "back").exists()


def test_an_undo_file_that_is_missing_is_found(patched):
    (patched / UNDO).unlink()
    assert ("file-missing", UNDO) in found(patched)
    with pytest.raises(CheckpointError, match="the undo file is missing"):
        swsurgery.revert(patched, patched.parent / "back")


def test_an_undo_file_of_another_record_is_found(patched, tmp_path):
    apply(tmp_path, {"op": "zero", "tensors": "lm_head.weight"}, output="other")
    shutil.copy(tmp_path / "other" / UNDO, patched / UNDO)
    assert ("digest", UNDO) in found(patched)
    with pytest.raises(CheckpointError, match="belongs to another record"):
        swsurgery.revert(patched, tmp_path / "back")


def test_a_protected_region_that_was_changed_is_found(patched):
    data = read(patched)
    from safetensors.torch import save_file

    data["lm_head.weight"][11, 0] = 1
    shard = ONE if "lm_head.weight" in json.loads((patched / ONE).read_bytes()[8:3000].split(b"}}")[0] + b"}}") else TWO
    names = [key for key in data if key in _names(patched / shard)]
    save_file({key: data[key] for key in names}, patched / shard, {"format": "pt"})
    assert ("protected-changed", shard) in found(patched)


def _names(path: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as opened:
        return set(opened.keys())


def test_revert_restores_the_base_byte_for_byte(patched):
    swsurgery.revert(patched, patched.parent / "back")
    assert tree(patched.parent / "back") == tree(patched.parent / "base")


def test_revert_without_an_undo_file_needs_the_base(tmp_path):
    write_base(tmp_path / "base")
    apply(tmp_path, *EDITS, undo_limit=0)
    with pytest.raises(CheckpointError, match="exceeded the undo limit"):
        swsurgery.revert(tmp_path / "out", tmp_path / "back")
    swsurgery.revert(tmp_path / "out", tmp_path / "back", base=tmp_path / "base")
    assert tree(tmp_path / "back") == tree(tmp_path / "base")


def test_each_step_of_a_history_has_its_own_undo_file(tmp_path):
    write_base(tmp_path / "base")
    apply(tmp_path, {"op": "zero", "layer": 0, "row": 2}, output="first")
    apply(tmp_path, {"op": "scale", "layer": 1, "col": 1, "factor": 2}, base=tmp_path / "first", output="second")
    assert (tmp_path / "second" / UNDO).read_bytes() == (tmp_path / "first" / UNDO).read_bytes()
    assert (tmp_path / "second" / "swsurgery-undo-2.safetensors").exists()
    assert found(tmp_path / "second") == set()
    swsurgery.revert(tmp_path / "second", tmp_path / "once")
    assert tree(tmp_path / "once") == tree(tmp_path / "first")
    swsurgery.revert(tmp_path / "once", tmp_path / "twice")
    assert tree(tmp_path / "twice") == tree(tmp_path / "base")


def test_a_region_protected_by_an_earlier_step_keeps_its_bits(tmp_path):
    write_base(tmp_path / "base")
    apply(tmp_path, {"op": "protect", "layer": 0, "row": 2}, output="first")
    apply(tmp_path, {"op": "zero", "tensors": name(0, "down")}, base=tmp_path / "first", output="second")
    wanted = read(tmp_path / "base")
    kept = wanted[name(0, "down")][2].clone()
    wanted[name(0, "down")].zero_()
    wanted[name(0, "down")][2] = kept
    check_equal(read(tmp_path / "second"), wanted)
    assert found(tmp_path / "second") == set()
    assert found(tmp_path / "second", base=tmp_path / "first") == set()


def test_the_check_of_the_weights_finds_nothing_wrong(tmp_path):
    base = write_base(tmp_path / "base")
    manifest = write_manifest(tmp_path / "m.json", base, *EDITS)
    report = swsurgery.apply(manifest, output=tmp_path / "out", check="weights").record.check["weights"]
    assert report["shards"] == [ONE, TWO]


def test_the_state_dict_in_memory_has_the_values_of_the_patched_checkpoint(patched):
    manifest = patched.parent / "out.json"
    check_equal(dict(swsurgery.patched_state_dict(manifest)), read(patched))


def test_an_overlay_serves_the_bytes_of_the_patched_files(patched, tmp_path):
    from swsurgery.editing.overlay import overlay_checkpoint

    overlay = overlay_checkpoint(swsurgery.plan(tmp_path / "out.json"))
    for file in (ONE, TWO):
        wanted = (patched / file).read_bytes()
        source = overlay.get_file(file).source
        for size in (len(wanted), 7, 64):
            data = b""
            with source.open() as opened:
                while len(data) < len(wanted):
                    buffer = bytearray(size)
                    count = opened.readinto(memoryview(buffer), len(data))
                    data += buffer[:count]
            assert data == wanted


def test_a_record_is_compared_with_its_manifest_and_with_another_one(patched, tmp_path):
    assert found(patched, manifest=tmp_path / "out.json") == set()
    base = tmp_path / "base"
    other = [*EDITS[:2], {**EDITS[2], "factor": 4}, *EDITS[3:]]
    wrong = write_manifest(tmp_path / "other.json", base, *other)
    assert found(patched, manifest=wrong) == {("manifest-mismatch", None)}
    fewer = write_manifest(tmp_path / "fewer.json", base, *EDITS[:1], *EDITS[3:])
    messages = [f.message for f in swsurgery.verify(patched, manifest=fewer).findings]
    assert any("the manifest does not ask for it" in message for message in messages)
    more = write_manifest(
        tmp_path / "more.json", base, *EDITS, {"op": "zero", "tensor": "lm_head.weight", "slice": "10"}
    )
    assert found(patched, manifest=more) == {("manifest-mismatch", None)}


def test_a_checkpoint_without_a_record_is_compared_with_what_a_manifest_makes_of_the_base(patched, tmp_path):
    for own in ("swsurgery.json", "manifest.yaml", "SHA256SUMS", UNDO):
        (patched / own).unlink()
    assert found(patched, manifest=tmp_path / "out.json") == set()
    flip(patched / TWO, -1)
    assert found(patched, manifest=tmp_path / "out.json") == {("undeclared-change", TWO)}


def test_a_scalar_is_edited_and_reverted_in_place_on_top_of_a_step_with_regions(tmp_path):
    write_base(tmp_path / "base")
    apply(tmp_path, {"op": "zero", "layer": 0, "row": 2}, output="first")
    before = tree(tmp_path / "first")
    manifest = write_manifest(tmp_path / "m.json", tmp_path / "first", {"op": "zero", "layer": 1, "row": 1, "col": 1})
    record = swsurgery.apply(manifest, in_place=True, check="off").record
    assert record.registry_version == 2 and record.changes == [] and record.undo is None
    assert found(tmp_path / "first") == set()
    swsurgery.revert(tmp_path / "first")
    assert tree(tmp_path / "first") == before
