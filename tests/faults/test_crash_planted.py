"""Nine bugs planted into the product: each is found, by the technique that is made for it."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from faults.crash_cases import sweep
from faults.crash_room import TASKS, opened_room
from faults.planted import BUGS, bug, copy_with, planted

FOUND_BY = {
    "no fsync of files": ("crash, journal", "copy"),
    "no fsync of the directory": ("crash, no order", "edit in place"),
    "written straight into the target": ("crash, journal", "copy"),
    "in place without a journal": ("crash, journal", "edit in place"),
    "journal not synced": ("crash, no order", "edit in place"),
    "journal dropped too early": ("crash, no order", "edit in place"),
    "fsync error swallowed": ("EIO", "copy"),
    "one write assumed complete": ("short transfers", "copy"),
    "no lock": ("a second run", "copy"),
}
"""Bug -> the technique and the task that find it."""


@pytest.fixture(scope="module")
def room():
    with opened_room() as room:
        yield room


@pytest.mark.parametrize("name", FOUND_BY)
def test_a_planted_bug_is_found(room, name):
    technique, task = FOUND_BY[name][0], next(t for t in TASKS if t.name == FOUND_BY[name][1])
    room.recordings.pop(task.name, None)
    try:
        with planted(name):
            assert sweep(room, task, technique, until_found=True).violations
    finally:
        room.recordings.pop(task.name, None)


def test_every_bug_is_tried():
    assert list(FOUND_BY) == [b.name for b in BUGS]
    assert len({b.text() for b in BUGS}) == len(BUGS) == 9


def test_a_planted_bug_is_gone_afterwards():
    def rooms() -> list[dict[str, object]]:
        return [dict(vars(importlib.import_module(b.module))) for b in BUGS]

    before = rooms()
    for b in BUGS:
        with planted(b.name):
            assert rooms() != before
        assert rooms() == before


def test_a_bug_is_refused_whose_place_is_gone(monkeypatch):
    name = "no lock"
    monkeypatch.setattr("faults.planted.BUGS", (type(bug(name))(name, "storage/filesystem.py", "import", ""),))
    with pytest.raises(AssertionError, match="its place occurs [0-9]+ times in storage/filesystem.py"):
        bug(name).text()


def test_a_copy_of_the_package_has_the_bug(tmp_path):
    folder = copy_with("no fsync of files", tmp_path / "with")
    code = (
        "import inspect; from swsurgery.storage import filesystem;"
        "print(filesystem.__file__, inspect.getsource(filesystem.sync))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(folder)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(str(folder)) and "pass" in done.stdout and "os.fsync" not in done.stdout
