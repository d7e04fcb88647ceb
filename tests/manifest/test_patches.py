"""The sparse form of an edit: what the file holds, that `apply` makes the same bytes of it as of the manifest, and that
nothing else passes for one.

The oracle for the file is the official safetensors library; hostile files are written by struct and json alone.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from checkpoints import (
    FIRST,
    HIDDEN,
    INNER,
    SECOND,
    THIRD,
    down,
    place,
    sha256,
    stored,
    tree,
    write_llama,
    write_manifest,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import swsurgery
from swsurgery.cli import main
from swsurgery.editing.check_options import CheckOptions
from swsurgery.editing.revert import revert
from swsurgery.errors import ManifestError, PlanError
from swsurgery.manifest import patch as patch_module
from swsurgery.manifest.load import load_manifest
from swsurgery.sharing import export
from swsurgery.storage.dtypes import DTYPES
from swsurgery.storage.shard import parse_header

OFF = CheckOptions("off")
REPO, COMMIT = "org/tiny", "0123456789abcdef0123456789abcdef01234567"
EDITS = (
    {"op": "zero", "layer": 1, "row": 2, "col": 3},
    {"op": "scale", "layer": 2, "row": 0, "col": 1, "factor": 1.5},
    {"op": "set", "layer": 2, "row": 5, "col": 9, "value": -2},
    {"op": "set", "layer": 0, "row": 0, "col": 0, "value": 0.5},
)
BF16, F16, F32 = down(0), down(1), down(2)


@pytest.fixture
def base(tmp_path) -> Path:
    return write_llama(tmp_path / "base")


@pytest.fixture
def patch(tmp_path, base) -> Path:
    """The sparse form of EDITS of a base with a repository's name."""
    manifest = write_manifest(tmp_path / "edits.json", {"repo_id": REPO, "revision": COMMIT}, *EDITS)
    export.export(manifest, tmp_path / "patch.safetensors", format="sparse", base=str(base))
    return tmp_path / "patch.safetensors"


def opened(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """(the patch's own header, arrays but those of BF16) by the official library."""
    with safe_open(path, "np") as file:
        arrays = {k: file.get_tensor(k) for k in file.keys() if file.get_slice(k).get_dtype() != "BF16"}  # noqa: SIM118
        return json.loads(file.metadata()["patch"]), arrays


def test_the_file_holds_positions_old_and_new_values_and_the_digests_of_the_base(base, patch):
    header, arrays = opened(patch)
    assert [t["name"] for t in header["tensors"]] == [BF16, F16, F32]
    assert [t["dtype"] for t in header["tensors"]] == ["BF16", "F16", "F32"]
    assert header["base"]["repo_id"] == REPO and header["base"]["revision"] == COMMIT
    assert header["base"]["sha256"] == {name: sha256(base / name) for name in (FIRST, SECOND, THIRD)}
    assert header["manifest_sha256"] == sha256(patch.parent / "edits.json")
    assert header["tensors"][2]["edits"] == [{"op": "scale", "factor": 1.5}, {"op": "set", "factor": None}]
    assert arrays["1.indices"].dtype == np.int64 and arrays["1.indices"].tolist() == [2 * INNER + 3]
    assert arrays["2.indices"].tolist() == [1, 5 * INNER + 9]
    assert arrays["1.new"].tolist() == [0.0]
    assert arrays["1.old"].tobytes() == stored(base / SECOND, F16, (2, 3))
    assert arrays["2.old"].tobytes() == stored(base / THIRD, F32, (0, 1)) + stored(base / THIRD, F32, (5, 9))
    assert arrays["2.new"][0] == np.float32(np.float64(arrays["2.old"][0]) * 1.5) and arrays["2.new"][1] == -2
    assert patch.stat().st_size < 4096


def test_our_own_strict_reader_takes_it_and_every_array_is_aligned(patch):
    raw = patch.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    tensors, metadata = parse_header(raw[8 : 8 + size], len(raw) - 8 - size)
    assert metadata["format"] == "swsurgery.sparse" and metadata["format_version"] == "1"
    assert all((8 + size + info.data_offsets[0]) % info.dtype.size == 0 for info in tensors.values())


def test_the_same_edits_give_the_same_bytes_from_the_manifest_and_from_what_was_made_of_it(tmp_path, base, patch):
    manifest = tmp_path / "edits.json"
    swsurgery.apply(manifest, output=tmp_path / "patched", base=str(base), check=OFF)
    export.export(str(tmp_path / "patched"), tmp_path / "again.safetensors", format="sparse")
    assert (tmp_path / "again.safetensors").read_bytes() == patch.read_bytes()
    other = write_manifest(tmp_path / "other.json", {"repo_id": REPO, "revision": COMMIT}, *EDITS[:3])
    export.export(other, tmp_path / "other.safetensors", format="sparse", base=str(base))
    assert (tmp_path / "other.safetensors").read_bytes() != patch.read_bytes(), "the twin: other edits, other bytes"


def test_applying_the_patch_gives_every_file_that_applying_the_manifest_gives(tmp_path, base, patch):
    swsurgery.apply(tmp_path / "edits.json", output=tmp_path / "one", base=str(base), check=OFF)
    swsurgery.apply(patch, output=tmp_path / "two", base=str(base), check=OFF)
    one, two = tree(tmp_path / "one"), tree(tmp_path / "two")
    records = {"swsurgery.json", "manifest.yaml", "SHA256SUMS"}
    assert {n: d for n, d in one.items() if n not in records} == {n: d for n, d in two.items() if n not in records}
    assert one[THIRD] != (base / THIRD).read_bytes()
    records = [json.loads(files["swsurgery.json"]) for files in (one, two)]
    edits = [sorted(r["edits"], key=lambda e: (e["file"], e["offset"])) for r in records]
    assert edits[0] == edits[1] and [e["op"] for e in edits[1]] == ["set", "zero", "scale", "set"]
    assert records[0]["base"] == records[1]["base"]
    assert swsurgery.verify(tmp_path / "two").ok
    revert(tmp_path / "two", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(base)


def test_a_patch_of_what_a_patch_made_is_that_patch_but_for_its_manifest(tmp_path, base, patch):
    swsurgery.apply(patch, output=tmp_path / "two", base=str(base), check=OFF)
    export.export(str(tmp_path / "two"), tmp_path / "again.safetensors", format="sparse")
    again = patch_module.parse((tmp_path / "again.safetensors").read_bytes(), tmp_path)
    first = patch_module.parse(patch.read_bytes(), patch)
    assert (again.scalars, again.base) == (first.scalars, first.base)
    assert again.manifest_sha256 == sha256(tmp_path / "two" / "manifest.yaml")


@pytest.mark.parametrize("name", ["patch.safetensors", "patch", "patch.yaml"])
def test_the_content_says_that_it_is_a_patch_and_not_the_name(tmp_path, base, patch, name, capsys):
    patch.rename(tmp_path / name)
    assert main(["apply", str(tmp_path / name), "--base", str(base), "--dry-run", "--json"]) == 0
    splices = json.loads(capsys.readouterr().out)["splices"]
    assert [(s["tensor"], s["index"], s["op"]) for s in splices] == [
        (BF16, [0, 0], "set"), (F16, [2, 3], "zero"), (F32, [0, 1], "scale"), (F32, [5, 9], "set"),
    ]  # fmt: skip


def test_another_base_is_refused_by_its_digest(tmp_path, base, patch):
    data = bytearray((base / THIRD).read_bytes())
    data[-1] ^= 1  # in the head, which no edit touches
    (base / THIRD).write_bytes(data)
    with pytest.raises(PlanError, match=f"sha256.*{THIRD}|{THIRD}.*sha256"):
        swsurgery.apply(patch, output=tmp_path / "two", base=str(base), check=OFF)
    assert not (tmp_path / "two").exists()


def test_a_base_with_another_value_is_refused_by_the_old_bits(tmp_path, base, patch, capsys):
    offset, size = place(base / SECOND, F16, (2, 3))
    data = bytearray((base / SECOND).read_bytes())
    old = bytes(data[offset : offset + size])
    data[offset] ^= 1
    (base / SECOND).write_bytes(data)
    assert main(["apply", str(patch), "--base", str(base), "--dry-run"]) == 2
    assert f"expected bits 0x{old[::-1].hex()}, stored are" in capsys.readouterr().err


def test_bounds_and_choices_of_the_manifest_come_along(tmp_path, base):
    (base / "model.safetensors").write_bytes((base / FIRST).read_bytes())
    manifest = write_manifest(
        tmp_path / "m.json",
        {"path": "base", "weights": "index", "copies": "omit", "model": "llama-7b"},
        EDITS[0],
        check={"max_perplexity_ratio": 1.05},
    )
    export.export(manifest, tmp_path / "p.safetensors", format="sparse")
    loaded = load_manifest(tmp_path / "p.safetensors").manifest
    assert (loaded.base.weights, loaded.base.copies, loaded.base.model) == ("index", "omit", "llama-7b")
    assert loaded.check.max_perplexity_ratio == 1.05 and loaded.check.min_perplexity_ratio is None
    assert loaded.base.path == "base", "a path of this machine stays here: the base is looked for beside the patch"


def test_a_base_patched_twice_is_exported_as_one_step_from_the_first_base(tmp_path, base):
    first = write_manifest(
        tmp_path / "1.json", base, EDITS[0], {"op": "set", "layer": 2, "row": 1, "col": 1, "value": 3}
    )
    swsurgery.apply(first, output=tmp_path / "one", check=OFF)
    second = write_manifest(
        tmp_path / "2.json", tmp_path / "one", EDITS[3], {"op": "scale", "layer": 2, "row": 1, "col": 1, "factor": 2.0}
    )
    swsurgery.apply(second, output=tmp_path / "two", check=OFF)
    export.export(str(tmp_path / "two"), tmp_path / "p.safetensors", format="sparse")
    swsurgery.apply(tmp_path / "p.safetensors", output=tmp_path / "again", base=str(base), check=OFF)
    for name in (FIRST, SECOND, THIRD):
        assert sha256(tmp_path / "again" / name) == sha256(tmp_path / "two" / name)
    scalars = patch_module.parse((tmp_path / "p.safetensors").read_bytes(), tmp_path).scalars
    assert [s.op for s in scalars] == ["set", "zero", "set"]


HOSTILE_NAMES = ("0.indices", "__metadata__x", "x::indices", "\u202eweight", 'a"b\\c', "\n", "..", "0.new")


def test_hostile_names_of_tensors_stay_text(tmp_path):
    scalars = tuple(
        patch_module.PatchScalar(name, (2, 3), DTYPES["F32"], 4, "m.safetensors", b"\0\0\x80?", bytes(4), "zero")
        for name in sorted(HOSTILE_NAMES)
    )
    one = patch_module.Patch(patch_module.PatchBase(repo_id=REPO), patch_module.PatchBounds(), "0" * 64, scalars)
    raw = patch_module.render(one)
    assert patch_module.parse(raw, Path("p")) == one
    (tmp_path / "p").write_bytes(raw)
    assert [e.tensor for e in load_manifest(tmp_path / "p").manifest.edits] == sorted(HOSTILE_NAMES)
    with safe_open(tmp_path / "p", "np") as file:
        assert {k.partition(".")[0] for k in file.keys()} == {str(n) for n in range(len(HOSTILE_NAMES))}  # noqa: SIM118


# Hostile files -------------------------------------------------------------------------------------------------------


def parts(path: Path) -> tuple[dict, dict, dict[str, bytes]]:
    """(metadata, header without it, data by name), by struct and json."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    metadata = header.pop("__metadata__")
    data = {n: raw[8 + size :][slice(*e["data_offsets"])] for n, e in header.items()}
    return metadata, header, data


def join(path: Path, metadata: dict, header: dict, data: dict[str, bytes]) -> None:
    position, entries = 0, {"__metadata__": metadata}
    for name, entry in header.items():
        entries[name] = {**entry, "data_offsets": [position, position + len(data[name])]}
        position += len(data[name])
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data[n] for n in header))


def indices(*numbers: int):
    def change(said: dict, header: dict, data: dict) -> None:
        data["2.indices"] = struct.pack(f"<{len(numbers)}q", *numbers)
        header["2.indices"]["shape"] = [len(numbers)]

    return change


def say(path: str, value: object):
    def change(said: dict, header: dict, data: dict) -> None:
        *folders, last = path.split(".")
        for folder in folders:
            said = said[int(folder) if folder.isdecimal() else folder]
        said[last] = value

    return change


def entry(name: str, **fields: object):
    def change(said: dict, header: dict, data: dict) -> None:
        header[name].update(fields)

    return change


def drop(name: str):
    def change(said: dict, header: dict, data: dict) -> None:
        del header[name], data[name]

    return change


def bits(name: str, value: bytes):
    def change(said: dict, header: dict, data: dict) -> None:
        data[name] = value

    return change


RULES = {
    "out of range": (indices(1, HIDDEN * INNER), "position 60 is out of range"),
    "negative": (indices(-1, 5), "position -1 is out of range"),
    "huge": (indices(1, 2**63 - 1), "position 9223372036854775807 is out of range"),
    "twice": (indices(5, 5), "do not increase: 5 after 5"),
    "not rising": (indices(6, 5), "do not increase: 5 after 6"),
    "fewer positions than values": (indices(1), "2.indices is I64 of shape [1]"),
    "no dtype of positions": (entry("2.indices", dtype="U64"), "2.indices is U64"),
    "another dtype": (say("tensors.2.dtype", "I32"), "needs I32"),
    "an unknown dtype": (say("tensors.2.dtype", "F31"), "tensors.2.dtype"),
    "a dtype of blocks": (say("tensors.2.dtype", "F8_E8M0"), "block scales"),
    "an empty shape": (say("tensors.2.shape", []), "out of range"),
    "a shape of millions": (say("tensors.2.shape", [1] * 17), "tensors.2.shape"),
    "a negative shape": (say("tensors.2.shape", [-6, -10]), "tensors.2.shape"),
    "a shape of truths": (say("tensors.2.shape", [True, 60]), "tensors.2.shape"),
    "no such entry": (drop("1.old"), "disagree about '1.old'"),
    "a tensor twice": (say("tensors.1.name", BF16), "not sorted"),
    "no name": (say("tensors.0.name", ""), "tensors.0.name"),
    "a path as file": (say("tensors.0.file", "../x.safetensors"), "tensors.0.file"),
    "a digest of a path": (say("base.sha256", {"../x.safetensors": "0" * 64}), "base.sha256"),
    "half a digest": (say("base.sha256", {FIRST: "0" * 63}), "base.sha256"),
    "no digest": (say("manifest_sha256", "x"), "manifest_sha256"),
    "a branch as commit": (say("base.revision", "main"), "base.revision"),
    "a commit of nothing": (say("base.repo_id", None), "revision without a repo_id"),
    "an unknown field": (say("run", "rm"), "run"),
    "an unknown operation": (say("tensors.0.edits", [{"op": "protect", "factor": None}]), "tensors.0.edits"),
    "fewer operations": (say("tensors.2.edits", [{"op": "zero", "factor": None}]), "2.indices is I64 of shape [2]"),
    "no operations": (say("tensors.2.edits", []), "tensors.2.edits"),
    "no factor": (say("tensors.2.edits.0.factor", None), "op scale and factor None"),
    "a factor of 0": (say("tensors.2.edits.0.factor", 0.0), "factor 0"),
    "another factor": (say("tensors.2.edits.0.factor", 1.25), "which op scale does not produce"),
    "a zero that is none": (bits("1.new", b"\1\0"), "which op zero does not produce"),
    "not a number": (bits("0.new", b"\xc0\x7f"), "only finite values"),
    "a version to come": (None, "version 3 of a patch"),
    "a version that it does not need": (None, "format_version is 2, but these scalars need 1"),
    "another format": (None, "a safetensors file, but not a patch"),
    "no metadata of ours": (None, "is not valid JSON"),
}
METADATA = {
    "a version to come": {"format_version": "3"},
    "a version that it does not need": {"format_version": "2"},
    "another format": {"format": "pt"},
    "no metadata of ours": {"patch": "[1"},
}


@pytest.mark.parametrize("rule", RULES)
def test_a_file_that_breaks_a_rule_is_one_line_and_exit_2(tmp_path, base, patch, capsys, rule):
    change, message = RULES[rule]
    metadata, header, data = parts(patch)
    said = json.loads(metadata["patch"])
    if change:
        change(said, header, data)
    metadata = {**metadata, "patch": json.dumps(said), **METADATA.get(rule, {})}
    join(tmp_path / "hostile", metadata, header, data)
    assert main(["apply", str(tmp_path / "hostile"), "--base", str(base), "-o", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0], lines
    assert not (tmp_path / "out").exists()


def test_joining_the_parts_unchanged_is_still_a_patch(tmp_path, patch):
    """The twin of the test above: what it refuses is refused for the change alone."""
    join(tmp_path / "same", *parts(patch))
    assert load_manifest(tmp_path / "same").raw == load_manifest(patch).raw


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_patch_is_refused_or_says_the_same(data):
    raw = patch_module.render(
        patch_module.Patch(
            patch_module.PatchBase(repo_id=REPO), patch_module.PatchBounds(), "0" * 64,
            (patch_module.PatchScalar("t", (4,), DTYPES["F32"], 2, "m.safetensors", b"\0\0\x80?", bytes(4), "zero"),),
        )
    )  # fmt: skip
    at, value = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(0, 255))
    damaged = raw[:at] + bytes([value]) + raw[at + 1 :]
    try:
        found = patch_module.parse(damaged, Path("p"))
    except ManifestError as error:
        assert len(error.faults) == 1 and "\n" not in str(error)
    else:
        assert found.scalars[0].new == bytes(4)


def test_a_checkpoint_is_no_manifest(base, capsys):
    assert main(["apply", str(base / FIRST), "--dry-run"]) == 2
    assert "a safetensors file, but not a patch" in capsys.readouterr().err
