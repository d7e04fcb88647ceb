"""The sparse form of edits of rows, columns, neurons, slices, whole tensors and bits.

`apply` must make the same shards of the patch as of the manifest. The oracle for the positions compares the shards of
the base and of the patched checkpoint byte by byte, with numpy alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import FIRST, HEAD, HIDDEN, INNER, SECOND, SIZES, THIRD, down, place, tree, write_llama, write_manifest
from safetensors import safe_open

import swsurgery
from swsurgery.cli import main
from swsurgery.errors import PlanError
from swsurgery.manifest import patch as patch_module
from swsurgery.sharing import export

SHARDS = (FIRST, SECOND, THIRD)
UP, GATE = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"
OWN = {"swsurgery.json", "manifest.yaml", "SHA256SUMS", "swsurgery-undo.safetensors"}
EDITS = {
    "row": ({"op": "zero", "layer": 1, "row": 2},),
    "column": ({"op": "scale", "layer": 0, "col": 3, "factor": 1.75},),
    "neuron": ({"op": "zero", "layer": 0, "neuron": 4},),
    "slice": ({"op": "set", "tensor": HEAD, "slice": "2:4, 1:", "value": -0.5},),
    "tensor": ({"op": "round", "tensors": down(2), "bits": 3, "per": "channel"},),
    "glob": ({"op": "clip", "tensors": "model.layers.*down*", "fraction": 0.1},),
    "outliers": ({"op": "prune_outliers", "tensors": "model.layers.*down*", "count": 5},),
    "flip": ({"op": "flip", "tensor": down(1), "index": [2, 3], "bit": [0, 15]},),
    "flip to infinity": ({"op": "flip", "tensor": HEAD, "index": [3, 3], "bit": 14},),
    "scalar and row": (
        {"op": "zero", "layer": 2, "row": 0}, {"op": "scale", "tensor": down(2), "index": [1, 1], "factor": 2},
    ),
    "row with a protected scalar": (
        {"op": "zero", "layer": 1, "row": 2}, {"op": "protect", "tensor": down(1), "index": [2, 7]},
    ),
    "row with a protected region": ({"op": "zero", "layer": 1, "row": 2}, {"op": "protect", "layer": 1, "col": 1}),
}  # fmt: skip


@pytest.fixture
def base(tmp_path) -> Path:
    rng = np.random.default_rng(11)
    more = {
        name: ("BF16", (INNER, HIDDEN), rng.integers(0x3F00, 0x3F80, (INNER, HIDDEN)).astype("<u2").tobytes())
        for name in (UP, GATE)
    }
    return write_llama(tmp_path / "base", extra=more)


def differing(base: Path, patched: Path, name: str) -> dict[int, tuple[bytes, bytes]]:
    """Flat position -> (old, new) of every scalar of a tensor that differs, from the bytes of the shards."""
    for shard in SHARDS:
        with safe_open(base / shard, "np") as file:
            if name not in file.keys():  # noqa: SIM118
                continue
            part = file.get_slice(name)
            shape, size = part.get_shape(), SIZES[part.get_dtype()]
        start, _ = place(base / shard, name, (0,) * len(shape))
        count = int(np.prod(shape))
        old, new = ((p / shard).read_bytes()[start : start + count * size] for p in (base, patched))
        chunks = ((n, old[n * size : n * size + size], new[n * size : n * size + size]) for n in range(count))
        return {n: (a, b) for n, a, b in chunks if a != b}
    raise AssertionError(name)


def names(base: Path) -> list[str]:
    return [row["tensor"] for row in swsurgery.inspect(base).to_rows()]


def changed(base: Path, patched: Path) -> dict[tuple[str, int], tuple[bytes, bytes]]:
    return {(name, n): pair for name in names(base) for n, pair in differing(base, patched, name).items()}


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(folder).items() if name not in OWN}


def make(base: Path, *edits: dict, name: str = "out", **options) -> Path:
    manifest = write_manifest(base.parent / f"{name}.json", base, *edits)
    swsurgery.apply(manifest, output=base.parent / name, check="off", **options)
    return base.parent / name


def read(path: Path) -> patch_module.Patch:
    return patch_module.parse(path.read_bytes(), path)


@pytest.mark.parametrize("edits", EDITS.values(), ids=EDITS)
def test_a_patch_has_the_differing_scalars_and_makes_the_same_shards(base, edits):
    folder, out = base.parent, make(base, *edits)
    for name, source in (("a", folder / "out.json"), ("b", out)):
        export.export(source, folder / f"{name}.safetensors", format="sparse")
    assert (folder / "a.safetensors").read_bytes() == (folder / "b.safetensors").read_bytes()
    scalars = read(folder / "a.safetensors").scalars
    assert {(s.tensor, s.flat): (s.old, s.new) for s in scalars} == changed(base, out) != {}
    swsurgery.apply(folder / "a.safetensors", base=str(base), output=folder / "again", check="off")
    assert weights(folder / "again") == weights(out) != weights(base)
    assert swsurgery.verify(folder / "again").ok
    swsurgery.revert(folder / "again", folder / "back")
    assert weights(folder / "back") == weights(base)


def test_a_region_that_does_not_change_is_nothing_to_export(base):
    make(base, EDITS["row"][0], name="zeroed")
    manifest = write_manifest(base.parent / "again.json", base.parent / "zeroed", EDITS["row"][0])
    with pytest.raises(PlanError, match="nothing is changed"):
        export.export(manifest, base.parent / "p.safetensors", format="sparse")


def test_a_restore_becomes_the_restored_values(base):
    out = make(base, EDITS["row"][0], name="zeroed")
    for target in ({"layer": 1, "row": 2}, {"tensor": down(1), "index": [2, 3]}):
        manifest = write_manifest(base.parent / "r.json", out, {"op": "restore", **target, "from": str(base)})
        patch = base.parent / f"{len(target)}{'row' in target}.safetensors"
        export.export(manifest, patch, format="sparse")
        restored = {(s.tensor, s.flat): s.new for s in read(patch).scalars}
        oracle = {key: old for key, (old, _) in changed(base, out).items()}
        if "index" in target:
            oracle = {(down(1), 23): oracle[down(1), 23]}
        assert restored == oracle
        assert {s.op for s in read(patch).scalars} == {"set"}


def test_a_flip_is_a_flip_and_a_patch_without_one_has_version_1(base):
    for edits, op, version in ((EDITS["flip"], "flip", "2"), (EDITS["row"], "zero", "1"), (EDITS["slice"], "set", "1")):
        path = base.parent / f"{op}.safetensors"
        export.export(make(base, *edits, name=op), path, format="sparse")
        assert {s.op for s in read(path).scalars} == {op}
        with safe_open(path, "np") as file:
            assert file.metadata()["format_version"] == version
    manifest = json.loads(patch_module.render_manifest((base.parent / "flip.safetensors").read_bytes(), base))
    assert manifest["edits"][0]["bit"] == [0, 15]


def test_several_steps_are_one_patch_of_the_first_base(base):
    folder = base.parent
    make(base, *EDITS["row"], EDITS["flip to infinity"][0], name="one")
    make(
        folder / "one",
        EDITS["glob"][0] | {"tensors": "model.layers.[02].*"},
        EDITS["column"][0] | {"layer": 1, "factor": 3},
        name="two",
    )
    make(
        folder / "two",
        {"op": "zero", "tensor": HEAD, "index": [0, 3]},
        EDITS["slice"][0] | {"value": 0.25},
        name="three",
    )
    export.export(folder / "three", folder / "p.safetensors", format="sparse")
    scalars = read(folder / "p.safetensors").scalars
    assert {(s.tensor, s.flat): (s.old, s.new) for s in scalars} == changed(base, folder / "three")
    swsurgery.apply(folder / "p.safetensors", base=str(base), output=folder / "again", check="off")
    assert weights(folder / "again") == {k: v for k, v in weights(folder / "three").items() if "undo" not in k}


def test_a_row_wider_than_version_1_allows(tmp_path):
    shape = (3, 9000)
    data = np.random.default_rng(3).normal(1, 0.1, shape).astype("<f4")
    base = write_llama(tmp_path / "base", extra={"model.extra.weight": ("F32", shape, data.tobytes())})
    out = make(base, {"op": "scale", "tensor": "model.extra.weight", "slice": "1", "factor": 0.5})
    export.export(out, tmp_path / "p.safetensors", format="sparse")
    with safe_open(tmp_path / "p.safetensors", "np") as file:
        assert file.metadata()["format_version"] == "2"
        assert np.array_equal(file.get_tensor("0.indices"), np.arange(9000) + 9000)
        assert np.array_equal(file.get_tensor("0.old"), data[1])
        assert np.array_equal(file.get_tensor("0.new"), data[1] * np.float32(0.5))
    swsurgery.apply(tmp_path / "p.safetensors", base=str(base), output=tmp_path / "again", check="off")
    assert weights(tmp_path / "again") == weights(out)


def refused(capsys, *words: object) -> str:
    capsys.readouterr()
    assert main(["export", *map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("form", ["sparse", "peft", "vllm"])
def test_too_many_scalars_are_one_line_from_a_manifest_and_from_a_checkpoint(tmp_path, capsys, form):
    shape = (33, 1000)
    base = write_llama(tmp_path / "base", extra={"model.extra.weight": ("F32", shape, np.ones(shape, "<f4").tobytes())})
    out = make(base, {"op": "zero", "tensors": "model.extra.weight"})
    for source in (tmp_path / "out.json", out):
        error = refused(capsys, source, "-o", tmp_path / "p", "--format", form)
        assert "more than 32768 scalars" in error and "publish the patched checkpoint" in error
        assert not (tmp_path / "p").exists()
    fits = make(base, {"op": "zero", "tensor": "model.extra.weight", "slice": ":32"}, name="fits")
    export.export(fits, tmp_path / "p.safetensors", format="sparse")
    assert len(read(tmp_path / "p.safetensors").scalars) == 32_000


def test_without_the_old_bytes_the_manifest_is_exported_instead(base, capsys):
    out = make(base, *EDITS["row"], undo_limit=0)
    error = refused(capsys, out, "-o", base.parent / "p", "--format", "sparse")
    assert "exceeded the undo limit" in error and "export its manifest.yaml with --base" in error
    export.export(out / "manifest.yaml", base.parent / "p", format="sparse", base=str(base))
    assert {(s.tensor, s.flat): (s.old, s.new) for s in read(base.parent / "p").scalars} == changed(base, out)


def test_a_region_that_differs_from_its_record_and_a_bad_undo_file_are_refused(base, capsys):
    out, patch = make(base, *EDITS["row"]), base.parent / "p"
    undo = out / "swsurgery-undo.safetensors"
    good = undo.read_bytes()
    undo.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert "undo file was changed" in refused(capsys, out, "-o", patch, "--format", "sparse")
    undo.unlink()
    assert "undo file is missing" in refused(capsys, out, "-o", patch, "--format", "sparse")
    undo.write_bytes(good)
    offset, _ = place(out / SECOND, down(1), (2, 4))
    raw = bytearray((out / SECOND).read_bytes())
    raw[offset] ^= 1
    (out / SECOND).write_bytes(raw)
    assert "differs from its record" in refused(capsys, out, "-o", patch, "--format", "sparse")
    assert not patch.exists()


def test_vllm_gets_the_new_values_of_a_row(base):
    out = make(base, *EDITS["row"])
    export.export(out, base.parent / "vllm", format="vllm")
    [entry] = json.loads((base.parent / "vllm" / "patches.json").read_text())["patches"]
    assert (entry["name"], entry["shape"], entry["dtype"]) == (down(1), [HIDDEN, INNER], "float16")
    with safe_open(base.parent / "vllm" / "patches.safetensors", "np") as file:
        assert file.get_tensor(entry["indices"]).tolist() == list(range(2 * INNER, 3 * INNER))
        assert file.get_tensor(entry["values"]).tolist() == [0.0] * INNER
