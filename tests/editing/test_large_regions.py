"""A region that is too large for digests of its own is proved by the digests of its file."""

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import swsurgery
from swsurgery.errors import CheckpointError
from swsurgery.rewriting import tally
from swsurgery.verifying import regions


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    torch.manual_seed(0)
    save_file({"a.weight": torch.randn(64, 96), "b.weight": torch.randn(8, 8)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def scale(base, output, **options):
    edits = [
        {"op": "scale", "tensors": "a.weight", "factor": 2.0},
        {"op": "protect", "tensor": "b.weight", "slice": "3"},
    ]
    return swsurgery.apply(edits, base, output, check="weights", **options)


@pytest.mark.parametrize("limit", [1 << 20, 64 * 96 * 4, 64 * 96 * 4 - 1, 0])
def test_only_a_small_region_has_digests(base, tmp_path, monkeypatch, limit):
    monkeypatch.setattr(tally, "DIGESTED_SIZE", limit)
    scale(base, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "swsurgery.json").read_text())
    [change] = record["changes"]
    small = limit >= 64 * 96 * 4
    assert (change["sha256"] is not None, change["base_sha256"] is not None) == (small, small)
    assert record["protected_regions"][0]["sha256"] is not None
    assert swsurgery.verify(tmp_path / "out").ok
    swsurgery.revert(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


@pytest.mark.parametrize("tensor", ["a.weight", "b.weight"])
def test_a_changed_byte_is_found_without_digests(base, tmp_path, monkeypatch, tensor):
    monkeypatch.setattr(tally, "DIGESTED_SIZE", 0)
    scale(base, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors[tensor][3, 5] += 1
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    assert not swsurgery.verify(tmp_path / "out").ok


@pytest.fixture
def count(monkeypatch):
    """Counts the bytes of regions that get a digest of their own, and the bytes of regions that are computed."""
    found = {"hashed": 0, "computed": 0}

    class Counting:
        def __init__(self):
            self.digest = hashlib.sha256()
            self.hexdigest = self.digest.hexdigest

        def update(self, data):
            found["hashed"] += len(data.cast("B"))
            self.digest.update(data)

    class Counted(tally.Tally):
        def observe(self, part, old, new):
            found["computed"] += old.nbytes
            super().observe(part, old, new)

    monkeypatch.setattr(tally, "hashlib", SimpleNamespace(sha256=Counting))
    monkeypatch.setattr(regions, "Tally", Counted)
    return found


LARGE, ROW = 64 * 96 * 4, 8 * 4
"""Sizes in bytes of the scaled tensor and of the protected row."""


@pytest.mark.parametrize(
    ("limit", "options", "hashed", "computed"),
    [
        (LARGE, {}, 2 * LARGE + ROW, LARGE + ROW),
        (LARGE - 1, {}, ROW, LARGE + ROW),
        (LARGE, {"undo_limit": 0}, LARGE + ROW, LARGE + ROW),
        (LARGE - 1, {"undo_limit": 0}, ROW, ROW),
    ],
    ids=["digests", "no digests", "digests without undo file", "neither"],
)
def test_verify_hashes_and_computes_only_regions_that_something_is_compared_with(
    base, tmp_path, monkeypatch, count, limit, options, hashed, computed
):
    monkeypatch.setattr(tally, "DIGESTED_SIZE", limit)
    scale(base, tmp_path / "out", **options)
    count.update(hashed=0, computed=0)
    assert swsurgery.verify(tmp_path / "out").ok
    assert count == {"hashed": hashed, "computed": computed}


def test_a_changed_byte_of_a_region_that_is_not_computed_is_found(base, tmp_path, monkeypatch):
    monkeypatch.setattr(tally, "DIGESTED_SIZE", 0)
    scale(base, tmp_path / "out", undo_limit=0)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["a.weight"][3, 5] += 1
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    assert [f.rule for f in swsurgery.verify(tmp_path / "out").findings] == ["digest"]


def test_a_protected_region_cannot_lose_its_digest(base, tmp_path):
    scale(base, tmp_path / "out")
    path = tmp_path / "out" / "swsurgery.json"
    record = json.loads(path.read_text())
    record["protected_regions"][0]["sha256"] = None
    path.write_text(json.dumps(record))
    assert any(finding.rule == "protected-changed" for finding in swsurgery.verify(tmp_path / "out").findings)


@pytest.mark.parametrize("limit", [1 << 20, 0], ids=["digests", "no digests"])
@pytest.mark.parametrize("op", ["scale", "restore"])
def test_an_edit_in_place_is_recognised_and_reverted(base, tmp_path, monkeypatch, limit, op):
    monkeypatch.setattr(tally, "DIGESTED_SIZE", limit)
    pinned = hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
    edit = {"op": op, "tensors": "a.weight", **({"factor": 2.0} if op == "scale" else {"from": str(scale_all(base))})}
    manifest = {"version": 1, "base": {"path": str(base), "sha256": {"model.safetensors": pinned}}, "edits": [edit]}
    assert swsurgery.apply(manifest, in_place=True, check="off").written
    assert not swsurgery.apply(manifest, in_place=True, check="off").written
    swsurgery.revert(base)
    assert hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest() == pinned


def scale_all(base):
    output = base.parent / "other"
    swsurgery.apply([{"op": "scale", "tensors": "a.weight", "factor": 3.0}], base, output, check="off")
    return output


def test_an_export_needs_no_digests(base, tmp_path, monkeypatch):
    monkeypatch.setattr(tally, "DIGESTED_SIZE", 0)
    scale(base, tmp_path / "out")
    swsurgery.export(tmp_path / "out", tmp_path / "edit.safetensors", format="sparse")
    swsurgery.apply(tmp_path / "edit.safetensors", base, tmp_path / "again", check="off")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_an_export_of_a_changed_file_is_refused_without_digests(base, tmp_path, monkeypatch):
    monkeypatch.setattr(tally, "DIGESTED_SIZE", 0)
    scale(base, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["a.weight"][3, 5] += 1
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    with pytest.raises(CheckpointError, match="the file differs from its record"):
        swsurgery.export(tmp_path / "out", tmp_path / "edit.safetensors", format="sparse")
