"""Several manifests or patches for one base are merged into one step.

The oracle applies them one after the other: the shards must have the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from checkpoints import down, tree, write_llama, write_manifest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import swsurgery
from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.cli import main
from swsurgery.editing.compose import drop_repeated
from swsurgery.editing.targets import KnownPlace
from swsurgery.errors import ManifestError, PlanError
from swsurgery.manifest.merge import load_merged

A = {"op": "zero", "tensor": down(1), "index": [2, 3]}
B = {"op": "scale", "factor": 0.5, "tensor": down(0), "index": [1, 1]}
ROW = {"op": "zero", "layer": 0, "row": 2}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "base")


def write(base: Path, name: str, *edits: dict, **more: object) -> Path:
    return write_manifest(base.parent / f"{name}.yaml", base, *edits, **more)


def apply(output: Path, *manifests: Path, base: Path | None = None) -> dict[str, bytes]:
    swsurgery.apply([*manifests], base, output, check="off")
    assert swsurgery.verify(output).ok
    return read_shards(output)


def apply_in_turn(base: Path, *manifests: Path) -> dict[str, bytes]:
    for number, manifest in enumerate(manifests):
        swsurgery.apply(manifest, base, base.parent / f"turn{number}", check="off")
        base = base.parent / f"turn{number}"
    return read_shards(base)


def read_shards(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(folder).items() if name.endswith(".safetensors") and "undo" not in name}


def refuse(capsys, *arguments: object) -> list[str]:
    """The lines with which the command refuses; it must write nothing."""
    before = sorted(Path.cwd().rglob("*"))
    assert main(["apply", *map(str, arguments), "--check", "off"]) == 2
    assert sorted(Path.cwd().rglob("*")) == before
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("second", [[B], [ROW], [B, {"op": "protect", "tensor": down(1), "index": [0, 0]}]])
def test_the_shards_are_those_of_two_steps(base, tmp_path, second):
    one, two = write(base, "one", A), write(base, "two", *second)
    merged = apply(tmp_path / "merged", one, two)
    assert merged == apply_in_turn(base, one, two) != read_shards(base)
    swsurgery.revert(tmp_path / "merged", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(base)


def test_the_record_holds_the_merged_manifest(base, tmp_path):
    one = write(base, "one", A, check={"max_perplexity_ratio": 9.0, "min_perplexity_ratio": 0.5})
    two = write(base, "two", B, check={"max_perplexity_ratio": 4.0})
    swsurgery.apply([one, two], output=tmp_path / "out", check="off")
    manifest = json.loads((tmp_path / "out" / "manifest.yaml").read_text())
    assert manifest["edits"] == [A, B] and manifest["base"]["path"] == str(base)
    assert manifest["check"] == {"max_perplexity_ratio": 4.0, "min_perplexity_ratio": 0.5}
    assert manifest["description"].startswith("merged from one.yaml (sha256 ")
    again = swsurgery.apply(tmp_path / "out" / "manifest.yaml", base, tmp_path / "again", check="off")
    assert read_shards(tmp_path / "again") == read_shards(tmp_path / "out") and len(again.record.edits) == 2


def test_patches_are_merged_too(base, tmp_path):
    patches = []
    for name, edit in (("one", A), ("two", B)):
        swsurgery.export(write(base, name, edit), tmp_path / f"{name}.safetensors", format="sparse")
        patches.append(tmp_path / f"{name}.safetensors")
    merged = apply(tmp_path / "merged", *patches, base=base)
    assert merged == apply_in_turn(base, write(base, "one", A), write(base, "two", B))
    mixed = apply(tmp_path / "mixed", patches[0], write(base, "two", B), base=base)
    assert mixed == merged


def test_the_command_takes_several(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    one, two = write(base, "one", A), write(base, "two", B)
    assert main(["apply", str(one), str(two), "--check", "off"]) == 0
    assert read_shards(tmp_path / "one+two") == apply_in_turn(base, one, two)
    capsys.readouterr()
    assert main(["apply", str(one), str(two), "--dry-run", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["splices"]) == 2


def test_in_place_twice_writes_once(base):
    digests = {name: entry for name, entry in tree(base).items() if name.endswith(".safetensors")}
    pinned = {"path": str(base), "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in digests.items()}}
    paths = [write_manifest(base.parent / f"{name}.yaml", pinned, edit) for name, edit in (("one", A), ("two", B))]
    before = tree(base)
    assert swsurgery.apply(paths, in_place=True, check="off").written
    assert not swsurgery.apply(paths, in_place=True, check="off").written
    swsurgery.revert(base)
    assert tree(base) == before


@pytest.mark.parametrize(
    "again",
    [
        A,
        {"op": "set", "value": 0, "tensor": down(1), "index": [2, 3]},
        {"op": "zero", "layer": 1, "row": 2, "col": 3},
        {"op": "set", "bits": "0x0000", "layer": 1, "row": 2, "col": 3},
    ],
)
def test_the_same_change_twice_counts_once(base, tmp_path, again):
    one, two = write(base, "one", A, ROW), write(base, "two", B, again, ROW)
    apply(tmp_path / "merged", one, two)
    assert json.loads((tmp_path / "merged" / "manifest.yaml").read_text())["edits"] == [A, ROW, B]
    only = apply(tmp_path / "only", write(base, "only", A, ROW, B))
    assert read_shards(tmp_path / "merged") == only
    apply(tmp_path / "itself", one, one)
    assert json.loads((tmp_path / "itself" / "manifest.yaml").read_text())["edits"] == [A, ROW]


@pytest.mark.parametrize(
    ("first", "second", "where"),
    [
        (A, {**A, "op": "scale", "factor": 3.0}, f"{down(1)}[2, 3]"),
        (A, {**A, "op": "protect"}, f"{down(1)}[2, 3]"),
        ({"op": "zero", "layer": 1, "row": 2}, A, f"{down(1)}[2, 3]"),
        (ROW, {"op": "scale", "factor": 2.0, "layer": 0, "row": 2}, f"{down(0)}[2,"),
    ],
)
def test_a_conflict_names_both_files(base, tmp_path, monkeypatch, capsys, first, second, where):
    monkeypatch.chdir(tmp_path)
    one, two = write(base, "one", first), write(base, "two", B | {"index": [5, 5], "tensor": down(1)}, second)
    [line] = refuse(capsys, one, two)
    assert line.startswith(f"swsurgery: {two}:5:1: edits[1]: {where}")
    assert line.endswith(f"has two operations (the other is {one}:4:1: edits[0])")


def test_every_file_s_own_faults_are_named_with_it(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    one, two = write(base, "one", {**A, "expect": 77.0}), write(base, "two", {**B, "index": [999, 0]})
    lines = refuse(capsys, one, two)
    assert [line.split(": ")[1] for line in lines] == [f"{one}:4:1", f"{two}:4:1"]
    one.write_text("version: 2\n")
    two.write_text("nonsense: 1\n")
    assert {line.split(": ")[1].split(":")[0] for line in refuse(capsys, one, two)} == {str(one), str(two)}


def test_bases_must_agree(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    other = write_llama(tmp_path / "other")
    one, two = write(base, "one", A), write_manifest(tmp_path / "two.yaml", other, B)
    [line] = refuse(capsys, one, two)
    assert f"{two}: path is {other}, but {base} in {one} (give one base with --base)" in line
    assert main(["apply", str(one), str(two), "--base", str(base), "-o", "out", "--check", "off"]) == 0
    said = {"path": str(base), "sha256": {"a.safetensors": "0" * 64}}
    three = write_manifest(tmp_path / "three.yaml", said, A)
    four = write_manifest(tmp_path / "four.yaml", said | {"sha256": {"a.safetensors": "1" * 64}}, B)
    assert "base.sha256.a.safetensors is 1111" in refuse(capsys, three, four)[0]
    five = write_manifest(tmp_path / "five.yaml", {"repo_id": "org/name"}, B)
    assert "names a directory as its base" in refuse(capsys, one, five)[0]


def test_directories_beside_different_manifests_are_found(base, tmp_path):
    """The paths in a manifest are relative to it; those of the merged one to the first manifest."""
    write_llama(tmp_path / "far" / "source")
    restore = {"op": "restore", "tensor": down(0), "index": [1, 1], "from": "./source"}
    two = write_manifest(tmp_path / "far" / "two.yaml", {"path": "../base"}, restore)
    one = write_manifest(tmp_path / "one.yaml", {"path": "base"}, A)
    apply(tmp_path / "merged", one, two)
    manifest = json.loads((tmp_path / "merged" / "manifest.yaml").read_text())
    assert manifest["edits"][1]["from"] == "far/source" and manifest["base"]["path"] == "base"


def test_numbers_keep_the_text_in_which_they_were_written(base, tmp_path):
    """Rounding a decimal number to float64 first would round it twice."""
    digits = "0.00390625000000000000000000000000001"
    one = write(base, "one", A)
    one.write_text(one.read_text().replace('"op": "zero"', f'"op": "set", "value": {digits}'))
    merged = tmp_path / "merged"
    apply(merged, one, write(base, "two", B, B | {"index": [0, 0]}), write(base, "three", B))
    assert f'"value": {digits}' in (merged / "manifest.yaml").read_text()


def test_no_manifest_is_still_an_empty_list_of_edits(base):
    with pytest.raises((ManifestError, TypeError)):
        swsurgery.plan([], base)


OPERATIONS = st.sampled_from(
    [{"op": "zero"}, {"op": "scale", "factor": 2.0}, {"op": "set", "value": 1.5}, {"op": "set", "value": 0}]
)
EDITS = st.lists(
    st.tuples(OPERATIONS, st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=3, unique_by=lambda e: e[1:]
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=EDITS, second=EDITS)
def test_any_two_manifests_are_merged_or_in_conflict(base, first, second):
    """A merged plan has exactly the bytes that both plans agree on."""
    paths = [
        write(base, name, *({**op, "tensor": down(1), "index": [row, col]} for op, row, col in edits))
        for name, edits in (("one", first), ("two", second))
    ]
    plans = [{s.coordinate: s.new for s in swsurgery.plan(path).splices} for path in paths]
    agree = all(plans[1][at] == plans[0][at] for at in plans[0].keys() & plans[1].keys())
    if agree:
        assert {s.coordinate: s.new for s in swsurgery.plan(paths).splices} == plans[0] | plans[1]
    else:
        with pytest.raises(PlanError, match="has two operations"):
            swsurgery.plan(paths)


KNOWN = KnownPlace(1, 2, 3, None)
"""A known super weight at a place of the small checkpoint."""


@pytest.mark.parametrize(
    ("other", "fits"),
    [
        (A, True),
        ({**A, "op": "scale", "factor": 3.0}, False),
        ({"op": "zero", "layer": 1, "row": 2}, False),
        (B, True),
    ],
)
def test_known_all_of_one_manifest_does_not_hide_a_conflict(base, other, fits):
    """Within one manifest it leaves out what other edits name. Across manifests that would be a silent choice."""
    paths = [write(base, "one", {"op": "zero", "known": "all"}), write(base, "two", other)]
    for order in (paths, paths[::-1]):
        found, faults = drop_repeated(load_merged(order), open_checkpoint(base), lambda name: [KNOWN])
        assert len(faults) == (0 if fits else 1)
        if faults:
            assert "has two operations (the other is " in faults[0] and str(paths[1]) in faults[0]
        assert len(found.manifest.edits) == (1 if other is A else 2)
