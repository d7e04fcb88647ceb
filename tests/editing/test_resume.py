"""An interrupted copy: the same command goes on from what is proved, and ends with the bytes of an undisturbed run."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from checkpoints import (
    FIRST,
    HEAD,
    INDEX,
    SECOND,
    THIRD,
    age,
    down,
    place,
    sha256,
    tree,
    write_llama,
    write_manifest,
    write_shard,
    write_sparse_shard,
)
from killed import killed, names, run, signalled

import swsurgery
from swsurgery.cli import main
from swsurgery.editing import apply
from swsurgery.editing.check_options import CheckOptions
from swsurgery.editing.copy_job import AppliedFile
from swsurgery.errors import Interrupted, PlanError, SwsurgeryError, TargetError
from swsurgery.storage import filesystem
from swsurgery.storage.names import OWN_FILES

ZERO = {"op": "zero", "layer": 1, "row": 2, "col": 3}
SET = {"op": "set", "tensor": HEAD, "index": [11, 5], "value": 1.0}
SHARDS = (FIRST, SECOND, THIRD)


@pytest.fixture
def base(tmp_path) -> Path:
    return age(write_llama(tmp_path / "base"))


@pytest.fixture
def manifest(base, tmp_path) -> Path:
    return write_manifest(tmp_path / "m.json", base, ZERO, SET)


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def partial(output: Path) -> Path:
    return output.parent / f".{output.name}.partial"


def marker(output: Path) -> Path:
    return output.parent / f".{output.name}.committing"


def undisturbed(manifest: Path, tmp_path: Path) -> dict[str, bytes]:
    """What the same command makes where nothing happens to it."""
    swsurgery.apply(manifest, output=tmp_path / "undisturbed", link="copy", check=CheckOptions("off"))
    return tree(tmp_path / "undisturbed")


def copy(manifest: Path, output: Path) -> dict[str, AppliedFile]:
    outcome = swsurgery.apply(manifest, output=output, link="copy", check=CheckOptions("off"))
    return {file.name: file for file in outcome.copied.files}


def kept(files: dict[str, AppliedFile]) -> set[str]:
    return {name for name, file in files.items() if file.how == "kept"}


@pytest.fixture
def stopped_late(manifest, out, monkeypatch) -> dict[str, bytes]:
    """A run interrupted when all files were copied and its own were to be written; gives what it left."""

    def interrupt(*arguments: object) -> None:
        raise Interrupted("SIGINT")

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="run the same command to continue"):
        patch.setattr(apply, "write_own_files", interrupt)
        copy(manifest, out)
    assert not out.exists()
    left = tree(partial(out))
    assert left.keys() >= set(SHARDS)
    return left


# --- what is kept


def test_where_nothing_was_interrupted_everything_is_copied(manifest, out):
    """The twin of all that follows."""
    files = copy(manifest, out)
    assert {file.how for file in files.values()} == {"copy"}


def test_finished_files_are_kept_and_not_written_again(base, manifest, out, tmp_path, stopped_late):
    inodes = {name: (partial(out) / name).stat().st_ino for name in SHARDS}
    files = copy(manifest, out)
    assert kept(files) == set(tree(base))
    assert {name: (out / name).stat().st_ino for name in SHARDS} == inodes
    assert files[SECOND].base_digest == sha256(base / SECOND)
    assert files[SECOND].patched_digest == sha256(out / SECOND) != sha256(base / SECOND)
    assert tree(out) == undisturbed(manifest, tmp_path)
    assert swsurgery.verify(out, base=base).ok
    assert not partial(out).exists()


def test_what_was_kept_is_said(manifest, out, stopped_late):
    done = run("apply", manifest, "-o", out, "--check", "off", "--link", "copy")
    assert (done.returncode, done.stderr) == (0, "")
    assert "kept from the interrupted run" in done.stdout


@pytest.mark.parametrize("file", [FIRST, SECOND, "tokenizer.json", "assets/empty"])
@pytest.mark.parametrize("tamper", ["bit", "longer", "gone"])
def test_a_staged_file_that_is_not_proved_is_copied_anew(base, manifest, out, tmp_path, stopped_late, file, tamper):
    staged = partial(out) / file
    data = staged.read_bytes()
    if tamper == "gone":
        staged.unlink()
    else:
        staged.write_bytes(bytes([data[0] ^ 1]) + data[1:] if tamper == "bit" and data else data + b"x")
    files = copy(manifest, out)
    assert kept(files) == set(tree(base)) - {file}
    assert tree(out) == undisturbed(manifest, tmp_path)


def test_a_wrong_byte_in_an_edited_scalar_is_not_kept(base, manifest, out, stopped_late):
    """Where the old bytes are put back to prove the file, the new ones are compared."""
    offset, _ = place(base / SECOND, down(1), (2, 3))
    with open(partial(out) / SECOND, "r+b") as file:
        file.seek(offset)
        file.write(b"\x01")
    assert kept(copy(manifest, out)) == set(tree(base)) - {SECOND}
    assert swsurgery.verify(out, base=base).ok


def test_another_manifest_keeps_only_what_is_the_same(base, out, tmp_path, stopped_late):
    other = write_manifest(tmp_path / "other.json", base, SET)  # of two edits the second only
    assert kept(copy(other, out)) == set(tree(base)) - {SECOND}
    assert (out / SECOND).read_bytes() == (base / SECOND).read_bytes()
    assert tree(out) == undisturbed(other, tmp_path)


def test_another_base_keeps_nothing_of_what_differs(base, out, tmp_path, stopped_late):
    other = write_llama(tmp_path / "other", config={"model_type": "mistral"})
    age(other)
    manifest = write_manifest(tmp_path / "other.json", other, ZERO, SET)
    copy(manifest, out)
    assert swsurgery.verify(out, base=other).ok and not swsurgery.verify(out, base=base).ok


def test_a_base_that_was_changed_in_between_is_copied_as_it_is_now(base, manifest, out, stopped_late):
    data = bytearray((base / FIRST).read_bytes())
    data[-1] ^= 1
    (base / FIRST).write_bytes(data)
    files = copy(manifest, out)
    assert FIRST not in kept(files) and SECOND in kept(files)
    assert (out / FIRST).read_bytes() == bytes(data)
    assert swsurgery.verify(out, base=base).ok


def test_a_pinned_base_that_was_changed_in_between_is_refused(base, out, tmp_path, stopped_late):
    record = {"path": str(base), "sha256": {name: sha256(base / name) for name in SHARDS}}
    manifest = write_manifest(tmp_path / "m.json", record, ZERO, SET)
    data = bytearray((base / FIRST).read_bytes())
    data[-1] ^= 1
    (base / FIRST).write_bytes(data)
    with pytest.raises(PlanError, match=FIRST):
        copy(manifest, out)
    assert not out.exists() and not partial(out).exists()


def test_what_is_kept_is_what_would_be_written_whatever_the_cache_remembers(base, manifest, out, stopped_late):
    """The staged shard and the base are changed alike without a new time; the pins are still checked."""
    record = {"path": str(base), "sha256": {FIRST: sha256(base / FIRST)}}
    pinned = write_manifest(manifest.with_name("pinned.json"), record, ZERO, SET)
    status = (base / FIRST).stat()
    for path in (base / FIRST, partial(out) / FIRST):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(PlanError, match="its sha256 is .*but the manifest says"):
        copy(pinned, out)
    assert not out.exists()


def test_what_is_kept_needs_no_cache(base, manifest, out, stopped_late, own_cache):
    shutil.rmtree(own_cache / "swsurgery")
    assert kept(copy(manifest, out)) == set(tree(base))


def test_strays_are_removed(manifest, out, tmp_path, stopped_late):
    stage = partial(out)
    (stage / "stray").write_text("x")
    (stage / OWN_FILES[0]).write_text("half a record")
    (stage / "folder" / "deep").mkdir(parents=True)
    (stage / "folder" / "deep" / "stray").write_text("x")
    (stage / "assets" / "stray").write_text("x")
    (stage / "link").symlink_to(tmp_path / "base")
    (stage / FIRST).unlink()
    (stage / FIRST).mkdir()
    (stage / FIRST / "stray").write_text("x")
    (stage / "tokenizer.json").unlink()
    (stage / "tokenizer.json").symlink_to(tmp_path / "base" / "tokenizer.json")
    base = tree(tmp_path / "base")
    files = copy(manifest, out)
    assert {FIRST, "tokenizer.json"}.isdisjoint(kept(files))
    assert tree(out) == undisturbed(manifest, tmp_path)
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert tree(tmp_path / "base") == base


def test_a_folder_that_became_a_link_is_not_followed(manifest, out, tmp_path, stopped_late):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "empty").write_text("precious")
    shutil.rmtree(partial(out) / "assets")
    (partial(out) / "assets").symlink_to(elsewhere)
    copy(manifest, out)
    assert tree(elsewhere) == {"empty": b"precious"}
    assert (out / "assets" / "empty").read_bytes() == b"" and not (out / "assets").is_symlink()


def test_nested_folders_are_kept(base, manifest, out, tmp_path):
    (base / "a" / "b" / "c").mkdir(parents=True)
    (base / "a" / "b" / "c" / "file").write_text("deep")
    (base / "a" / "file").write_text("less deep")
    age(base)
    killed("editing.apply.write_own_files", "apply", manifest, "-o", out, "--check", "off", "--link", "copy")
    (partial(out) / "a" / "b" / "stray").write_text("x")
    files = copy(manifest, out)
    assert {"a/b/c/file", "a/file"} <= kept(files)
    assert tree(out) == undisturbed(manifest, tmp_path)


def test_hard_links_in_the_stage_are_not_kept(base, manifest, out, tmp_path):
    """A run with --link hard left them; what shares its bytes with the base could not be edited without it."""
    killed("editing.apply.write_own_files", "apply", manifest, "-o", out, "--check", "off", "--link", "hard")
    assert (partial(out) / FIRST).stat().st_nlink == 2
    files = copy(manifest, out)
    assert kept(files) == {SECOND, THIRD}, "which have edits, so they were copied"
    assert (out / FIRST).stat().st_nlink == 1
    assert tree(out) == undisturbed(manifest, tmp_path)


def test_a_revert_is_continued_too(base, manifest, out, tmp_path):
    copy(manifest, out)
    age(out)
    back = tmp_path / "back"
    killed("storage.staging._commit", "revert", out, "-o", back, "--link", "copy")
    inode = (partial(back) / SECOND).stat().st_ino
    assert main(["revert", str(out), "-o", str(back), "--link", "copy"]) == 0
    assert tree(back) == tree(base)
    assert (back / SECOND).stat().st_ino == inode


# --- interrupted in the middle

CHUNK = 2 << 20
"""Bytes that are copied at a time."""


@pytest.fixture
def several(tmp_path) -> Path:
    """A manifest whose base has a shard of five chunks, one of three and a small one; copied in that order."""
    base = tmp_path / "several"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "llama"}')
    write_shard(base / FIRST, {"small": ("F16", (4,), b"\1\2\3\4\5\6\7\x08")})
    write_sparse_shard(base / SECOND, "large", "BF16", CHUNK)
    write_sparse_shard(base / THIRD, "larger", "BF16", 2 * CHUNK)
    (base / INDEX).write_text(json.dumps({"weight_map": {"small": FIRST, "large": SECOND, "larger": THIRD}}))
    age(base)
    edits = [{"op": "set", "tensor": name, "index": [3], "value": 1.0} for name in ("large", "small")]
    return write_manifest(tmp_path / "m.json", base, *edits)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_copy_keeps_the_finished_shard(several, out, tmp_path, number):
    options = ("--check", "off", "--link", "copy")
    done = signalled(number, "storage.filesystem.write_at", "apply", several, "-o", out, *options, number=7)
    assert not out.exists() and THIRD in names(partial(out)) and FIRST not in names(partial(out))
    if number == signal.SIGKILL:
        assert done.returncode == -number and SECOND in names(partial(out))
    else:
        said = f"interrupted: {number.name} (run the same command to continue, or remove {partial(out)})"
        assert (done.returncode, done.stderr) == (130, f"swsurgery: {said}\n")
        assert SECOND not in names(partial(out)), "what was not finished is gone"
    inode = (partial(out) / THIRD).stat().st_ino
    assert kept(copy(several, out)) == {THIRD}
    assert (out / THIRD).stat().st_ino == inode
    assert tree(out) == undisturbed(several, tmp_path)
    assert not partial(out).exists()
    shutil.rmtree(tmp_path)  # pytest keeps the folders of three runs


def test_an_interrupt_before_a_shard_is_finished_leaves_nothing(several, out, tmp_path):
    done = signalled(
        signal.SIGINT, "storage.filesystem.write_at", "apply", several, "-o", out, "--check", "off", "--link", "copy"
    )
    assert (done.returncode, done.stderr) == (130, "swsurgery: interrupted: SIGINT (nothing was left behind)\n")
    assert names(tmp_path) == {"several", "m.json"}


# --- killed between the rename and the end


@pytest.mark.parametrize(("number", "after"), [(1, False), (1, True)])
def test_a_run_killed_at_the_rename_is_finished_by_the_same_command(base, manifest, out, tmp_path, number, after):
    killed("storage.filesystem.rename_new", "apply", manifest, "-o", out, "--check", "off", number=number, after=after)
    assert marker(out).exists() and out.exists() == after
    done = run("apply", manifest, "-o", out, "--check", "off", "--link", "copy")
    assert (done.returncode, done.stderr) == (0, "")
    assert tree(out) == undisturbed(manifest, tmp_path)
    assert swsurgery.verify(out, base=base).ok
    assert names(tmp_path) == {"base", "m.json", "out", "undisturbed"}


def test_a_second_step_killed_at_the_rename_is_finished_too(manifest, out, tmp_path):
    """Of a base that is itself patched, whose own files are not those of the target."""
    copy(manifest, out)
    second = write_manifest(tmp_path / "second.json", out, {"op": "zero", "layer": 0, "row": 0, "col": 0})
    again = tmp_path / "again"
    killed("storage.filesystem.rename_new", "apply", second, "-o", again, "--check", "off", after=True)
    assert run("apply", second, "-o", again, "--check", "off").returncode == 0
    assert swsurgery.verify(again).ok


def test_a_revert_killed_at_the_rename_is_finished_too(base, manifest, out, tmp_path):
    copy(manifest, out)
    killed("storage.filesystem.rename_new", "revert", out, "-o", tmp_path / "back", after=True)
    assert run("revert", out, "-o", tmp_path / "back").returncode == 0
    assert tree(tmp_path / "back") == tree(base)


def refused_and_left_alone(manifest: Path, out: Path) -> None:
    before, identity = tree(out), out.stat().st_ino
    with pytest.raises(TargetError, match="the output already exists"):
        copy(manifest, out)
    assert (tree(out), out.stat().st_ino) == (before, identity)
    assert not partial(out).exists()


def test_a_target_that_was_reported_as_done_is_left_alone(manifest, out):
    copy(manifest, out)
    assert not marker(out).exists()
    refused_and_left_alone(manifest, out)


@pytest.mark.parametrize("says", ["another inode", "another device", "nothing", "noise"])
def test_a_marker_that_speaks_of_another_directory_is_not_believed(manifest, out, says):
    copy(manifest, out)
    status = out.stat()
    marker(out).write_bytes({
        "another inode": b"%d:%d\n" % (status.st_dev, status.st_ino + 1),
        "another device": b"%d:%d\n" % (status.st_dev + 1, status.st_ino),
        "nothing": b"",
        "noise": b"\xff\0",
    }[says])  # fmt: skip
    refused_and_left_alone(manifest, out)


@pytest.mark.parametrize("name", ["mine.txt", "assets/mine.txt"])
def test_a_target_with_a_strangers_file_is_left_alone(manifest, out, name):
    killed("storage.filesystem.rename_new", "apply", manifest, "-o", out, "--check", "off", after=True)
    (out / name).write_text("precious")
    refused_and_left_alone(manifest, out)


def test_a_link_in_place_of_the_target_is_left_alone(manifest, out, tmp_path):
    killed("storage.filesystem.rename_new", "apply", manifest, "-o", out, "--check", "off", after=True)
    out.rename(tmp_path / "elsewhere")
    out.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TargetError, match="the output already exists"):
        copy(manifest, out)
    assert out.is_symlink() and swsurgery.verify(tmp_path / "elsewhere").ok


def test_a_failure_after_the_rename_takes_the_target_back(manifest, out, monkeypatch):
    """Not synced is not there: the run says that it failed, so nothing may be found under the name."""
    unlink = os.unlink

    def broken(path: object, *rest: object, **more: object) -> None:
        if path == marker(out).name and out.exists():
            raise OSError(5, "Input/output error")
        unlink(path, *rest, **more)

    monkeypatch.setattr(filesystem.os, "unlink", broken)
    with pytest.raises(TargetError, match="Input/output error"):
        copy(manifest, out)
    assert not out.exists()


def test_a_stage_that_is_a_link_is_not_followed(manifest, out, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("precious")
    partial(out).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TargetError):
        copy(manifest, out)
    assert tree(tmp_path / "elsewhere") == {"mine": b"precious"}


def test_a_base_that_cannot_be_read_does_not_blame_the_kept_files(base, manifest, out, stopped_late, monkeypatch):
    """Only what is copied anew needs the base."""
    (partial(out) / FIRST).unlink()
    preadv = os.preadv

    def broken(fd: int, *rest: object) -> int:
        if os.readlink(f"/proc/self/fd/{fd}") == str(base / FIRST):
            raise OSError(5, "broken disk")
        return preadv(fd, *rest)

    monkeypatch.setattr(os, "preadv", broken)
    monkeypatch.setattr(filesystem, "copy_range", lambda *arguments: os.preadv(arguments[0], [bytearray(1)], 0))
    with pytest.raises(SwsurgeryError, match="Input/output error"):
        copy(manifest, out)
    assert not out.exists()
