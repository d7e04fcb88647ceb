"""A patched checkpoint is its base with exactly the named bytes changed, whatever the machine and the hour.

The oracle is never the code under test: offsets come from the header by json and struct, digests from hashlib.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoints import (
    EMBED,
    FIRST,
    HEAD,
    HIDDEN,
    INNER,
    NORM,
    SECOND,
    SIZES,
    THIRD,
    VOCABULARY,
    down,
    place,
    sha256,
    stored,
    tensor,
    tree,
    write_llama,
    write_manifest,
    write_single,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import swsurgery
from swsurgery.editing.check_options import CheckOptions
from swsurgery.editing.revert import revert
from swsurgery.errors import CheckpointError, PlanError, TargetError
from swsurgery.storage import filesystem

OWN = {"swsurgery.json", "manifest.yaml", "SHA256SUMS"}
OFF = CheckOptions("off")
ZERO = {"op": "zero", "layer": 1, "row": 2, "col": 3}


@pytest.fixture
def base(tmp_path) -> Path:
    return write_llama(tmp_path / "base")


def apply(base: Path, output: Path, *edits: dict, **options) -> dict:
    """Apply the edits; returns the record as it lies in the output."""
    manifest = write_manifest(output.with_suffix(".json"), base, *edits)
    swsurgery.apply(manifest, output=output, **{"check": OFF, **options})
    return json.loads((output / "swsurgery.json").read_text())


def age(folder: Path) -> None:
    """Let the files look as if they were written an hour ago."""
    for file in folder.iterdir():
        os.utime(file, (time.time() - 3600,) * 2)


def expected(base: Path, *changes: tuple[str, str, tuple[int, ...], bytes]) -> dict[str, bytes]:
    """The base's files with (shard, tensor, index, new bytes) written in, by hand."""
    files = {name: bytearray(data) for name, data in tree(base).items()}
    for shard, name, index, new in changes:
        offset, size = place(base / shard, name, index)
        assert len(new) == size
        files[shard][offset : offset + size] = new
    return {name: bytes(data) for name, data in files.items()}


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(folder).items() if name not in OWN}


def test_only_the_named_bytes_change(base, tmp_path):
    bits = {"op": "set", "bits": "0x1234"}
    record = apply(
        base, tmp_path / "out", ZERO,
        {**bits, "tensor": EMBED, "index": [11, 5]}, {**bits, "layer": 0, "row": 0, "col": 0},
        {"op": "set", "tensor": NORM, "index": [0], "value": -1.5},
    )  # fmt: skip
    assert weights(tmp_path / "out") == expected(
        base,
        (SECOND, down(1), (2, 3), b"\0\0"),
        (FIRST, EMBED, (11, 5), b"\x34\x12"),
        (FIRST, down(0), (0, 0), b"\x34\x12"),
        (SECOND, NORM, (0,), b"\0\0\xc0\xbf"),
    )
    assert set(tree(tmp_path / "out")) == set(tree(base)) | OWN
    assert [(e["file"], e["offset"]) for e in record["edits"]] == [
        (SECOND, place(base / SECOND, down(1), (2, 3))[0]),
        (FIRST, place(base / FIRST, EMBED, (11, 5))[0]),
        (FIRST, place(base / FIRST, down(0), (0, 0))[0]),
        (SECOND, place(base / SECOND, NORM, (0,))[0]),
    ]


def test_the_base_is_not_touched(base, tmp_path):
    before = tree(base)
    apply(base, tmp_path / "out", ZERO)
    assert tree(base) == before


def test_protecting_alone_changes_nothing(base, tmp_path):
    record = apply(base, tmp_path / "out", {**ZERO, "op": "protect"})
    assert weights(tmp_path / "out") == tree(base)
    assert record["edits"] == [] and len(record["protected"]) == 1


@pytest.mark.parametrize(
    ("dtype", "two", "half"),
    [
        ("F64", "0000000000000040", "000000000000e03f"),
        ("F32", "00000040", "0000003f"),
        ("F16", "0040", "0038"),
        ("BF16", "0040", "003f"),
        ("F8_E4M3", "40", "30"),
        ("F8_E5M2", "40", "38"),
        ("F8_E4M3FNUZ", "48", "38"),
        ("F8_E5M2FNUZ", "44", "3c"),
    ],
)
@pytest.mark.parametrize("padding", [0, 1])
def test_every_float_dtype_at_even_and_odd_offsets_and_at_the_end(dtype, two, half, padding, tmp_path):
    """2.0 and 0.5 in hand-written bytes; the last element of the file is set, then halved twice by scale."""
    shape, name = (3, 5), "model.safetensors"
    base = write_single(tmp_path / "base", {"w": tensor(dtype, *shape)}, padding=padding)
    assert place(base / name, "w", (0, 0))[0] % 2 == padding
    offset, size = place(base / name, "w", (2, 4))
    assert offset + size == (base / name).stat().st_size
    here = {"tensor": "w", "index": [2, 4]}
    apply(base, tmp_path / "out", {"op": "set", **here, "value": 2.0}, {"op": "zero", "tensor": "w", "index": [0, 0]})
    zeroed = (name, "w", (0, 0), bytes(SIZES[dtype]))
    assert weights(tmp_path / "out") == expected(base, (name, "w", (2, 4), bytes.fromhex(two)), zeroed)
    apply(tmp_path / "out", tmp_path / "halved", {"op": "scale", **here, "factor": 0.25})
    assert weights(tmp_path / "halved") == expected(base, (name, "w", (2, 4), bytes.fromhex(half)), zeroed)


@pytest.mark.parametrize(("dtype", "value", "new"), [("I8", -3, "fd"), ("I64", 1 << 40, "000000000001" + "0000"),
                                                     ("BOOL", 1, "01"), ("U8", 255, "ff")])  # fmt: skip
def test_integers_are_set(dtype, value, new, tmp_path):
    base = write_single(tmp_path / "base", {"w": tensor(dtype, 4)})
    apply(base, tmp_path / "out", {"op": "set", "tensor": "w", "index": [2], "value": value})
    assert weights(tmp_path / "out") == expected(base, ("model.safetensors", "w", (2,), bytes.fromhex(new)))


def test_a_tensor_without_axes_has_one_scalar(tmp_path):
    base = write_single(tmp_path / "base", {"logit_scale": tensor("F32")})
    apply(base, tmp_path / "out", {"op": "zero", "tensor": "logit_scale", "index": []})
    assert weights(tmp_path / "out") == expected(base, ("model.safetensors", "logit_scale", (), bytes(4)))


def test_scalars_on_both_sides_of_a_buffers_end_and_across_it(tmp_path):
    """Files are copied in buffers of 1 MiB; at an odd place a scalar of 4 bytes lies across the end of one."""
    base = write_single(tmp_path / "base", {"w": tensor("F32", 600_000)}, padding=1)
    start, size = place(base / "model.safetensors", "w", (0,))
    across = ((1 << 20) - start) // size
    assert start + across * size < 1 << 20 < start + (across + 1) * size
    edits = [{"op": "set", "tensor": "w", "index": [i], "bits": "0x11223344"} for i in range(across - 1, across + 2)]
    changes = [("model.safetensors", "w", (i,), b"\x44\x33\x22\x11") for i in range(across - 1, across + 2)]
    for link in ("copy", "auto"):
        apply(base, tmp_path / link, *edits, link=link)
        assert weights(tmp_path / link) == expected(base, *changes)


PLACES = {
    EMBED: (FIRST, (VOCABULARY, HIDDEN), 2),
    down(0): (FIRST, (HIDDEN, INNER), 2),
    down(1): (SECOND, (HIDDEN, INNER), 2),
    NORM: (SECOND, (HIDDEN,), 4),
    down(2): (THIRD, (HIDDEN, INNER), 4),
    HEAD: (THIRD, (VOCABULARY, HIDDEN), 2),
}


@st.composite
def bit_edits(draw) -> dict[tuple[str, tuple[int, ...]], int]:
    """(tensor, index) -> finite bits: the top exponent bit stays clear."""
    names = st.sampled_from(sorted(PLACES))
    keys = names.flatmap(lambda n: st.tuples(st.just(n), st.tuples(*(st.integers(0, s - 1) for s in PLACES[n][1]))))
    chosen = draw(st.lists(keys, min_size=1, max_size=8, unique=True))
    return {key: draw(st.integers(0, (1 << 8 * PLACES[key[0]][2] - 2) - 1)) for key in chosen}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=bit_edits())
def test_any_edits_change_their_bytes_only_and_are_undone(edits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("random")
    base = write_llama(folder / "base")
    sizes = {key: PLACES[key[0]][2] for key in edits}
    manifest = [
        {"op": "set", "tensor": t, "index": list(i), "bits": f"0x{bits:0{2 * sizes[t, i]}x}"}
        for (t, i), bits in edits.items()
    ]
    apply(base, folder / "out", *manifest)
    changes = [(PLACES[t][0], t, i, bits.to_bytes(sizes[t, i], "little")) for (t, i), bits in edits.items()]
    assert weights(folder / "out") == expected(base, *changes)
    revert(folder / "out", folder / "back")
    assert tree(folder / "back") == tree(base)


def test_the_records_hold_the_digests_of_the_files(base, tmp_path):
    out = tmp_path / "out"
    record = apply(base, out, ZERO, {"op": "zero", "layer": 2, "row": 0, "col": 0})
    assert record["files"] == {
        name: {"size": len(data), "base_sha256": sha256(base / name), "sha256": sha256(out / name)}
        for name, data in tree(base).items()
    }
    changed = {n for n, r in record["files"].items() if r["sha256"] != r["base_sha256"]}
    assert changed == {SECOND, THIRD}
    lines = (out / "SHA256SUMS").read_text().splitlines()
    assert lines == [f"{sha256(out / name)}  {name}" for name in sorted(tree(out)) if name != "SHA256SUMS"]
    assert (out / "manifest.yaml").read_bytes() == (tmp_path / "out.json").read_bytes()


def test_the_same_inputs_give_the_same_bytes_anywhere(base, tmp_path):
    """Another working directory, umask, hash seed, time zone, locale, and a warm digest cache make no difference."""
    manifest = write_manifest(
        tmp_path / "m.json", base, ZERO, {"op": "scale", "tensor": HEAD, "index": [1, 1], "factor": 3.0}
    )
    worlds = [
        (tmp_path, 0o022, {"PYTHONHASHSEED": "1", "TZ": "Asia/Tokyo"}),
        (base, 0o077, {"PYTHONHASHSEED": "77", "TZ": "America/New_York", "LC_ALL": "C"}),
    ]
    for number, (folder, umask, environment) in enumerate(worlds):
        subprocess.run(
            [sys.executable, "-m", "swsurgery", "apply", manifest, "-o", tmp_path / str(number), "--check", "off"],
            cwd=folder, umask=umask, env=os.environ | environment, check=True, capture_output=True,
        )  # fmt: skip
    assert tree(tmp_path / "0") == tree(tmp_path / "1")
    assert (tmp_path / "1" / FIRST).stat().st_mode & 0o077 == 0


def test_hard_links_are_made_for_untouched_files_only(base, tmp_path):
    out = tmp_path / "out"
    apply(base, out, ZERO, link="hard")
    same = {name for name in weights(out) if os.path.samefile(base / name, out / name)}
    assert same == set(tree(base)) - {SECOND}
    assert weights(out) == expected(base, (SECOND, down(1), (2, 3), b"\0\0"))


def test_nothing_is_linked_unless_asked(base, tmp_path):
    for link in ("auto", "copy"):
        apply(base, tmp_path / link, ZERO, link=link)
        assert not any(os.path.samefile(base / name, tmp_path / link / name) for name in weights(tmp_path / link))


def test_hard_links_into_a_cache_are_refused(base, tmp_path):
    root = tmp_path / "hub" / "models--org--name"
    snapshot = root / "snapshots" / ("0" * 40)
    (root / "blobs").mkdir(parents=True)
    snapshot.parent.mkdir()
    base.rename(snapshot)
    with pytest.raises(TargetError, match="hard link would share the file .* Hugging Face cache: .*use --link auto"):
        apply(snapshot, tmp_path / "out", ZERO, link="hard")
    assert not (tmp_path / "out").exists()
    apply(snapshot, tmp_path / "out", ZERO)


def test_a_clone_that_cannot_be_made_is_refused(base, tmp_path, monkeypatch):
    monkeypatch.setattr(filesystem, "FICLONE", 0)  # an ioctl that no file system knows
    with pytest.raises(TargetError, match="this file system cannot clone files: .*use --link auto"):
        apply(base, tmp_path / "out", ZERO, link="clone")
    assert not (tmp_path / "out").exists()
    apply(base, tmp_path / "out", ZERO)  # auto copies instead
    assert weights(tmp_path / "out") == expected(base, (SECOND, down(1), (2, 3), b"\0\0"))


@pytest.mark.parametrize("link", ["copy", "hard"])
def test_other_bytes_under_the_old_time_are_hashed_again(base, tmp_path, link):
    """As an archive puts them there whose files all have one time: same inode, size and mtime, other weights."""
    age(base)
    pins = {name: sha256(base / name) for name in (FIRST, SECOND, THIRD)}
    apply(base, tmp_path / "first", ZERO)
    status = os.stat(base / FIRST)
    raw = bytearray((base / FIRST).read_bytes())
    raw[-1] ^= 1
    with open(base / FIRST, "r+b") as file:
        file.write(raw)
    os.utime(base / FIRST, ns=(status.st_atime_ns, status.st_mtime_ns))
    files = apply(base, tmp_path / "second", ZERO, link=link)["files"]
    assert files[FIRST]["sha256"] == sha256(base / FIRST)
    pinned = write_manifest(tmp_path / "pinned.json", {"path": str(base), "sha256": pins}, ZERO)
    with pytest.raises(PlanError, match="its sha256 is .*but the manifest says"):
        swsurgery.apply(pinned, output=tmp_path / "third", check=OFF, link=link)


@pytest.mark.parametrize("name", [FIRST, SECOND])
def test_a_blob_of_a_cache_is_hashed_against_its_name(base, tmp_path, name):
    """One that somebody edited in place keeps its name; FIRST has no edit, SECOND has."""
    repo = tmp_path / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / ("0" * 40)
    (repo / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in (p for p in base.iterdir() if p.is_file()):
        blob = repo / "blobs" / sha256(file)
        raw = bytearray(file.read_bytes())
        raw[-1] ^= file.name == name
        blob.write_bytes(raw)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    with pytest.raises(PlanError, match="its sha256 is .*but its blob's name says"):
        apply(snapshot, tmp_path / "out", ZERO)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("chunk", [1, 7, 4096, 4097])
def test_chunks_of_any_size_write_the_same_bytes(base, tmp_path, monkeypatch, chunk):
    """Also those that end in the middle of a scalar, or are not what writing past the page cache asks for."""
    monkeypatch.setattr(sys.modules["swsurgery.editing.copy"], "CHUNK", chunk)
    files = apply(base, tmp_path / "out", ZERO, link="copy")["files"]
    assert weights(tmp_path / "out") == expected(base, (SECOND, down(1), (2, 3), b"\0\0"))
    assert files[SECOND]["base_sha256"] == sha256(base / SECOND)
    assert files[SECOND]["sha256"] == sha256(tmp_path / "out" / SECOND)


def test_short_writes_are_completed(base, tmp_path, monkeypatch):
    """What follows a short write is aligned to nothing."""
    write, lengths = os.write, []

    def short(fd: int, data: bytes | memoryview) -> int:
        lengths.append(write(fd, data[: max(1, len(data) // 3)]))
        return lengths[-1]

    monkeypatch.setattr(os, "write", short)
    apply(base, tmp_path / "out", ZERO, link="copy")
    assert len(lengths) > 50
    assert weights(tmp_path / "out") == expected(base, (SECOND, down(1), (2, 3), b"\0\0"))


def test_a_changed_file_is_hashed_again(base, tmp_path):
    apply(base, tmp_path / "first", ZERO)
    (base / "README.md").write_text("changed")
    files = apply(base, tmp_path / "second", ZERO)["files"]
    assert files["README.md"]["sha256"] == sha256(base / "README.md")


def test_a_patched_base_that_was_changed_since_is_refused(base, tmp_path):
    first = tmp_path / "first"
    apply(base, first, ZERO)
    data = bytearray((first / THIRD).read_bytes())
    data[-1] ^= 1
    (first / THIRD).write_bytes(data)
    for attempt in (lambda: apply(first, tmp_path / "out", ZERO), lambda: revert(first, tmp_path / "out")):
        with pytest.raises(PlanError, match=f"its sha256 is {sha256(first / THIRD)}, but its record says"):
            attempt()
        assert not (tmp_path / "out").exists()


def test_a_record_changed_by_hand_begins_no_history(base, tmp_path):
    first = tmp_path / "first"
    apply(base, first, ZERO)
    (first / "manifest.yaml").write_bytes((first / "manifest.yaml").read_bytes() + b"\n")
    with pytest.raises(CheckpointError, match="record or manifest was changed by hand"):
        apply(first, tmp_path / "out", {**ZERO, "col": 4})
    assert not (tmp_path / "out").exists()


def test_manifests_in_turn_are_undone_in_turn(base, tmp_path):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    apply(base, first, ZERO)
    apply(first, second, {"op": "set", "layer": 1, "row": 2, "col": 3, "value": 7.0})
    record = apply(second, third, {"op": "zero", "tensor": NORM, "index": [3]})
    assert weights(third) == expected(base, (SECOND, down(1), (2, 3), b"\0\x47"), (SECOND, NORM, (3,), bytes(4)))
    assert [len(step["registry"]["edits"]) for step in record["history"]] == [1, 1]
    assert record["history"][0]["registry"]["edits"][0]["old_bits"] == (
        "0x" + stored(base / SECOND, down(1), (2, 3))[::-1].hex()
    )
    for patched, back, wanted in ((third, "a", second), (tmp_path / "a", "b", first), (tmp_path / "b", "c", base)):
        revert(patched, tmp_path / back)
        assert tree(tmp_path / back) == tree(wanted)
