"""Bad edits of structures and whole tensors on the command line: one line, exit 2 (verify: 1), nothing written.

Beside each bad input is a good one that differs in the one thing that is refused.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import HEAD, HIDDEN, INNER, sha256, tensor, tree, write_llama, write_manifest, write_shard

from swsurgery.cli import main

UNDO = "swsurgery-undo.safetensors"
WIDE, SPARSE, FUSED = "model.wide.weight", "model.sparse.weight", "model.layers.1.mlp.gate_up_proj.weight"
CODES = "model.layers.0.self_attn.q_proj.qweight"
SCALES = "model.layers.0.self_attn.q_proj.scales"
GATE, UP = ("model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight")
GPTQ = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}
ROW = {"op": "zero", "layer": 1, "row": 2}


@pytest.fixture
def room(tmp_path, monkeypatch) -> Path:
    """The current directory, with the checkpoints `base`, `quantised` and `unknown`."""
    monkeypatch.chdir(tmp_path)
    matrices = {GATE: tensor("F16", INNER, HIDDEN, seed=7), UP: tensor("F16", INNER, HIDDEN, seed=8)}
    steps = np.full(8, 1.0, "<f4")
    steps[0] = 1e30
    one = np.zeros(8, "<f4")
    one[3] = 1
    more = {WIDE: ("F32", (2, 4), steps.tobytes()), SPARSE: ("F32", (2, 4), one.tobytes())}
    write_llama(tmp_path / "base", extra={**matrices, **more})
    packed = {CODES: tensor("I32", 2, 6), SCALES: tensor("F16", 1, 6)}
    write_llama(tmp_path / "quantised", extra=packed, config=GPTQ)
    write_llama(tmp_path / "unknown", extra={FUSED: tensor("F16", 2 * INNER, HIDDEN)}, config={"model_type": "mystery"})
    return tmp_path


BAD = {
    "a glob that matches nothing": (
        "base",
        [{"op": "zero", "tensors": "model.layers.*.mlp.down_prj.weight"}],
        [{"op": "zero", "tensors": "model.layers.*.mlp.down_proj.weight"}],
        "no tensor matches: model.layers.*.mlp.down_prj.weight (swsurgery inspect lists the tensors)",
    ),
    "a name that is not stored": (
        "base",
        [{"op": "zero", "tensors": "lm_haed.weight"}],
        [{"op": "zero", "tensors": HEAD}],
        "no such tensor: lm_haed.weight (did you mean lm_head.weight?)",
    ),
    "a glob that matches quantised tensors": (
        "quantised",
        [{"op": "round", "tensors": "model.layers.0.*", "bits": 4}],
        [{"op": "round", "tensors": "model.layers.0.mlp.*", "bits": 4}],
        "edit the model before it is quantised",
    ),
    "an index out of range": (
        "base",
        [{"op": "zero", "tensor": HEAD, "slice": "12"}],
        [{"op": "zero", "tensor": HEAD, "slice": "11"}],
        "12 is out of range for an axis of 12",
    ),
    "a range out of range": (
        "base",
        [{"op": "zero", "tensor": HEAD, "slice": ":, 3:7"}],
        [{"op": "zero", "tensor": HEAD, "slice": ":, 3:6"}],
        "7 is out of range for an axis of 6",
    ),
    "a slice of too many axes": (
        "base",
        [{"op": "zero", "tensor": HEAD, "slice": "0, 0, 0"}],
        [{"op": "zero", "tensor": HEAD, "slice": "0, 0"}],
        "the slice has 3 axes",
    ),
    "a slice of nothing": (
        "base",
        [{"op": "zero", "tensor": HEAD, "slice": "3:3"}],
        [{"op": "zero", "tensor": HEAD, "slice": "3:4"}],
        "the slice selects nothing",
    ),
    "a row out of range": (
        "base",
        [{"op": "zero", "layer": 1, "row": HIDDEN}],
        [{"op": "zero", "layer": 1, "row": HIDDEN - 1}],
        "row 6 is out of range 0..5",
    ),
    "an expert of a dense layer": (
        "base",
        [{"op": "zero", "layer": 1, "expert": 0}],
        [{"op": "zero", "layer": 1, "neuron": 0}],
        "layer 1 is dense: it has no expert 0 (leave expert out)",
    ),
    "a neuron of a family with unknown gate": (
        "unknown",
        [{"op": "zero", "layer": 1, "neuron": 0}],
        [{"op": "zero", "tensor": FUSED, "slice": "0"}],
        "the gate of model type mystery is unknown",
    ),
    "a scalar inside a row": (
        "base",
        [ROW, {"op": "scale", "layer": 1, "row": 2, "col": 3, "factor": 2}],
        [ROW, {"op": "scale", "layer": 1, "row": 3, "col": 3, "factor": 2}],
        "has two operations",
    ),
    "a row and a column": (
        "base",
        [ROW, {"op": "zero", "layer": 1, "col": 3}],
        [ROW, {"op": "zero", "layer": 0, "col": 3}],
        "has two operations",
    ),
    "a protected scalar that is also set": (
        "base",
        [{"op": "protect", "layer": 1, "row": 2, "col": 3}, {"op": "zero", "layer": 1, "row": 2, "col": 3}],
        [{"op": "protect", "layer": 1, "row": 2, "col": 3}, ROW],
        "has two operations",
    ),
    "a clip that removes everything": (
        "base",
        [{"op": "clip", "tensors": HEAD, "fraction": 1}],
        [{"op": "clip", "tensors": HEAD, "fraction": 0.5}],
        "edits[0].fraction: should be a number above 0 and below 1, not 1",
    ),
    "a clip whose threshold is zero": (
        "base",
        [{"op": "clip", "tensors": SPARSE, "iqr": 1.5}],
        [{"op": "clip", "tensors": WIDE, "iqr": 1.5}],
        f"the clip removes everything: its threshold is 0: {SPARSE} (choose a higher threshold)",
    ),
    "a bit outside the dtype": (
        "base",
        [{"op": "flip", "layer": 1, "row": 2, "col": 3, "bit": 16}],
        [{"op": "flip", "layer": 1, "row": 2, "col": 3, "bit": 15}],
        "F16 has no bit 16 (give 0 to 15)",
    ),
    "bits of another width": (
        "base",
        [{"op": "set", "layer": 1, "row": 2, "bits": "0x3f800000"}],
        [{"op": "set", "layer": 1, "row": 2, "bits": "0x3c00"}],
        "0x3f800000 has 8 hex digits, but F16 takes 4",
    ),
    "a rounding to nine bits": (
        "base",
        [{"op": "round", "tensors": HEAD, "bits": 9}],
        [{"op": "round", "tensors": HEAD, "bits": 8}],
        "edits[0].bits: should be a whole number from 2 to 8, not 9",
    ),
    "a rounding of integers": (
        "quantised",
        [{"op": "round", "tensors": CODES, "bits": 4}],
        [{"op": "round", "tensors": HEAD, "bits": 4}],
        f"{CODES} cannot be edited: packed or scaling values of a quantised layer",
    ),
    "a scale that overflows": (
        "base",
        [{"op": "scale", "tensors": WIDE, "factor": 1e10}],
        [{"op": "scale", "tensors": WIDE, "factor": 1e8}],
        "overflows F32, whose largest value is",
    ),
    "an operation on regions for one scalar": (
        "base",
        [{"op": "clip", "layer": 1, "row": 2, "col": 3, "z": 3}],
        [{"op": "clip", "layer": 1, "row": 2, "z": 3}],
        "clip",
    ),
    "a restore from a base without the tensor": (
        "base",
        [{"op": "restore", "tensors": WIDE, "from": "unknown"}],
        [{"op": "restore", "tensors": HEAD, "from": "unknown"}],
        WIDE,
    ),
}
"""By name: the checkpoint, the bad edits, good edits, and a part of the message."""


@pytest.mark.parametrize("case", BAD)
def test_a_bad_edit_is_one_line_and_writes_nothing(room, capsys, case):
    base, bad, good, message = BAD[case]
    write_manifest(room / "bad.json", room / base, *bad)
    write_manifest(room / "good.json", room / base, *good)
    before = tree(room)
    for words in (["-o", "out", "--check", "off"], ["--in-place", "--check", "off"]):
        assert main(["apply", "bad.json", *words]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1
        assert message in said.err or "--in-place" in words, said.err
        assert tree(room) == before
    assert main(["apply", "good.json", "-o", "out", "--check", "off"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("size", ["much", "-1", "1e9", ""])
def test_a_limit_that_is_no_size_is_refused(room, capsys, size):
    write_manifest(room / "row.json", room / "base", ROW)
    before = tree(room)
    assert main(["apply", "row.json", "-o", "out", f"--undo-limit={size}"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("swsurgery: not a size") and said.err.count("\n") == 1
    assert tree(room) == before


def test_a_limit_decides_whether_old_bytes_are_stored(room, capsys):
    write_manifest(room / "row.json", room / "base", ROW)
    size = INNER * 2
    for name, limit, stored in (("exact", size, True), ("less", size - 1, False), ("unit", "1k", True)):
        words = ["apply", "row.json", "-o", name, "--check", "off", "--undo-limit", str(limit)]
        assert main(words) == 0
        assert (room / name / UNDO).exists() == stored
    assert main(["revert", "less", "-o", "back"]) == 2
    assert main(["revert", "less", "-o", "back", "--base", "base"]) == 0
    assert tree(room / "back") == tree(room / "base")


def modify(folder: Path) -> None:
    data = bytearray((folder / UNDO).read_bytes())
    data[-1] ^= 1
    (folder / UNDO).write_bytes(data)


UNDO_FILES = {
    "modified": modify,
    "cut": lambda folder: os.truncate(folder / UNDO, 20),
    "missing": lambda folder: (folder / UNDO).unlink(),
    "of another record": lambda folder: shutil.copy(folder.parent / "other" / UNDO, folder / UNDO),
}


@pytest.mark.parametrize("damage", UNDO_FILES)
def test_a_bad_undo_file_fails_verify_and_revert(room, capsys, damage):
    write_manifest(room / "row.json", room / "base", ROW)
    write_manifest(room / "other.json", room / "base", {**ROW, "row": 3})
    for name in ("row", "other"):
        assert main(["apply", f"{name}.json", "-o", name, "--check", "off"]) == 0
    assert main(["verify", "row"]) == 0
    UNDO_FILES[damage](room / "row")
    before = tree(room)
    capsys.readouterr()
    assert main(["verify", "row", "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert UNDO in {finding["file"] for finding in findings}
    assert main(["revert", "row", "-o", "back"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and UNDO in said.err
    assert tree(room) == before


def test_a_process_ends_with_the_same_code_and_one_line(room):
    """One real process; the other tests call `main`."""
    write_manifest(room / "bad.json", room / "base", {"op": "zero", "tensors": "nothing*"})
    before = tree(room)
    words = [sys.executable, "-m", "swsurgery", "apply", "bad.json", "-o", "out", "--check", "off"]
    done = subprocess.run(words, cwd=room, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert tree(room) == before


def forge(folder: Path, change) -> None:
    """Rewrite the undo file with other tensors, and make record and SHA256SUMS fit it."""
    raw = (folder / UNDO).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__")
    data = raw[8 + size :]
    tensors = {
        name: (entry["dtype"], tuple(entry["shape"]), data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }
    write_shard(folder / UNDO, change(tensors))
    record = json.loads((folder / "swsurgery.json").read_text())
    new = {"sha256": sha256(folder / UNDO), "size": (folder / UNDO).stat().st_size}
    sums = (folder / "SHA256SUMS").read_text()
    old = sha256(folder / "swsurgery.json")
    sums = sums.replace(record["undo"]["sha256"], new["sha256"])
    record["undo"] = new
    (folder / "swsurgery.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    (folder / "SHA256SUMS").write_text(sums.replace(old, sha256(folder / "swsurgery.json")))


def renumber(change):
    """Replace the flat indices of the sparse edit by `change(indices)`."""

    def edit(tensors: dict) -> dict:
        dtype, shape, data = tensors["edit.1.0.index"]
        indices = change(np.frombuffer(data, "<i8").copy())
        return {**tensors, "edit.1.0.index": (dtype, (len(indices),), indices.astype("<i8").tobytes())}

    return edit


FORGED = {
    "an index before the tensor": renumber(lambda n: np.r_[-1, n[1:]]),
    "an index behind the tensor": renumber(lambda n: np.r_[n[:-1], 1 << 40]),
    "falling indices": renumber(lambda n: n[::-1]),
    "an index twice": renumber(lambda n: np.r_[n[0], n[0], n[2:]]),
    "fewer indices": renumber(lambda n: n[:-1]),
    "another index": renumber(lambda n: np.r_[n[:-1], n[-1] + 1]),
    "a tensor of another dtype": lambda t: {**t, "edit.0.0.old": ("BF16", *t["edit.0.0.old"][1:])},
    "a tensor of another shape": lambda t: {**t, "edit.0.0.old": ("F16", (INNER, 1), t["edit.0.0.old"][2])},
    "other bytes": lambda t: {**t, "edit.0.0.old": (*t["edit.0.0.old"][:2], bytes(INNER * 2))},
    "a tensor that is missing": lambda t: {k: v for k, v in t.items() if k != "edit.0.0.old"},
}
"""Undo files to which the record was made to fit: (change of the tensors)."""


@pytest.mark.parametrize("forgery", FORGED)
def test_a_forged_undo_file_with_a_fitting_record_proves_nothing(room, capsys, forgery):
    write_manifest(room / "m.json", room / "base", ROW, {"op": "clip", "tensors": HEAD, "z": 1.0})
    assert main(["apply", "m.json", "-o", "out", "--check", "off"]) == 0
    forge(room / "out", dict)
    assert main(["verify", "out"]) == 0, capsys.readouterr().out  # the twin: rewritten without a change
    forge(room / "out", FORGED[forgery])
    before = tree(room)
    capsys.readouterr()
    assert main(["verify", "out"]) == 1
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert main(["revert", "out", "-o", "back"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert tree(room) == before
