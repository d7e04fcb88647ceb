"""Another program changes the base while it is copied or read: no mixture, no foreign file, and one line about it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import FIRST, SECOND, THIRD, down, place, sha256, tree
from faults.copy_swaps import (
    FINDING,
    MANIFEST,
    OUT,
    SECRET,
    acting,
    command,
    folder_swapped,
    make,
    other_weights,
    played,
    refused,
)
from faults.planted import COPY_RACES, PACKAGE, copy_with

from swsurgery.cli import main
from swsurgery.editing import copy
from swsurgery.storage import folder


def replace_shard(base: Path) -> None:
    data = bytearray((base / THIRD).read_bytes())
    data[-1] ^= 1
    (base.parent / "new").write_bytes(data)
    shutil.copystat(base / THIRD, base.parent / "new")
    os.replace(base.parent / "new", base / THIRD)


def change_scalar(base: Path) -> None:
    """The times are put back as far as anybody can."""
    status, (at, size) = os.stat(base / FIRST), place(base / FIRST, down(0), (1, 1))
    with open(base / FIRST, "r+b") as shard:
        shard.seek(at)
        shard.write(bytes(size))
    os.utime(base / FIRST, ns=(status.st_atime_ns, status.st_mtime_ns))


def change_small_file(base: Path) -> None:
    (base / "tokenizer.json").write_text('{"version": "2.0"}\n')


def link_folder(base: Path) -> None:
    private = base.parent / "private"
    private.mkdir()
    (private / "note.txt").write_bytes(SECRET)
    (private / "empty").touch()
    shutil.move(base / "assets", base.parent / "aside")
    (base / "assets").symlink_to(private)


def remove_file(base: Path) -> None:
    (base / "README.md").unlink()


ACTS = [replace_shard, change_scalar, change_small_file, link_folder, remove_file]


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
@pytest.mark.parametrize("link", ["copy", "hard"])
def test_a_base_that_changes_between_planning_and_copying_is_refused(tmp_path, act, link):
    base = make(tmp_path)
    with acting("editing.apply.write_checkpoint", lambda: act(base)):
        done = command(tmp_path, "--link", link)
    assert refused(tmp_path, done) == []


def test_an_undisturbed_copy_ends_well(tmp_path):
    """The twin of all others here."""
    make(tmp_path)
    with acting("editing.apply.write_checkpoint", lambda: None):
        assert command(tmp_path) == (0, [])
    assert main(["verify", str(tmp_path / OUT), "--base", str(tmp_path / "base"), "--quiet"]) == 0


@pytest.mark.parametrize("act", [replace_shard, change_scalar], ids=lambda act: act.__name__)
def test_a_file_that_changes_while_it_is_copied_is_refused(tmp_path, monkeypatch, act):
    """After its first bytes were read."""
    base, changed = make(tmp_path), {replace_shard: THIRD, change_scalar: FIRST}[act]
    true = copy.stream

    def stream(fd: int, file: object, *rest: object, **more: object) -> tuple[str, str]:
        done = true(fd, file, *rest, **more)
        if file.name == changed:
            act(base)
        return done

    monkeypatch.setattr(copy, "stream", stream)
    monkeypatch.setenv("SWSURGERY_THREADS", "1")
    if act is replace_shard:  # the old file is still the one that is open: nothing of the new one is copied
        before = sha256(base / THIRD)
        assert command(tmp_path)[0] == 0 and sha256(tmp_path / OUT / THIRD) == before
    else:
        assert refused(tmp_path, command(tmp_path)) == []


def test_a_base_that_is_moved_away_is_copied_from_where_it_is_now(tmp_path):
    """The directory is held; what its path means by then does not matter."""
    base, other = make(tmp_path), other_weights(tmp_path)
    wanted = tree(base)

    def act() -> None:
        base.rename(tmp_path / "moved")
        other.rename(base)

    with acting("editing.apply.write_checkpoint", act):
        assert command(tmp_path) == (0, [])
    out = tree(tmp_path / OUT)
    assert {name: out[name] for name in wanted if name != SECOND} == {n: d for n, d in wanted.items() if n != SECOND}


@pytest.mark.parametrize("way", ["openat2", "components"])
def test_a_folder_that_becomes_a_link_while_it_is_listed_is_not_followed(tmp_path, monkeypatch, way):
    if way == "components":
        monkeypatch.setattr(folder, "_call_openat2", lambda *_: None)
    assert folder_swapped(tmp_path) == []


def test_other_headers_than_the_planned_ones_are_refused(tmp_path, monkeypatch):
    """Whatever the file system says of the file: here it says that nothing has changed."""
    base = make(tmp_path)
    monkeypatch.setattr(folder.Entry, "_refuse", lambda *_: None)

    def act() -> None:
        raw = (base / FIRST).read_bytes()
        (base / FIRST).write_bytes(raw.replace(b'"format": "pt"', b'"format": "tf"', 1))

    with acting("editing.apply.write_checkpoint", act):
        done = command(tmp_path)
    assert refused(tmp_path, done) == []
    assert "does not have the header that the edits were planned with" in done[1][0]


@pytest.mark.parametrize(
    "moment", ["editing.apply.write_checkpoint", "editing.apply.write_own_files", "storage.staging._commit"]
)
def test_a_parent_that_becomes_a_link_gets_nothing_of_ours(tmp_path, moment):
    """The output is written relative to the directory that was there when the command began."""
    make(tmp_path)
    for name in ("place", "theirs"):
        (tmp_path / name).mkdir()

    def act() -> None:
        (tmp_path / "place").rename(tmp_path / "moved")
        (tmp_path / "place").symlink_to(tmp_path / "theirs")

    with acting(moment, act):
        code = main(
            ["apply", str(tmp_path / MANIFEST), "-o", str(tmp_path / "place" / OUT), "--check", "off", "--quiet"]
        )
    assert code == 0
    assert list((tmp_path / "theirs").iterdir()) == []
    assert (tmp_path / "moved" / OUT / "swsurgery.json").is_file()


def during_open(base: Path, act: Callable[[Path], None], *words: str) -> int:
    """Run a command that reads; the base changes before the last file of it is opened for reading."""
    with acting("storage.folder.Entry.refuse_changed", lambda: act(base), number=6):
        return main([*words, "--quiet"])


@pytest.mark.parametrize(
    "words", [("verify", "out", "--base", "base"), ("diff", "base", "out"), ("inspect", "base")], ids=lambda w: w[0]
)
def test_commands_that_read_notice_a_shard_that_changes_meanwhile(tmp_path, words, capsys):
    base = make(tmp_path)
    assert command(tmp_path)[0] == 0
    paths = [str(tmp_path / w) if w in ("out", "base") else w for w in words]
    changed: list[int] = []

    def act(base: Path) -> None:
        for name in (FIRST, SECOND, THIRD):
            with open(base / name, "r+b") as shard:
                shard.seek(-1, os.SEEK_END)
                last = shard.read(1)
                shard.seek(-1, os.SEEK_END)
                shard.write(bytes([last[0] ^ 1]))
        changed.append(1)

    assert during_open(base, act, *paths) == 2 and changed
    lines = capsys.readouterr().err.splitlines()
    assert lines and all("was changed or replaced while it was read" in line for line in lines), lines


def test_every_planted_race_is_tried():
    assert set(FINDING) <= {bug.name for bug in COPY_RACES}
    assert len({bug.text() for bug in COPY_RACES}) == len(COPY_RACES)


@pytest.mark.parametrize("name", FINDING)
def test_a_planted_bug_is_found_by_its_race(tmp_path, name):
    assert played(name, PACKAGE.parent) == []
    assert played(name, copy_with(name, tmp_path / "with")) != []
