"""verify --protected for rows, columns, neurons, slices and tensors: each scalar is compared with the base's.

The oracle compares arrays with numpy and ml_dtypes.
"""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import down, tensor, write_manifest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_protected_values import make, manifest, random

import swsurgery
from swsurgery.cli import main
from swsurgery.storage.dtypes import DTYPES
from swsurgery.storage.shard import TensorInfo
from swsurgery.verifying.guarded_regions import _find_kept

TARGETS = {
    "row": ({"layer": 1, "row": 2}, lambda a: a[1][2]),
    "column": ({"layer": 2, "col": 3}, lambda a: a[2][:, 3]),
    "slice": ({"tensor": down(0), "slice": "1:3, 4:"}, lambda a: a[0][1:3, 4:]),
    "tensor": ({"tensors": down(1)}, lambda a: a[1]),
}


@pytest.fixture
def room(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make(Path("base"), random())
    return tmp_path


def verify(capsys, *more: str, checkpoint: str = "merged") -> tuple[int, dict]:
    capsys.readouterr()
    code = main(["verify", checkpoint, "--protected", "protect.json", "--base", "base", *more, "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", TARGETS)
def test_a_region_that_was_kept_while_everything_else_changed(room, capsys, name):
    target, part = TARGETS[name]
    manifest(Path(), {"op": "protect", **target})
    values, other = random(), random(1)
    part(other)[...] = part(values)
    make(Path("merged"), other)
    code, document = verify(capsys)
    [region] = document["protected_values"]["regions"]
    size = part(values).size
    assert code == 0 and (region["scalars"], region["kept"], region["lost"]) == (size, size, 0)
    assert main(["verify", "merged", "--protected", "protect.json", "--base", "base"]) == 0
    assert f"kept      {size} of {size} scalars that protect.json protects" in capsys.readouterr().out


@pytest.mark.parametrize("name", TARGETS)
def test_lost_scalars_are_counted_and_the_first_ones_named(room, capsys, name):
    target, part = TARGETS[name]
    manifest(Path(), {"op": "protect", **target})
    values = random()
    lost = part(values)
    lost += np.float32(1)
    make(Path("merged"), values)
    code, document = verify(capsys)
    [region] = document["protected_values"]["regions"]
    assert code == 1 and region["lost"] == lost.size
    found = [f for f in document["findings"] if f["rule"] == "protected-lost"]
    assert len(found) == min(lost.size, 10) + (lost.size > 10)
    if lost.size > 10:
        assert f"and {lost.size - 10} more lost scalars of {region['target']}" in found[-1]["message"]
    oracle, base = {n: a for n, a in values.items()}, random()
    layer = next(n for n in range(3) if down(n) == region["tensor"])
    for each in found[:10]:
        index = tuple(each["index"])
        assert oracle[layer][index] != base[layer][index] and "(base) -> " in each["message"]


def test_one_lost_scalar_is_named_at_its_edit(room, capsys):
    manifest(Path(), {"op": "protect", "layer": 0, "row": 1}, {"op": "protect", "layer": 2, "col": 3})
    values = random()
    values[2][4, 3] *= np.float32(1.5)
    make(Path("merged"), values)
    report = swsurgery.verify("merged", protected="protect.json", base="base")
    [finding] = report.findings
    assert (finding.rule, finding.tensor, finding.index) == ("protected-lost", down(2), (4, 3))
    assert "x1.5" in finding.message
    assert (finding.line, finding.column) == swsurgery.load_manifest("protect.json").positions["edits", 1]


@pytest.mark.parametrize(("tolerance", "code"), [("0.06", 1), ("0.07", 0)])
def test_a_tolerance_is_relative(room, capsys, tolerance, code):
    manifest(Path(), {"op": "protect", "layer": 1, "row": 2})
    values = random()
    values[1][2] *= np.float32(1.0625)
    make(Path("merged"), values)
    assert verify(capsys, "--tolerance", tolerance)[0] == code


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3"])
def test_rounding_to_another_dtype_keeps_values(room, capsys, dtype):
    manifest(Path(), {"op": "protect", "layer": 1, "row": 2}, {"op": "protect", "tensors": down(2)})
    make(Path("merged"), random(), dtype)
    code, document = verify(capsys)
    assert code == 0 and [r["lost"] for r in document["protected_values"]["regions"]] == [0, 0]
    values = random()
    values[1][2, 5] *= np.float32(1.25)
    make(Path("other"), values, dtype)
    code, document = verify(capsys, checkpoint="other")
    assert code == 1 and [r["lost"] for r in document["protected_values"]["regions"]] == [1, 0]


def test_what_the_checkpoint_does_not_have_is_unreadable(room, capsys):
    manifest(Path(), {"op": "protect", "layer": 1, "row": 2}, {"op": "protect", "tensors": "*down_proj.weight"})
    make(Path("merged"), {0: random()[0]})
    code, document = verify(capsys)
    rules = [f["rule"] for f in document["findings"] if f["rule"].startswith("protected")]
    assert code == 1 and set(rules) == {"protected-unreadable"}
    states = [(r["tensor"], r["kept"], bool(r["message"])) for r in document["protected_values"]["regions"]]
    assert states == [(down(0), 60, False), (down(1), 0, True), (down(2), 0, True)]


def test_integers_are_unreadable_and_another_shape_too(room, capsys):
    manifest(Path(), {"op": "protect", "tensors": down(1)})
    make(Path("merged"), {0: random()[0], 2: random()[2]}, extra={down(1): tensor("I32", 6, 10)})
    code, document = verify(capsys)
    [region] = document["protected_values"]["regions"]
    assert code == 1 and "is stored as I32, not as F32" in region["message"]
    make(Path("wide"), random() | {1: np.ones((6, 11), "<f4")})
    code, document = verify(capsys, checkpoint="wide")
    [region] = document["protected_values"]["regions"]
    assert code == 1 and region["message"]


def test_a_checkpoint_with_a_record_of_version_2(room, capsys):
    """The record's own protection is proved by verify, and --protected compares with the base."""
    edits = ({"op": "protect", "layer": 1, "row": 2}, {"op": "round", "tensors": "*down_proj.weight", "bits": 2})
    swsurgery.apply(write_manifest(room / "m.json", room / "base", *edits), output=room / "merged", check="off")
    manifest(Path(), edits[0])
    code, document = verify(capsys)
    assert code == 0 and document["protected_values"]["regions"][0]["kept"] == 10
    manifest(Path(), {"op": "protect", "layer": 1, "row": 3})
    code, document = verify(capsys)
    assert code == 1 and document["protected_values"]["regions"][0]["lost"] > 0


def test_without_a_base_a_region_is_one_line(room, capsys):
    manifest(Path(), {"op": "protect", "layer": 1, "row": 2})
    assert main(["verify", "base", "--protected", "protect.json"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "L1 row 2 are not known (give --base)" in captured.err


FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn}


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.floats(width=32), min_size=1, max_size=20),
    shift=st.sampled_from([0.0, 0.001, 0.1, 1.0]),
    pair=st.tuples(st.sampled_from([*FLOATS]), st.sampled_from([*FLOATS])),
    tolerance=st.sampled_from([0.0, 0.01, 0.5]),
)
def test_kept_means_equal_after_rounding_or_near(values, shift, pair, tolerance):
    with np.errstate(all="ignore"):
        old = np.array(values, np.float64).astype(FLOATS[pair[1]])
        new = (old.astype(np.float64) * (1 + shift)).astype(FLOATS[pair[0]])
        words = [a.view(f"<u{a.dtype.itemsize}") for a in (new, old)]
        infos = [TensorInfo("t", DTYPES[name], (len(values),), (0, 0)) for name in pair]
        found = _find_kept(infos[0], words[0], infos[1], words[1], tolerance)
        for n, (a, b) in enumerate(zip(new, old, strict=True)):
            one, two = float(a), float(b)
            same = pair[0] == pair[1] and words[0][n] == words[1][n]
            near = np.isfinite(two) and tolerance > 0 and abs(one - two) <= tolerance * abs(two)
            exact = one == two
            if np.isfinite(one) and np.isfinite(two) and pair[0] != pair[1]:
                forth, back = float(b.astype(FLOATS[pair[0]])), float(a.astype(FLOATS[pair[1]]))
                exact = exact or one == forth or two == back
            assert bool(found[n]) == bool(same or near or exact), (one, two)
