"""The model of the disk, on its own: what a crash may take, and what it may not."""

from __future__ import annotations

import hashlib
import json
import os
from random import Random

import pytest

from faults.crash_calls import Watch, watching
from faults.crash_fs import MODES, NOWHERE, Disk, Image, Start
from swsurgery.storage import filesystem


def made(watch: Watch, mode: str) -> Disk:
    disk = Disk(watch.start, mode)
    for step in watch.steps:
        disk.play(step)
    return disk


def outcomes(watch: Watch, mode: str) -> list[dict[str, bytes | None]]:
    """What 60 crashes leave."""
    return [image.plain() for image in made(watch, mode).images(Random(1), 60)]


@pytest.fixture
def watch(tmp_path):
    (tmp_path / "old").write_bytes(b"o" * 1024)
    with watching(Watch(tmp_path)) as watch:
        yield watch


def write(watch: Watch, name: str, data: bytes, sync: bool = False) -> None:
    fd = filesystem.create(watch.root / name)
    filesystem.write_all(fd, data)
    if sync:
        filesystem.sync(fd)
    os.close(fd)


@pytest.mark.parametrize("mode", MODES)
def test_what_was_synced_stays(watch, mode):
    write(watch, "new", b"n" * 3000, sync=True)
    filesystem.sync_directory(watch.root)
    assert outcomes(watch, mode) == [{"old": b"o" * 1024, "new": b"n" * 3000}]


@pytest.mark.parametrize("mode", MODES)
def test_what_was_not_synced_may_be_lost_kept_torn_or_zero(watch, mode):
    write(watch, "new", b"n" * 3000)
    found = [tree.get("new") for tree in outcomes(watch, mode)]
    assert {None, b"", bytes(3000), b"n" * 3000} <= set(found)
    assert any(data and 0 < data.count(b"n") < 3000 and data.count(b"\0") for data in found)
    assert all(set(data) <= set(b"n\0") for data in found if data)


def test_a_synced_file_may_lose_its_name_where_only_barriers_count(watch):
    write(watch, "new", b"n", sync=True)
    assert {"new" in tree for tree in outcomes(watch, "no order")} == {True, False}
    assert {"new" in tree for tree in outcomes(watch, "journal")} == {True}


def test_changes_of_directories_come_in_order_only_with_a_journal(watch):
    write(watch, "first", b"1")
    write(watch, "second", b"2")
    names = {mode: {frozenset(tree) - {"old"} for tree in outcomes(watch, mode)} for mode in MODES}
    assert names["journal"] == {frozenset(), frozenset({"first"}), frozenset({"first", "second"})}
    assert names["no order"] == names["journal"] | {frozenset({"second"})}


@pytest.mark.parametrize("mode", MODES)
def test_a_rename_is_whole_or_not_there(watch, mode):
    write(watch, "new", b"n" * 512, sync=True)
    filesystem.sync_directory(watch.root)
    filesystem.rename_new(watch.root / "new", watch.root / "other")
    assert {frozenset(tree) for tree in outcomes(watch, mode)} == {frozenset({"old", n}) for n in ("new", "other")}


def test_a_sector_is_old_or_new(watch):
    fd = filesystem.open_for_patching(watch.root / "old")
    filesystem.write_at(fd, b"N" * 4, 510)
    os.close(fd)
    middles = {tree["old"][510:514] for tree in outcomes(watch, "journal")}
    assert middles == {b"oooo", b"NNoo", b"ooNN", b"NNNN"}


def test_after_a_failed_fsync_the_bytes_are_seen_and_never_written(watch):
    def fail(call):
        if call.name == "fsync" and not call.done:
            raise OSError(5, "EIO")

    fd = filesystem.open_for_patching(watch.root / "old")
    filesystem.write_at(fd, b"N" * 512, 0)
    watch.trouble = fail
    with pytest.raises(OSError, match="EIO"):
        filesystem.sync(fd)
    watch.trouble = None
    filesystem.sync(fd)
    assert (watch.root / "old").read_bytes()[:512] == b"N" * 512
    assert made(watch, "journal").nothing().plain() == {"old": b"o" * 1024}
    filesystem.drop_cache(fd)
    os.close(fd)
    assert (watch.root / "old").read_bytes() == b"o" * 1024


def test_a_call_that_the_watch_does_not_know_is_an_error(watch):
    with pytest.raises(AttributeError, match="truncate"):
        filesystem.os.truncate(watch.root / "old", 0)
    assert filesystem.os is not os


def test_inode_numbers_in_files_move_with_the_files(tmp_path):
    journal = {"inode": 70, "files": {"a.safetensors": {"inode": 71}, "gone": {"inode": 72}}}
    body = json.dumps(journal, sort_keys=True).encode() + b"\n"
    raw = body + hashlib.sha256(body).hexdigest().encode() + b"\n"
    files = {
        "model": (1, None),
        "model/a.safetensors": (2, b"a"),
        "model/.swsurgery-journal": (3, raw),
        "model/.swsurgery-journal.new": (4, raw[:-1]),
    }
    Image(files, {70: 1, 71: 2, 72: 8}).write(tmp_path / "image")
    model = tmp_path / "image" / "model"
    written = (model / ".swsurgery-journal").read_bytes()
    body, digest = written[:-65], written[-65:]
    inodes = {"inode": model.stat().st_ino, "files": {
        "a.safetensors": {"inode": (model / "a.safetensors").stat().st_ino}, "gone": {"inode": NOWHERE}}}  # fmt: skip
    assert json.loads(body) == inodes
    assert digest == hashlib.sha256(body).hexdigest().encode() + b"\n"
    assert (model / ".swsurgery-journal.new").read_bytes() == raw[:-1]  # torn, so nobody's to mend


def test_a_start_is_its_own_image(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"b")
    assert Start.of(tmp_path).image().plain() == {"a": None, "a/b": b"b"}
