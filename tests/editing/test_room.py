"""Whether there is room for the output is asked before anything is copied."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import FIRST, SECOND, THIRD, down, tree, write_llama, write_manifest
from killed import killed, names

from swsurgery.cli import main
from swsurgery.editing import disk_space
from swsurgery.storage import filesystem

BLOCK = 512


@pytest.fixture
def manifest(tmp_path) -> Path:
    base = write_llama(tmp_path / "base")
    return write_manifest(tmp_path / "m.json", base, {"op": "zero", "tensor": down(1), "index": [2, 3]})


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def left(monkeypatch) -> Callable[[int], None]:
    """Set the number of blocks that are free."""

    def set_free(blocks: int, of: int = 1 << 30) -> None:
        status = SimpleNamespace(f_blocks=of, f_bavail=blocks, f_bfree=blocks + 100, f_frsize=BLOCK, f_bsize=4096)
        monkeypatch.setattr(disk_space.os, "fstatvfs", lambda fd: status)

    return set_free


def needed(base: Path, *without: str) -> int:
    """Blocks that copies of the files take."""
    return sum(-(-p.stat().st_size // BLOCK) for p in base.rglob("*") if p.is_file() and p.name not in without)


def apply(manifest: Path, out: Path, *more: str) -> int:
    return main(["apply", str(manifest), "-o", str(out), "--check", "off", "--quiet", *more])


@pytest.mark.parametrize("link", ["auto", "copy"])
def test_a_copy_that_does_not_fit_is_refused_before_it_begins(manifest, out, tmp_path, left, capsys, monkeypatch, link):
    blocks = needed(tmp_path / "base")
    left(blocks - 1)
    monkeypatch.setattr(filesystem, "clone", lambda *_: False)
    written: list[object] = []
    monkeypatch.setattr(filesystem, "write_at", lambda *arguments: written.append(arguments))
    assert apply(manifest, out, "--link", link) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"swsurgery: not enough disk space: the copy needs {blocks * BLOCK} bytes, {(blocks - 1) * BLOCK} are free: "
        f"{tmp_path} (free some space, or write to another file system)"
    )
    assert not written and names(tmp_path) == {"base", "m.json"}


def test_a_copy_that_just_fits_is_made(manifest, out, tmp_path, left):
    left(needed(tmp_path / "base"))
    assert apply(manifest, out, "--link", "copy") == 0


def test_a_reversion_asks_too(manifest, out, tmp_path, left, capsys):
    assert apply(manifest, out) == 0
    left(1)
    assert main(["revert", str(out), "-o", str(tmp_path / "back"), "--link", "copy", "--quiet"]) == 2
    assert "not enough disk space" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_hard_links_need_room_for_the_edited_shards_only(manifest, out, left, tmp_path):
    blocks = needed(tmp_path / "base", *(names(tmp_path / "base") - {SECOND}), "empty")
    left(blocks - 1)
    assert apply(manifest, out, "--link", "hard") == 2
    left(blocks)
    assert apply(manifest, out, "--link", "hard") == 0


@pytest.mark.parametrize(("link", "code"), [("auto", 0), ("copy", 2)])
def test_clones_need_none(manifest, out, tmp_path, left, monkeypatch, link, code):
    def clone(base: int, new: int) -> bool:
        os.pwrite(new, os.pread(base, 1 << 20, 0), 0)
        return True

    monkeypatch.setattr(filesystem, "clone", clone)
    left(0)
    assert apply(manifest, out, "--link", link) == code
    assert names(tmp_path) == {"base", "m.json"} | ({"out"} if code == 0 else set())


def test_what_a_killed_run_left_gives_its_room_back(manifest, out, tmp_path, left):
    killed("editing.apply.write_own_files", "apply", manifest, "-o", out, "--check", "off", "--link", "copy")
    taken = sum(p.stat().st_blocks for p in (tmp_path / ".out.partial").rglob("*") if p.is_file())
    assert taken > 0
    left(max(0, needed(tmp_path / "base") - taken))
    assert apply(manifest, out, "--link", "copy") == 0


def test_what_a_killed_run_left_is_kept_if_there_is_no_room(manifest, out, tmp_path, left):
    killed("editing.apply.write_own_files", "apply", manifest, "-o", out, "--check", "off", "--link", "copy")
    stage = tmp_path / ".out.partial"
    (stage / THIRD).unlink()
    (stage / FIRST).unlink()
    os.truncate(tmp_path / "base" / "README.md", 1 << 22)
    before = tree(stage)
    left(1)
    assert apply(manifest, out, "--link", "copy") == 2
    assert tree(stage) == before and SECOND in before
    left(1 << 20)
    assert apply(manifest, out, "--link", "copy") == 0


def test_a_file_system_that_does_not_say_how_large_it_is_is_written_to(manifest, out, left):
    left(0, of=0)
    assert apply(manifest, out, "--link", "copy") == 0
