"""Edits of regions in tables and in a terminal: one line for each edit, however many scalars it changes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import FIRST, HEAD, INNER, SECOND, down, write_llama, write_manifest, write_shard

import swsurgery
from swsurgery.cli import main

COLUMNS = ["op", "tensor", "index", "dtype", "old", "new", "file", "offset"]
ROW = {"op": "zero", "layer": 1, "row": 2}
SCALAR = {"op": "scale", "tensor": down(0), "index": [0, 1], "factor": 2.0}
PROTECT = {"op": "protect", "layer": 0, "col": 3}
UNDO = "swsurgery-undo.safetensors"


@pytest.fixture
def base(tmp_path) -> Path:
    return write_llama(tmp_path / "base")


def apply(base: Path, *edits: dict, name: str = "out", **options) -> swsurgery.Applied:
    manifest = write_manifest(base.parent / f"{name}.json", base, *edits)
    return swsurgery.apply(manifest, output=base.parent / name, check="off", **options)


def test_the_rows_of_a_record_name_scalars_and_regions(base):
    applied = apply(base, ROW, SCALAR, PROTECT)
    rows = applied.to_rows()
    assert rows == applied.record.to_rows()
    assert all(list(row) == [*COLUMNS, "bounds", "scalars", "changed"] for row in rows)
    assert [(r["op"], r["tensor"], r["index"], r["bounds"], r["scalars"], r["changed"]) for r in rows] == [
        ("scale", down(0), [0, 1], None, None, None),
        ("zero", down(1), None, [[2, 3], [0, INNER]], INNER, INNER),
        ("protect", down(0), None, [[0, 6], [3, 4]], 6, None),
    ]
    planned = swsurgery.plan(base.parent / "out.json").to_rows()
    assert [r | {"changed": None} for r in rows] == planned


DATA = {
    "scale": {"op": "scale", "layer": 0, "row": 1, "factor": 1e300},
    "clip": {"op": "clip", "tensors": HEAD, "fraction": 0.5},
    "round": {"op": "round", "tensors": HEAD, "bits": 4},
    "prune_outliers": {"op": "prune_outliers", "tensors": HEAD, "fraction": 0.5},
}
UNCOMPUTED = "not computed in a dry run: {} (apply refuses results that overflow, and a clip that removes everything)"


@pytest.mark.parametrize(
    ("edits", "ops"),
    [
        *[([edit], op) for op, edit in DATA.items()],
        ([DATA["round"], ROW, DATA["scale"]], "scale, round"),
        ([ROW, SCALAR, PROTECT, {"op": "set", "layer": 0, "row": 1, "value": 2.0}], None),
    ],
)
def test_a_dry_run_names_the_operations_whose_result_depends_on_the_values(base, capsys, edits, ops):
    manifest = write_manifest(base.parent / "m.json", base, *edits)
    assert main(["apply", str(manifest), "--dry-run"]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "dry run" in line]
    assert notes == ([] if ops is None else [f"note      {UNCOMPUTED.format(ops)}"])
    assert [note for note in swsurgery.plan(manifest).notes if "dry run" in note] == [note[10:] for note in notes]


@pytest.mark.parametrize(("op", "refused"), [("scale", "overflows"), ("clip", "removes everything")])
def test_only_an_edit_finds_what_the_values_forbid(base, capsys, op, refused):
    apply(base, {"op": "zero", "tensor": HEAD, "slice": "1:"}, name="sparse")
    manifest = write_manifest(base.parent / "m.json", base.parent / "sparse", DATA[op])
    assert main(["apply", str(manifest), "--dry-run"]) == 0
    capsys.readouterr()
    assert main(["apply", str(manifest), "-o", str(base.parent / "out"), "--check", "off"]) == 2
    assert refused in capsys.readouterr().err
    assert not (base.parent / "out").exists()


def test_an_edit_does_not_print_the_note_of_a_dry_run(base, capsys):
    manifest = write_manifest(base.parent / "m.json", base, DATA["round"])
    assert main(["apply", str(manifest), "-o", str(base.parent / "out"), "--check", "off"]) == 0
    printed = capsys.readouterr()
    assert "dry run" not in printed.out + printed.err


def test_the_rows_without_regions_have_the_columns_of_version_1(base):
    applied = apply(base, SCALAR)
    assert [list(row) for row in applied.to_rows()] == [COLUMNS]
    assert "changes" not in applied.to_json() and "undo" not in applied.to_json()


def test_a_dry_run_and_an_edit_print_one_line_for_each_edit(base, capsys):
    manifest = write_manifest(
        base.parent / "m.json", base, ROW, {"op": "round", "tensors": HEAD, "bits": 4, "per": "channel"}, PROTECT
    )
    assert main(["apply", str(manifest), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("edit ")] == [
        f"edit      zero L1 row 2: 10 scalars (20 B) in {down(1)}",
        "edit      round bits=4 per=channel lm_head.weight: 72 scalars (144 B)",
        f"edit      protect L0 column 3: 6 scalars (12 B) in {down(0)}",
    ]
    assert "changes   82 scalars in 2 of 3 shards; protects 6" in lines
    assert "undo      an undo file would store at most 164 B of old bytes" in lines
    assert main(["apply", str(manifest), "--dry-run", "--undo-limit", "163"]) == 0
    assert "undo      up to 164 B of old bytes exceed --undo-limit (163 B)" in capsys.readouterr().out
    out = base.parent / "out"
    assert main(["apply", str(manifest), "-o", str(out), "--check", "off"]) == 0
    lines = capsys.readouterr().out.splitlines()
    record = json.loads((out / "swsurgery.json").read_text())
    changed = record["changes"][1]["changed"]
    wanted = [
        "edit      zero L1 row 2: 10 of 10 scalars changed in 1 tensor",
        f"edit      round bits=4 per=channel lm_head.weight: {changed} of 72 scalars changed in 1 tensor",
        "edit      protect L0 column 3: 6 scalars in 1 tensor",
    ]
    assert [line for line in lines if line.startswith("edit ")] == wanted
    assert f"old bytes {UNDO} ({(out / UNDO).stat().st_size} B)" in lines
    assert main(["apply", str(manifest), "-o", str(base.parent / "json"), "--check", "off", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["changes"] == record["changes"] and document["undo"] == record["undo"]
    assert document["protected_regions"] == record["protected_regions"]


def test_a_record_without_an_undo_file_says_that_undoing_needs_the_base(base, capsys):
    from swsurgery.cli import show

    record = apply(base, ROW, undo_limit=1).record
    show.show_record(record)
    assert "old bytes not stored" in capsys.readouterr().out


def test_the_command_that_undoes_an_edit_names_the_base_only_if_it_is_needed(base, capsys):
    manifest = str(write_manifest(base.parent / "m.json", base, ROW, PROTECT))
    for limit, needed in (("0", " --base BASE"), ("1k", "")):
        out = str(base.parent / f"out{limit}")
        assert main(["apply", manifest, "-o", out, "--check", "off", "--undo-limit", limit]) == 0
        assert f"undo it   swsurgery revert {out} -o DIR{needed}\n" in capsys.readouterr().out
        assert main(["verify", out]) == 0
        proof = capsys.readouterr().out
        assert ("unproved  no undo file has the old bytes of" in proof) == bool(needed)
        put_back = "files not listed below" if needed else "with 1 region put back, they"
        assert f"proved    {put_back} have the base's sha256\n" in proof
        assert "protected 1 region with" in proof and "0 scalars" not in proof
        assert main(["verify", out, "--base", str(base)]) == 0
        proof = capsys.readouterr().out
        assert "listed below" not in proof and "unproved" not in proof
        assert ("proved    files whose old bytes are stored have" in proof) == bool(needed)


def test_an_edit_of_a_whole_tensor_is_a_few_lines_of_a_diff(tmp_path, capsys):
    count = 1200
    base = write_llama(
        tmp_path / "base",
        extra={"model.extra.weight": ("F32", (count, count), np.ones((count, count), "<f4").tobytes())},
    )
    apply(base, {"op": "zero", "tensors": "model.extra.weight"}, {"op": "zero", "layer": 0, "col": 1})
    assert main(["diff", str(base), str(tmp_path / "out")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 60
    found = swsurgery.diff(base, tmp_path / "out")
    assert found.tensors["model.extra.weight"] == (count * count, count * count)
    assert found.tensors[down(0)] == (6, 60)
    assert sum(c.count for c in found.changes if c.tensor == "model.extra.weight") == count * count
    assert len(found.changes) < 20


def test_a_scattered_edit_lists_at_most_the_limit_and_counts_the_rest(tmp_path, capsys):
    shape = (3000, 4)
    base = write_llama(tmp_path / "base", extra={"model.extra.weight": ("F32", shape, np.ones(shape, "<f4").tobytes())})
    apply(base, {"op": "zero", "tensor": "model.extra.weight", "slice": ":, 2"})
    assert main(["diff", str(base), str(tmp_path / "out")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 60
    assert ["model.extra.weight", "3000", "12000"] in [line.split() for line in lines]
    found = swsurgery.diff(base, tmp_path / "out")
    assert len(found.changes) == 1000 and found.truncated


def test_the_undo_file_is_no_difference(base):
    """An edit that changes nothing: a row of zeros that is zeroed."""
    apply(base, ROW, name="zeroed")
    for name in ("swsurgery.json", "manifest.yaml", "SHA256SUMS", UNDO):
        (base.parent / "zeroed" / name).unlink()
    apply(base.parent / "zeroed", {**ROW, "row": 2}, name="again")
    assert (base.parent / "again" / UNDO).exists()
    found = swsurgery.diff(base.parent / "zeroed", base.parent / "again")
    assert found.same and found.files[UNDO] == "only in b"
    write_shard(base.parent / "again" / "other.safetensors", {"x": ("F32", (1,), b"\0\0\0\0")})
    assert not swsurgery.diff(base.parent / "zeroed", base.parent / "again").same


def test_inspecting_a_record_of_version_2_shows_the_weights_and_not_the_undo_file(base, capsys):
    apply(base, ROW)
    out = base.parent / "out"
    assert main(["inspect", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    shards = {f["file"]: f["shard"] for f in document["files"]}
    assert shards[UNDO] is False and shards[FIRST] is shards[SECOND] is True
    assert {t["tensor"] for t in document["tensors"]} == {r["tensor"] for r in swsurgery.inspect(base).to_rows()}
    details = swsurgery.inspect(out, down(1), [2, 4]).to_json()
    assert (details["value"], details["bits"], details["layer"], details["row"]) == (0.0, "0x0000", 1, 2)
