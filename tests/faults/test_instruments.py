"""The instruments themselves: they hit what they aim at, and see what is wrong when something is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import FIRST

import swsurgery
from faults import disks, tracing
from faults.cases import PACKAGE, Stage, Workshop, case, misreported, prepare
from faults.tracing import Done, Point, Start

traced = pytest.mark.skipif(bool(tracing.missing()), reason=tracing.missing())

WRITER = """
import os
for name in ("a", "b"):
    fd = os.open(name, os.O_WRONLY | os.O_CREAT)
    os.write(fd, b"text")
    os.fsync(fd)
    os.close(fd)
os.mkdir("c")
"""


def written(folder: Path) -> Start:
    return tracing.executed([sys.executable, "-S", "-c", WRITER], os.environ, folder)


@traced
def test_a_run_is_counted_call_by_call(tmp_path):
    points, done = tracing.count(written(tmp_path), tmp_path, tmp_path)
    assert [(p.call, p.file) for p in points] == [
        *((call, "a") for call in ("openat", "write", "fsync")),
        *((call, "b") for call in ("openat", "write", "fsync")),
        ("mkdir", "c"),
    ]
    assert done.code == 0


@traced
def test_a_process_is_killed_before_the_call_and_not_after(tmp_path):
    tracing.kill(written(tmp_path), tmp_path, tmp_path, Point("write", 2, "b"))
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "text", "b": ""}


@traced
def test_a_call_fails_with_the_code_asked_for(tmp_path):
    done = tracing.fail(written(tmp_path), tmp_path, tmp_path, Point("fsync", 2, "b"), "ENOSPC")
    assert done.code == 1
    assert "No space left on device" in done.err


@traced
def test_a_fault_that_hits_another_call_is_no_result(tmp_path):
    with pytest.raises(tracing.Shifted, match="fsync #2 on a"):
        tracing.kill(written(tmp_path), tmp_path, tmp_path, Point("fsync", 2, "a"))


def test_what_is_wrong_after_a_fault_is_seen(tmp_path):
    """The twin: nothing is wrong with an undisturbed run."""
    stage = Stage(prepare(case("copy"), tmp_path / "prepare"), tmp_path / "stage")
    stage.reset()
    assert stage.broken() == stage.unfinished() == []
    shard = stage.target / FIRST
    shard.write_bytes(shard.read_bytes()[:-1])
    assert stage.broken() == [f"the target is neither old nor new: not new: {FIRST}"]
    stage.reset()
    (stage.shop.room / ".stray").touch()
    assert stage.unfinished() == ["run again, it left .stray"]
    stage.reset()
    os.utime(stage.shop.room / "base" / FIRST)
    assert stage.others_changed() == [f"base/{FIRST} changed, which is not the target"]


@pytest.mark.parametrize(
    ("code", "err", "faults"),
    [
        (2, "swsurgery: cannot write: here\n", 0),
        (0, "swsurgery: cannot write: here\n", 1),
        (2, "", 1),
        (2, "swsurgery: one\nswsurgery: two\n", 1),
        (3, "Traceback (most recent call last):\n  ValueError\n", 2),
    ],
)
def test_an_error_that_is_told_badly_is_seen(code, err, faults):
    assert len(misreported(Done(code, "", err))) == faults


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_power_cut_takes_what_was_not_synced_and_nothing_else(kind, tmp_path):
    if reason := disks.no_power_cut(kind):
        pytest.skip(reason)
    with disks.disk(kind, tmp_path) as disk:
        (disk.mount / "kept").write_text("synced")
        disk.sync()
        (disk.mount / "lost").write_text("not synced")
        disk.cut()
        assert sorted(p.name for p in disk.mount.iterdir() if p.name != "lost+found") == ["kept"]
        assert (disk.mount / "kept").read_text() == "synced"


def test_what_is_run_is_the_tree_under_test_whatever_is_installed(tmp_path):
    for package in (Workshop(tmp_path).package, prepare(case("copy"), tmp_path / "prepare").package):
        assert package == PACKAGE
    words = [sys.executable, "-P", "-c", "import swsurgery; print(swsurgery.__file__)"]
    done = subprocess.run(words, env=Workshop(tmp_path).env, cwd="/", capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == Path(swsurgery.__file__)
