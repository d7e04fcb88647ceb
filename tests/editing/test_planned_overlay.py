"""A virtual checkpoint has the bytes of the one that apply writes, and undoing gives those of the base."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402
from tiny_checkpoint import DOWN, TEXT, load, write_pair  # noqa: E402

import swsurgery  # noqa: E402
from swsurgery.checkpoint.opening import open_checkpoint  # noqa: E402
from swsurgery.checkpoint.record import find_record  # noqa: E402
from swsurgery.editing.check_options import CheckOptions  # noqa: E402
from swsurgery.editing.overlay import overlay_checkpoint  # noqa: E402
from swsurgery.editing.overlay_undone import overlay_undone  # noqa: E402
from swsurgery.editing.plan import make_plan  # noqa: E402
from swsurgery.errors import CheckpointError, SwsurgeryError  # noqa: E402
from swsurgery.manifest.load import load_manifest  # noqa: E402
from swsurgery.storage.files import File, LocalFile, read_exactly  # noqa: E402

SHARD = "model.safetensors"
EDITS = [
    {"op": "zero", "tensor": "model.layers.0.mlp.gate_proj.weight", "slice": "3"},
    {"op": "scale", "layer": 0, "col": 5, "factor": 2.0},
    {"op": "round", "tensors": "model.layers.1.self_attn.*", "bits": 4, "block": [4, 8]},
    {"op": "round", "tensors": DOWN, "bits": 3, "clip": {"z": 2}},
    {"op": "clip", "tensors": "model.layers.1.mlp.up_proj.weight", "fraction": 0.1},
    {"op": "protect", "tensor": DOWN, "index": [3, 7]},
    {"op": "scale", "tensor": "model.embed_tokens.weight", "index": [1, 2], "factor": 3.0},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("pair"), dtype=torch.bfloat16).base


def write_manifest(folder: Path, base: Path, edits: list[dict[str, object]]) -> Path:
    path = folder / "edits.yaml"
    path.write_text(json.dumps({"version": 1, "base": {"path": str(base)}, "edits": edits}))
    return path


def assert_same_bytes(file: File, expected: Path) -> None:
    """As a whole, and in pieces that begin and end anywhere."""
    data = expected.read_bytes()
    assert file.size == len(data)
    with file.open() as opened:
        assert read_exactly(opened, len(data), 0) == data
        numbers = random.Random(0)
        for _ in range(200):
            begin = numbers.randrange(len(data))
            size = min(numbers.choice((1, 2, 5, 64, 900)), len(data) - begin)
            assert read_exactly(opened, size, begin) == data[begin : begin + size]


def test_an_overlay_has_the_bytes_that_apply_writes_and_undoes(tmp_path: Path, base: Path) -> None:
    manifest = write_manifest(tmp_path, base, EDITS)
    swsurgery.apply(manifest, output=tmp_path / "patched", check="off")
    overlay = overlay_checkpoint(make_plan(load_manifest(manifest), open_checkpoint(base)))
    assert_same_bytes(overlay.shards[SHARD].file, tmp_path / "patched" / SHARD)
    patched = open_checkpoint(tmp_path / "patched")
    record = find_record(patched).record
    assert_same_bytes(overlay_undone(patched, record).shards[SHARD].file, base / SHARD)
    assert isinstance(patched.shards[SHARD].file, LocalFile)


def test_a_manifest_without_changes_gives_the_base(tmp_path: Path, base: Path) -> None:
    manifest = write_manifest(tmp_path, base, [{"op": "protect", "layer": 0, "row": 3}])
    overlay = overlay_checkpoint(make_plan(load_manifest(manifest), open_checkpoint(base)))
    assert_same_bytes(overlay.shards[SHARD].file, base / SHARD)


@pytest.mark.parametrize("placement", ["whole", "streamed"])
def test_the_check_compares_with_the_base(tmp_path: Path, base: Path, placement: str) -> None:
    manifest = write_manifest(tmp_path, base, EDITS)
    options = CheckOptions("forward", placement=placement, text=TEXT, window=24, device="cpu")
    applied = swsurgery.apply(manifest, output=tmp_path / "patched", check=options)
    report = swsurgery.check(tmp_path / "patched", text=TEXT, window=24, device="cpu", placement=placement)
    alone = swsurgery.check(base, text=TEXT, window=24, device="cpu", placement=placement)
    assert report.base.perplexity == pytest.approx(alone.patched.perplexity, rel=1e-4)
    assert report.perplexity_ratio != pytest.approx(1, abs=1e-3)
    in_record = applied.to_json()["check"]
    assert in_record["perplexity_ratio"] == pytest.approx(report.perplexity_ratio, rel=1e-5)
    assert in_record["kl"] == pytest.approx(report.kl, rel=1e-4)
    tokens = torch.tensor([[1, 5, 9, 3]])
    with torch.no_grad():
        assert not torch.equal(load(base)(tokens).logits, load(tmp_path / "patched")(tokens).logits)


def test_the_check_needs_the_base_if_old_bytes_were_too_many(tmp_path: Path, base: Path) -> None:
    manifest = write_manifest(tmp_path, base, EDITS)
    swsurgery.apply(manifest, output=tmp_path / "patched", check="off", undo_limit=0)
    options = {"text": TEXT, "window": 24, "device": "cpu"}
    with pytest.raises(CheckpointError, match="the old bytes were not stored: .*give the base: --base"):
        swsurgery.check(tmp_path / "patched", **options)
    report = swsurgery.check(tmp_path / "patched", base=base, **options)
    assert report.base.perplexity == pytest.approx(swsurgery.check(base, **options).patched.perplexity, rel=1e-4)
    assert swsurgery.check(tmp_path / "patched", base=tmp_path / "patched", **options).perplexity_ratio == 1


@pytest.mark.parametrize("how", ["modified", "missing"])
def test_a_damaged_undo_file(tmp_path: Path, base: Path, how: str) -> None:
    swsurgery.apply(write_manifest(tmp_path, base, EDITS), output=tmp_path / "patched", check="off")
    undo = tmp_path / "patched" / "swsurgery-undo.safetensors"
    if how == "modified":
        data = bytearray(undo.read_bytes())
        data[-1] ^= 1
        undo.write_bytes(data)
    else:
        undo.unlink()
    with pytest.raises(SwsurgeryError, match=f"{'was modified' if how == 'modified' else 'missing'}"):
        swsurgery.check(tmp_path / "patched", text=TEXT, window=24, device="cpu")


def test_a_change_outside_the_regions_fails_the_check(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from swsurgery.rewriting.segments import Segment

    plain = Segment.compute

    def compute(self: Segment, old: bytearray, new: bytearray):
        yield from plain(self, old, new)
        new[-1] ^= 1

    monkeypatch.setattr(Segment, "compute", compute)
    column = [{"op": "scale", "layer": 0, "col": 5, "factor": 2.0}]
    with pytest.raises(SwsurgeryError, match="bytes that no edit names differ from the base's"):
        swsurgery.apply(write_manifest(tmp_path, base, column), output=tmp_path / "patched", check="weights")
    assert not (tmp_path / "patched").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_model_in_memory_has_the_weights_of_the_patched_checkpoint(tmp_path: Path, base: Path, dtype: str) -> None:
    manifest = write_manifest(tmp_path, base, EDITS)
    swsurgery.apply(manifest, output=tmp_path / "patched", check="off")
    expected = load(tmp_path / "patched").to(getattr(torch, dtype)).state_dict()
    found = swsurgery.load_patched(manifest, dtype=getattr(torch, dtype)).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    stored = dict(swsurgery.patched_state_dict(manifest))
    assert all(torch.equal(stored[key], load_file(tmp_path / "patched" / SHARD)[key]) for key in stored)
