"""apply --in-place and revert without -o: the bytes are those that the manifest names, or not one has changed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from checkpoints import (
    FIRST,
    HEAD,
    INDEX,
    NORM,
    SECOND,
    THIRD,
    down,
    place,
    sha256,
    stored,
    tree,
    write_llama,
    write_manifest,
    write_sparse_shard,
)

import swsurgery
from swsurgery.checkpoint import journal
from swsurgery.cli import main, output
from swsurgery.editing import in_place
from swsurgery.editing import plan as plan_module
from swsurgery.editing.check_options import CheckOptions
from swsurgery.editing.in_memory import patched_state_dict
from swsurgery.errors import CheckFailed, Interrupted
from swsurgery.progress import Silent
from swsurgery.storage import filesystem
from swsurgery.storage.names import OWN_FILES, WORKING_FILES

SHARDS = (FIRST, SECOND, THIRD)
ZERO = {"op": "zero", "layer": 1, "row": 2, "col": 3}
SCALE = {"op": "scale", "layer": 1, "row": 5, "col": 9, "factor": 2.0}
SET = {"op": "set", "tensor": HEAD, "index": [11, 5], "bits": "0x3fc0"}
PROTECT = {"op": "protect", "tensor": NORM, "index": [1]}


@pytest.fixture
def base(tmp_path) -> Path:
    return write_llama(tmp_path / "base")


def pinned(path: Path, base: Path, *edits: dict, names: tuple[str, ...] = (SECOND, THIRD), **more: object) -> Path:
    """A manifest that says the digest of the shards `names`; of FIRST, which it leaves out, nobody knows it."""
    record = {"path": str(base), "sha256": {name: sha256(base / name) for name in names}}
    return write_manifest(path, record, *edits, **more)


@pytest.fixture
def manifest(base, tmp_path) -> Path:
    return pinned(tmp_path / "m.json", base, ZERO, SCALE, SET, PROTECT)


@pytest.fixture
def apply(capsys) -> Callable[..., tuple[int, str, list[str]]]:
    """Runs `apply MANIFEST --in-place`: (exit code, stdout, lines on stderr)."""

    def run(manifest: Path, *options: str) -> tuple[int, str, list[str]]:
        check = () if "--check" in options else ("--check", "off")
        code = main(["apply", str(manifest), "--in-place", *check, *options])
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    return run


@pytest.fixture
def refused(apply) -> Callable[..., str]:
    """The one line of a refusal, after which every file is as it was and nothing was written."""

    def run(manifest: Path, base: Path, *options: str) -> str:
        before, times = tree(base), modified(base)
        code, out, lines = apply(manifest, *options)
        assert (code, out, len(lines)) == (2, "", 1), (code, out, lines)
        assert (tree(base), modified(base)) == (before, times)
        return lines[0].removeprefix("swsurgery: ")

    return run


def modified(folder: Path) -> dict[str, int]:
    """Of the folder too: its time moves when an entry is made or removed in it."""
    return {str(p): os.stat(p).st_mtime_ns for p in (folder, *folder.rglob("*"))}


def with_bytes(data: bytes, at: tuple[int, int], new: bytes) -> bytes:
    offset, size = at
    assert len(new) == size
    return data[:offset] + new + data[offset + size :]


def expected(base: Path) -> dict[str, bytes]:
    """What ZERO, SCALE and SET make of the base, by numpy and by the header read by hand."""
    files = tree(base)
    doubled = (np.frombuffer(stored(base / SECOND, down(1), (5, 9)), "<f2") * np.float16(2)).tobytes()
    files[SECOND] = with_bytes(files[SECOND], place(base / SECOND, down(1), (2, 3)), b"\0\0")
    files[SECOND] = with_bytes(files[SECOND], place(base / SECOND, down(1), (5, 9)), doubled)
    files[THIRD] = with_bytes(files[THIRD], place(base / THIRD, HEAD, (11, 5)), b"\xc0\x3f")
    return files


def theirs(folder: Path) -> dict[str, bytes]:
    """The files that are not swsurgery's own."""
    return {name: data for name, data in tree(folder).items() if name not in OWN_FILES}


# --- what it does


def test_the_named_scalars_are_changed_and_nothing_else(base, manifest, apply):
    want = expected(base)
    assert want != tree(base)
    assert apply(manifest)[0] == 0
    assert theirs(base) == want
    assert set(tree(base)) == {*want, *OWN_FILES}
    assert (base / "manifest.yaml").read_bytes() == manifest.read_bytes()


def test_a_manifest_that_only_protects_changes_no_shard(base, tmp_path, apply):
    """The no-op twin."""
    before, times = tree(base), modified(base)
    assert apply(pinned(tmp_path / "m.json", base, PROTECT))[0] == 0
    assert theirs(base) == before
    assert {p: t for p, t in modified(base).items() if p in times and p != str(base)} == {
        p: t for p, t in times.items() if p != str(base)
    }
    assert swsurgery.verify(base).ok


def test_the_record_says_both_digests_of_what_was_touched(base, manifest, apply):
    before = {name: hashlib.sha256(data).hexdigest() for name, data in tree(base).items()}
    apply(manifest)
    files = json.loads((base / "swsurgery.json").read_text())["files"]
    for name in (SECOND, THIRD):
        assert (files[name]["base_sha256"], files[name]["sha256"]) == (before[name], sha256(base / name))
        assert before[name] != files[name]["sha256"]
    assert (files[FIRST]["base_sha256"], files[FIRST]["sha256"]) == (None, None), "it was not read"
    assert files[FIRST]["size"] == (base / FIRST).stat().st_size
    assert files["tokenizer.json"]["sha256"] == before["tokenizer.json"], "small files are hashed"


def test_the_sums_are_those_of_the_files(base, manifest, apply):
    apply(manifest)
    sums = dict(reversed(line.split("  ", 1)) for line in (base / "SHA256SUMS").read_text().splitlines())
    assert sums == {n: sha256(base / n) for n in tree(base) if n not in ("SHA256SUMS", FIRST)}


def test_what_was_edited_in_place_verifies_and_a_changed_bit_does_not(base, manifest, apply):
    apply(manifest)
    verification = swsurgery.verify(base)
    assert verification.ok and verification.record.edits == 3 and verification.record.protected == 1
    assert verification.record.unhashed == (FIRST,)
    offset, _ = place(base / SECOND, down(1), (0, 0))
    data = bytearray((base / SECOND).read_bytes())
    data[offset] ^= 1
    (base / SECOND).write_bytes(data)
    assert not swsurgery.verify(base).ok


def test_the_shards_bytes_are_those_of_a_copy(base, manifest, tmp_path, apply):
    swsurgery.apply(manifest, output=tmp_path / "copy", check=CheckOptions("off"))
    apply(manifest)
    assert theirs(base) == theirs(tmp_path / "copy")


def test_the_shard_keeps_its_inode_mode_and_owner(base, manifest, apply):
    os.chmod(base / SECOND, 0o640)
    before = os.stat(base / SECOND)
    apply(manifest)
    after = os.stat(base / SECOND)
    assert [getattr(after, f) for f in ("st_ino", "st_mode", "st_uid", "st_gid", "st_size", "st_nlink")] == [
        getattr(before, f) for f in ("st_ino", "st_mode", "st_uid", "st_gid", "st_size", "st_nlink")
    ]


def test_folders_of_other_tools_are_left_alone(base, tmp_path, apply):
    for folder in (".git", ".cache"):
        (base / folder / "deep").mkdir(parents=True)
        (base / folder / "deep" / "file").write_text("theirs")
    assert apply(pinned(tmp_path / "m.json", base, ZERO))[0] == 0
    assert swsurgery.verify(base).ok
    assert main(["revert", str(base)]) == 0
    assert all((base / folder / "deep" / "file").read_text() == "theirs" for folder in (".git", ".cache"))


def test_json_has_the_shape_of_a_copy_and_says_place(base, manifest, tmp_path, apply, capsys):
    assert main(["apply", str(manifest), "-o", str(tmp_path / "copy"), "--check", "off", "--json"]) == 0
    copy = json.loads(capsys.readouterr().out)
    code, out, lines = apply(manifest, "--json")
    document = json.loads(out)
    assert (code, lines) == (0, [])
    assert document.keys() == copy.keys()
    assert document["output"] == str(base)
    assert {f["how"] for f in document["files"].values()} == {"place"}
    assert (document["splices"], document["protected"]) == (copy["splices"], copy["protected"])
    assert document["files"][FIRST]["sha256"] is None


def test_only_touched_shards_are_read_and_only_the_scalars_written(base, tmp_path, monkeypatch, apply):
    """One hash of the touched shard; of the others the header, however large they are."""
    write_sparse_shard(base / THIRD, HEAD, "BF16", 1 << 25, 1)
    index = json.loads((base / INDEX).read_text())
    index["weight_map"].pop(down(2))
    (base / INDEX).write_text(json.dumps(index))
    manifest = write_manifest(tmp_path / "m.json", {"path": str(base), "sha256": {SECOND: sha256(base / SECOND)}}, ZERO)
    read, written = Counter(), Counter()

    def counting(call: Callable, counter: Counter) -> Callable:
        def wrapped(fd: int, *arguments: object) -> object:
            done = call(fd, *arguments)
            counter[Path(os.readlink(f"/proc/self/fd/{fd}")).name] += done if isinstance(done, int) else len(done)
            return done

        return wrapped

    for name, counter in (
        ("pread", read), ("preadv", read), ("read", read), ("pwrite", written), ("write", written),
    ):  # fmt: skip
        monkeypatch.setattr(os, name, counting(getattr(os, name), counter))
    assert apply(manifest, "--check", "weights")[0] == 0
    size = (base / SECOND).stat().st_size
    assert size <= read[SECOND] < 3 * size, "hashed once; its header and the scalar were read besides"
    assert 0 < read[FIRST] < 1000 and 0 < read[THIRD] < 1000
    assert written[SECOND] == 2 + 2, "the old bytes once more, which takes the room for the new ones, and the new ones"
    assert not written[FIRST] and not written[THIRD]
    assert sum(written.values()) < 20_000


def test_the_forward_check_sees_what_it_sees_of_a_copy(tmp_path, apply):
    """There is no base beside it: the check puts the old scalars back in memory."""
    from tiny_checkpoint import DOWN, TEXT, write_pair

    base = write_pair(tmp_path).base
    (tmp_path / "text").write_text(TEXT * 3)
    record = {"path": str(base), "sha256": {"model.safetensors": sha256(base / "model.safetensors")}}
    edit = {"op": "set", "tensor": DOWN, "index": [3, 7], "value": 5.0}
    manifest = write_manifest(tmp_path / "m.json", record, edit)
    options = ("--check", "forward", "--device", "cpu", "--text", str(tmp_path / "text"))
    assert main(["apply", str(manifest), "-o", str(tmp_path / "copy"), *options]) == 0
    assert apply(manifest, *options)[0] == 0
    copy, here = (json.loads((folder / "swsurgery.json").read_text())["check"] for folder in (tmp_path / "copy", base))
    assert here == copy
    assert here["kind"] == "forward" and here["perplexity_ratio"] != 1


def test_a_bound_that_does_not_hold_puts_the_old_bytes_back(tmp_path, apply):
    from tiny_checkpoint import DOWN, TEXT, write_pair

    base = write_pair(tmp_path).base
    (tmp_path / "text").write_text(TEXT * 3)
    before = tree(base)
    record = {"path": str(base), "sha256": {"model.safetensors": sha256(base / "model.safetensors")}}
    edit = {"op": "set", "tensor": DOWN, "index": [3, 7], "value": 5.0}
    manifest = write_manifest(tmp_path / "m.json", record, edit)
    options = ("--check", "forward", "--device", "cpu", "--text", str(tmp_path / "text"))
    code, _, lines = apply(manifest, *options, "--max-perplexity-ratio", "0.001")
    assert code == 1 and any("perplexity" in line for line in lines)
    assert tree(base) == before


# --- again, and back


def test_the_same_command_again_says_so_and_writes_nothing(base, manifest, apply):
    apply(manifest)
    before, times = tree(base), modified(base)
    code, out, lines = apply(manifest)
    assert (code, lines) == (0, ["swsurgery: the manifest was already applied; nothing was written"])
    assert (tree(base), modified(base)) == (before, times)
    assert "wrote" not in out


def test_the_same_command_again_refuses_a_shard_that_was_changed_since(base, manifest, apply, refused):
    apply(manifest)
    offset, _ = place(base / SECOND, down(1), (0, 0))
    data = bytearray((base / SECOND).read_bytes())
    data[offset] ^= 1
    (base / SECOND).write_bytes(data)
    line = refused(manifest, base)
    assert "was changed later" in line and SECOND in line


def test_revert_gives_the_base_back_with_its_names(base, manifest, apply, capsys):
    before = tree(base)
    apply(manifest)
    assert tree(base) != before
    assert main(["revert", str(base), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == {"output": str(base), "notes": [], "schema": "swsurgery/revert/1"}
    assert tree(base) == before
    assert sorted(p.name for p in base.iterdir()) == sorted({name.split("/")[0] for name in before})


def test_two_manifests_are_two_steps_that_revert_takes_back_one_by_one(base, manifest, tmp_path, apply):
    original = tree(base)
    apply(manifest)
    once = tree(base)
    again = {"op": "zero", "layer": 0, "row": 0, "col": 0}
    more = {"op": "zero", "layer": 1, "row": 5, "col": 9}
    second = pinned(tmp_path / "second.json", base, again, more, names=SHARDS)
    assert apply(second)[0] == 0
    assert stored(base / SECOND, down(1), (5, 9)) == b"\0\0"
    assert stored(base / SECOND, down(1), (2, 3)) == b"\0\0", "the first step is still there"
    assert len(json.loads((base / "swsurgery.json").read_text())["history"]) == 1
    assert swsurgery.verify(base).ok
    assert main(["revert", str(base)]) == 0
    assert tree(base) == once
    assert main(["revert", str(base)]) == 0
    assert tree(base) == original


def test_a_copy_can_be_reverted_in_place(base, manifest, tmp_path):
    swsurgery.apply(manifest, output=tmp_path / "copy", link="copy", check=CheckOptions("off"))
    assert main(["revert", str(tmp_path / "copy")]) == 0
    assert tree(tmp_path / "copy") == tree(base)


def test_what_was_edited_in_place_can_be_reverted_into_a_copy(base, manifest, tmp_path, apply):
    before = tree(base)
    apply(manifest)
    after = tree(base)
    assert main(["revert", str(base), "-o", str(tmp_path / "back")]) == 0
    assert (tree(tmp_path / "back"), tree(base)) == (before, after)


@pytest.mark.parametrize("file", [SECOND, "tokenizer.json", "README.md"])
@pytest.mark.parametrize("how", ["changed", "removed"])
def test_revert_refuses_what_is_not_as_it_left_it(base, manifest, apply, capsys, file, how):
    apply(manifest)
    if how == "removed":
        (base / file).unlink()
    else:
        data = bytearray((base / file).read_bytes())
        data[-1] ^= 1
        (base / file).write_bytes(data)
    before, times = tree(base), modified(base)
    assert main(["revert", str(base)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert file in line
    assert (tree(base), modified(base)) == (before, times)


def edit_record(base: Path, **record: object) -> None:
    path = base / "swsurgery.json"
    document = json.loads(path.read_text())
    document["edits"][0] |= record
    shard = document["files"][SECOND]
    shard["base_sha256"] = shard["sha256"] if "offset" in record else shard["base_sha256"]
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    "record",
    [{"offset": 10**6}, {"offset": (1 << 63) - 1}, {"file": "config.json"}, {"file": "nowhere.safetensors"},
     {"file": "../base/" + SECOND}, {"old_bits": "0x1234"}, {"new_bits": "0x1234"}, {"old_bits": "0x12"}],
    ids=lambda record: ",".join(f"{k}={v}" for k, v in record.items()),
)  # fmt: skip
def test_revert_refuses_a_record_that_does_not_fit_the_shard(base, manifest, apply, capsys, record):
    apply(manifest)
    edit_record(base, **record)
    before = tree(base)
    assert main(["revert", str(base)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "bug" not in line
    assert tree(base) == before


# --- what it refuses


def test_a_link_to_the_directory_is_refused(base, manifest, tmp_path, refused):
    (tmp_path / "link").symlink_to(base)
    line = refused(manifest, base, "--base", str(tmp_path / "link"))
    assert line == f"the directory is a symbolic link: {tmp_path / 'link'} (give the directory itself)"


def test_a_shard_with_a_second_name_is_refused_and_another_file_with_one_is_not(base, manifest, tmp_path, refused):
    os.link(base / SECOND, tmp_path / "peer")
    line = refused(manifest, base)
    assert line == (
        f"the file has 2 hard links, so the edit would also change it under its other names: {base / SECOND} "
        "(write a copy with -o)"
    )
    (tmp_path / "peer").unlink()
    os.link(base / FIRST, tmp_path / "peer")  # it is not written
    assert main(["apply", str(manifest), "--in-place", "--check", "off"]) == 0


@pytest.fixture
def snapshot(base, tmp_path) -> Path:
    """The base as a Hugging Face cache holds it."""
    repo = tmp_path / "hub" / "models--org--name"
    folder = repo / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    for path in [p for p in base.iterdir() if p.is_file()]:
        blob = repo / "blobs" / sha256(path)
        shutil.copy(path, blob)
        (folder / path.name).symlink_to(os.path.relpath(blob, folder))
    return folder


def test_a_hugging_face_cache_is_refused(snapshot, base, tmp_path, apply):
    blobs = tree(tmp_path / "hub")
    manifest = pinned(tmp_path / "m.json", base, ZERO)
    code, _, lines = apply(manifest, "--base", str(snapshot))
    assert (code, len(lines)) == (2, 1)
    assert "a Hugging Face cache cannot be edited in place" in lines[0] and "(apply with -o)" in lines[0]
    assert tree(tmp_path / "hub") == blobs


def test_an_unknown_digest_is_refused_with_what_to_add(base, tmp_path, refused):
    line = refused(write_manifest(tmp_path / "m.json", base, ZERO), base)
    addition = f'{{"{SECOND}": "{sha256(base / SECOND)}"}}'
    assert "no sha256 of these files is known" in line and f"add base.sha256: {addition})" in line
    record = {"path": str(base), "sha256": json.loads(addition)}  # as a user would paste it
    assert main(["apply", str(write_manifest(tmp_path / "m.json", record, ZERO)), "--in-place", "--check", "off"]) == 0


def test_several_unknown_digests_can_be_pasted_at_once(base, tmp_path, refused):
    line = refused(write_manifest(tmp_path / "m.json", base, ZERO, SET), base)
    _, _, addition = line.removesuffix(")").partition("add base.sha256: ")
    record = {"path": str(base), "sha256": json.loads(addition)}
    manifest = write_manifest(tmp_path / "m.json", record, ZERO, SET)
    assert main(["apply", str(manifest), "--in-place", "--check", "off"]) == 0


def test_a_wrong_digest_is_refused(base, tmp_path, refused):
    record = {"path": str(base), "sha256": {SECOND: "0" * 64}}
    line = refused(write_manifest(tmp_path / "m.json", record, ZERO), base)
    assert sha256(base / SECOND) in line and "the manifest says 0000" in line


def test_what_the_manifest_says_counts_beside_a_record_too(base, manifest, tmp_path, apply, refused):
    apply(manifest)
    record = {"path": str(base), "sha256": {SECOND: "0" * 64}}
    second = write_manifest(tmp_path / "second.json", record, {"op": "zero", "layer": 1, "row": 0, "col": 0})
    assert "the manifest has 0000" in refused(second, base)


def test_a_side_file_that_was_changed_after_the_first_step_is_refused(base, manifest, tmp_path, apply, refused):
    apply(manifest)
    data = bytearray((base / "tokenizer.json").read_bytes())
    data[-2] ^= 1
    (base / "tokenizer.json").write_bytes(data)
    second = write_manifest(tmp_path / "second.json", base, {"op": "zero", "layer": 1, "row": 0, "col": 0})
    assert "tokenizer.json" in refused(second, base)


def test_a_shard_that_is_marked_read_only_is_refused(base, manifest, refused):
    os.chmod(base / SECOND, 0o444)
    message = f"the file is read-only: {base / SECOND} (write a copy with -o, or run chmod u+w on it)"
    assert refused(manifest, base) == message


def test_leaving_copies_out_is_refused(base, tmp_path, refused):
    (base / "pytorch_model.bin").write_bytes(b"the weights once more")
    record = {"path": str(base), "sha256": {SECOND: sha256(base / SECOND)}, "copies": "omit"}
    line = refused(write_manifest(tmp_path / "m.json", record, ZERO), base)
    assert line == "an edit in place cannot leave files out: pytorch_model.bin (set base.copies: keep)"


@pytest.mark.parametrize("options", [("-o", "elsewhere"), ("--link", "copy"), ("--reuse-digests",)])
def test_options_of_a_copy_are_refused(base, manifest, refused, options):
    said = "--in-place writes no copy, so it cannot be combined with -o, --link, --reuse-digests or --for-publish"
    assert refused(manifest, base, *options) == said


def test_an_option_of_a_copy_is_refused_by_revert(base, manifest, apply, capsys):
    apply(manifest)
    before = tree(base)
    assert main(["revert", str(base), "--link", "copy"]) == 2
    assert "--link" in capsys.readouterr().err
    assert tree(base) == before


def test_a_malformed_index_is_refused(base, manifest, refused):
    (base / INDEX).write_text('{"weight_map": {}}')
    assert refused(manifest, base) == f"has no weight_map: {INDEX}"


def test_a_value_that_is_not_the_expected_one_is_refused(base, tmp_path, refused):
    line = refused(pinned(tmp_path / "m.json", base, {**ZERO, "expect": 1234.0}), base)
    assert "expected 1234" in line


def test_a_dry_run_writes_nothing(base, manifest, capsys):
    before, times = tree(base), modified(base)
    assert main(["apply", str(manifest), "--in-place", "--dry-run"]) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert (tree(base), modified(base)) == (before, times)


# --- what goes wrong on the way


@pytest.fixture
def during_the_check(monkeypatch) -> Callable[[Callable[[], None]], None]:
    """Has a function called where the shards hold the new bytes and it is not yet decided that they stay."""

    def set_up(act: Callable[[], None]) -> None:
        def run_check(*arguments: object) -> dict:
            act()
            return {"kind": "off", "reason": "a test"}

        monkeypatch.setattr(in_place, "run_check", run_check)

    return set_up


def test_a_check_that_says_no_puts_the_old_bytes_back(base, manifest, apply, during_the_check):
    before, want, seen = tree(base), expected(base), []

    def no() -> None:
        seen.append(tree(base))
        raise CheckFailed("check failed: worse than it may be")

    during_the_check(no)
    assert apply(manifest) == (1, "", ["swsurgery: check failed: worse than it may be"])
    assert [{n: files[n] for n in SHARDS} for files in seen] == [{n: want[n] for n in SHARDS}]
    assert tree(base) == before
    assert not set(os.listdir(base)) & set(WORKING_FILES)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_puts_the_old_bytes_back_and_says_so(base, manifest, apply, during_the_check, number):
    before = tree(base)
    during_the_check(lambda: signal.raise_signal(number))
    assert apply(manifest) == (130, "", [f"swsurgery: interrupted: {number.name} (the old bytes were put back)"])
    assert tree(base) == before


def test_an_interrupt_before_anything_was_done_does_not_say_so(base, manifest, monkeypatch, apply):
    def interrupt(*arguments: object) -> None:
        raise Interrupted("SIGINT")

    monkeypatch.setattr(in_place.filesystem, "reserve", interrupt)
    before = tree(base)
    code, _, lines = apply(manifest)
    assert (code, tree(base)) == (130, before)
    assert "put back" not in lines[0]


def test_a_failing_second_step_leaves_the_first(base, manifest, tmp_path, apply, during_the_check):
    apply(manifest)
    before = tree(base)

    def no() -> None:
        raise CheckFailed("check failed")

    during_the_check(no)
    second = write_manifest(tmp_path / "second.json", base, {"op": "zero", "layer": 1, "row": 0, "col": 0})
    assert apply(second)[0] == 1
    assert tree(base) == before


def test_others_are_refused_while_it_is_edited(base, manifest, tmp_path, apply, during_the_check, capsys):
    commands = (
        ["apply", str(manifest), "-o", str(tmp_path / "out"), "--check", "off"], ["inspect", str(base)],
        ["apply", str(manifest), "--in-place", "--check", "off"], ["verify", str(base)], ["revert", str(base)],
        ["diff", str(base), str(base)],
    )  # fmt: skip
    answers = []

    def meanwhile() -> None:
        capsys.readouterr()
        answers.extend((main(command), capsys.readouterr().err) for command in commands)

    during_the_check(meanwhile)
    assert apply(manifest)[0] == 0
    told = (
        f"swsurgery: another run is reading or editing this directory: {base} (wait until that run ends, or stop it)\n"
    )
    assert answers == [(2, told)] * len(commands)
    assert not (tmp_path / "out").exists()
    assert swsurgery.verify(base).ok


@pytest.fixture
def reading(base) -> Iterator[None]:
    """Another run copies the base meanwhile."""
    fd = os.open(base, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    yield
    os.close(fd)


def test_a_base_that_is_being_copied_is_not_edited(base, manifest, reading, refused):
    assert (
        refused(manifest, base)
        == f"another run is reading or editing this directory: {base} (wait until that run ends, or stop it)"
    )


def test_a_step_that_finishes_while_another_is_planned_is_not_forgotten(base, manifest, tmp_path, monkeypatch):
    """What the second run read before the first one had the directory must not become its record."""
    late = pinned(tmp_path / "late.json", base, PROTECT)
    make_plan, first = plan_module.make_plan, []

    def planned(*arguments: object) -> object:
        plan = make_plan(*arguments)
        if not first:
            first.append(None)
            first.append(main(["apply", str(manifest), "--in-place", "--check", "off"]))
        return plan

    monkeypatch.setattr(in_place, "make_plan", planned)
    code = main(["apply", str(late), "--in-place", "--check", "off"])
    done = {0: 1, 2: 0}  # of each run that says that it is done there is a record
    steps = json.loads((base / "swsurgery.json").read_text())
    recorded = len(steps["history"]) + 1
    assert recorded == done[code] + done[first[1]]


def test_a_shard_that_cannot_be_opened_for_writing_leaves_the_directory_usable(base, manifest, monkeypatch):
    """It belongs to somebody else, say. Nothing was changed, so nothing is to be undone either."""
    real = os.open

    def refuse(path: Path, flags: int, *rest: object, **more: object) -> int:
        if str(path).endswith(THIRD) and flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied")
        return real(path, flags, *rest, **more)

    before = tree(base)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        assert main(["apply", str(manifest), "--in-place", "--check", "off"]) == 2
        assert main(["inspect", str(base)]) == 0
    assert tree(base) == before


def test_a_full_disk_leaves_the_old_bytes(base, manifest, monkeypatch):
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = tree(base)
    assert main(["apply", str(manifest), "--in-place", "--check", "off"]) == 2
    assert tree(base) == before


def test_bits_of_every_width_are_written(tmp_path, apply):
    """One, two, four and eight bytes, at odd offsets."""
    from checkpoints import tensor, write_single

    names = {"a": ("F8_E4M3", b"\x38"), "b": ("BF16", b"\x80\x3f"), "c": ("F32", struct.pack("<f", 1)),
             "d": ("F64", struct.pack("<d", 1))}  # fmt: skip
    tensors = {name: tensor(dtype, 5, seed=n) for n, (name, (dtype, _)) in enumerate(names.items())}
    base = write_single(tmp_path / "base", tensors, padding=1)
    shard = base / "model.safetensors"
    record = {"path": str(base), "sha256": {shard.name: sha256(shard)}}
    edits = [{"op": "set", "tensor": name, "index": [4], "value": 1.0} for name in names]
    want = shard.read_bytes()
    for name, (_, one) in names.items():
        want = with_bytes(want, place(shard, name, (4,)), one)
    assert apply(write_manifest(tmp_path / "m.json", record, *edits))[0] == 0
    assert shard.read_bytes() == want


def test_a_stated_digest_of_a_shard_without_edits_is_held(base, tmp_path, refused):
    """Another base is refused whichever of its shards the manifest names."""
    record = {"path": str(base), "sha256": {SECOND: sha256(base / SECOND), THIRD: "0" * 64}}
    line = refused(write_manifest(tmp_path / "m.json", record, ZERO), base)
    assert f"its sha256 is {sha256(base / THIRD)}, but the manifest says {'0' * 64}" in line


def test_a_manifest_proves_the_edit_that_it_made_in_place(base, tmp_path, apply, capsys):
    """Its base is then this checkpoint itself, and no base to compare with; the twin is another manifest."""
    manifest = pinned(tmp_path / "m.json", base, ZERO, PROTECT, names=SHARDS)
    other = pinned(tmp_path / "other.json", base, SCALE, PROTECT, names=SHARDS)
    assert apply(manifest)[0] == 0
    record = json.loads((base / "swsurgery.json").read_text())["files"]  # stated, so it was hashed, so it is known
    assert {name: record[name]["base_sha256"] for name in (FIRST, THIRD)} == {
        name: sha256(base / name) for name in (FIRST, THIRD)
    }
    assert main(["verify", str(base), "--manifest", str(manifest)]) == 0
    assert "which the record proves" in capsys.readouterr().out
    assert main(["verify", str(base), "--manifest", str(other)]) == 1
    assert "does not list the scalar" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["check {0}", "scan {0} --method weights", "verify {1} --base {0}", "diff {1} {0}"])
def test_what_is_edited_is_not_read_meanwhile(base, manifest, tmp_path, capsys, words):
    copy = tmp_path / "copy"
    assert main(["apply", str(manifest), "-o", str(copy), "--check", "off", "--quiet"]) == 0
    with filesystem.lock_directory(base, exclusive=True):
        assert main(words.format(base, copy).split()) == 2
    assert capsys.readouterr().err.startswith("swsurgery: another run is editing this directory in place")


@pytest.mark.parametrize("command", ["verify", "diff"])
def test_what_is_read_whole_is_not_edited_meanwhile(base, manifest, tmp_path, apply, monkeypatch, command):
    """Else the answer would be of half an edit: a no, where before and after it is a yes."""
    assert apply(manifest)[0] == 0
    late = pinned(tmp_path / "late.json", base, {"op": "zero", "layer": 1, "row": 0, "col": 0})
    during: list[tuple[int, str]] = []

    class Bar(Silent):
        def __init__(self, quiet: bool, began: float):
            pass

        def start(self, total: int, unit: str, label: str) -> None:
            done = subprocess.run(
                [sys.executable, "-m", "swsurgery", "apply", late, "--in-place", "--check", "off", "--quiet"],
                capture_output=True, text=True,
            )  # fmt: skip
            during.append((done.returncode, done.stderr))

    monkeypatch.setattr(output, "Bar", Bar)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    assert main([command, str(base), *([str(other)] if command == "diff" else [])]) == 0
    assert during and all(code == 2 and "another run is reading" in line for code, line in during)
    assert apply(late)[0] == 0, "the twin: afterwards it is made"


def test_a_cut_off_edit_is_undone_for_those_who_load_it_from_python(base, manifest):
    before = tree(base)
    (base / WORKING_FILES[2]).touch()
    assert dict(patched_state_dict(manifest, base))
    assert tree(base) == before


def test_bounds_that_nothing_can_hold_are_refused_before_anything_is_written(base, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(journal, "apply_splices", lambda *arguments, **more: pytest.fail("it was written"))
    check = {"min_perplexity_ratio": 2.0, "max_perplexity_ratio": 1.0}
    line = refused(pinned(tmp_path / "m.json", base, ZERO, check=check), base)
    assert "no perplexity ratio is at least 2 and at most 1" in line


# --- a record that is not what the manifest makes


def forge(base: Path, change: Callable[[dict], object]) -> None:
    """Change the record, and SHA256SUMS with it, as whoever wants to be believed does."""
    document = json.loads((base / "swsurgery.json").read_text())
    change(document)
    (base / "swsurgery.json").write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
    sums = {n: f["sha256"] for n, f in document["files"].items() if f["sha256"]}
    sums |= {name: sha256(base / name) for name in ("swsurgery.json", "manifest.yaml")}
    (base / "SHA256SUMS").write_text("".join(f"{d}  {n}\n" for n, d in sorted(sums.items())))


def none_done(document: dict) -> None:
    """Nothing was edited: the shards are the base's."""
    document.update(edits=[], protected=[])
    for name in (SECOND, THIRD):
        document["files"][name]["sha256"] = document["files"][name]["base_sha256"]


FORGED = {
    "no edits": (none_done, "does not list the scalar"),
    "one edit fewer": (lambda d: d["edits"].pop(), "does not list the scalar"),
    "another operation": (lambda d: d["edits"][0].update(op="set"), "the record has set"),
    "another factor": (lambda d: d["edits"][1].update(factor=3.0), "the record has the factor 3.0, not 2.0"),
    "nothing protected": (lambda d: d.update(protected=[]), "does not list the scalar"),
    "another base": (lambda d: d["files"][SECOND].update(base_sha256="0" * 64), f"base.sha256 of {SECOND}"),
    "another result": (lambda d: d["files"][SECOND].update(sha256="0" * 64), "the file was changed later"),
    "other old bits": (lambda d: d["edits"][0].update(old_bits="0x3c00", old=1.0), "the file was changed later"),
    "an edit that nobody asked for": (
        lambda d: d["edits"].append({**d["edits"][0], "index": [0, 0]}), "the manifest does not ask for it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_record_is_not_believed(base, manifest, apply, refused, name):
    change, says = FORGED[name]
    original = tree(base)
    assert apply(manifest)[0] == 0
    if name == "no edits":
        for shard in SHARDS:
            (base / shard).write_bytes(original[shard])
    forge(base, change)
    line = refused(manifest, base)
    assert line.startswith("the record says that this manifest was applied; however, ") and says in line


def test_a_record_alone_is_not_believed(base, tmp_path, apply, refused):
    """Whoever has the manifest can write it beside a base that nobody edited, pins or not."""
    manifest = pinned(tmp_path / "m.json", base, ZERO)
    original = tree(base)
    assert apply(manifest)[0] == 0
    files = {name: data for name, data in tree(base).items() if name in OWN_FILES}
    for name, data in original.items():
        (base / name).write_bytes(data)
    for name, data in files.items():
        (base / name).write_bytes(data)
    line = refused(manifest, base)
    assert line == (
        "the record says that this manifest was applied; however, the scalar is "
        f"0x{stored(base / SECOND, down(1), (2, 3))[::-1].hex()}, not 0x0000: {SECOND}: {down(1)}[2, 3] "
        "(run swsurgery verify)"
    )


def test_a_pin_of_a_shard_without_edits_is_held_against_the_file(base, tmp_path, apply, refused):
    manifest = pinned(tmp_path / "m.json", base, ZERO, names=SHARDS)
    assert apply(manifest)[0] == 0
    assert apply(manifest)[0] == 0, "the twin"
    offset, _ = place(base / FIRST, down(0), (0, 0))
    data = bytearray((base / FIRST).read_bytes())
    data[offset] ^= 1
    (base / FIRST).write_bytes(data)
    assert FIRST in refused(manifest, base)


def test_a_protected_scalar_that_changed_is_not_believed(base, tmp_path, apply, refused):
    """Nobody knows the digest of the shard that has it, so the record says only the scalar."""
    protect = {"op": "protect", "tensor": down(0), "index": [0, 1]}
    manifest = pinned(tmp_path / "m.json", base, ZERO, protect)
    assert apply(manifest)[0] == 0
    offset, _ = place(base / FIRST, down(0), (0, 1))
    data = bytearray((base / FIRST).read_bytes())
    data[offset] ^= 1
    (base / FIRST).write_bytes(data)
    assert f"{down(0)}[0, 1]" in refused(manifest, base)


def test_space_is_reserved_for_each_block_and_not_for_each_scalar(tmp_path, monkeypatch, apply):
    from checkpoints import tensor, write_single

    base = write_single(tmp_path / "base", {"w": tensor("F32", 3000)})
    shard = base / "model.safetensors"
    reserved = []
    true = filesystem.reserve
    monkeypatch.setattr(filesystem, "reserve", lambda path, size: (reserved.append(size), true(path, size)))
    edits = [{"op": "zero", "tensor": "w", "index": [n]} for n in range(0, 3000, 2)]
    record = {"path": str(base), "sha256": {shard.name: sha256(shard)}}
    assert apply(write_manifest(tmp_path / "m.json", record, *edits))[0] == 0
    blocks = -(-shard.stat().st_size // 4096)
    assert reserved == [(1 << 20) + 8192 * blocks] and blocks == 3


@pytest.mark.parametrize(("mode", "wanted"), [(0o600, 0o600), (0o640, 0o640), (0o644, 0o644)])
def test_what_repeats_private_weights_is_as_private(base, manifest, apply, during_the_check, mode, wanted):
    """Records and journal have bits of the weights, so nobody else may read them who may not read the weights."""
    for shard in SHARDS:
        (base / shard).chmod(mode)
    seen = []
    during_the_check(lambda: seen.append((base / ".swsurgery-journal").stat().st_mode & 0o777))
    umask = os.umask(0o022)
    try:
        assert apply(manifest)[0] == 0
    finally:
        os.umask(umask)
    assert [(base / name).stat().st_mode & 0o777 for name in OWN_FILES] == [wanted] * 3
    assert seen == [wanted]
