"""Another program changes the checkpoint while it is edited in place: nothing of its work is lost or overwritten."""

from __future__ import annotations

import os
import signal

import pytest
from checkpoints import SECOND, tree
from faults import swaps
from faults.swaps import ACTS, MOMENTS, Room, in_link, refused
from killed import names, signalled

from swsurgery.storage.names import JOURNAL, WORKING_FILES


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
@pytest.mark.parametrize(
    ("revert", "moment"), [(r, m) for r in (False, True) for m in MOMENTS if not r or m != "during the check"]
)
def test_what_another_program_does_meanwhile_is_noticed_and_left(tmp_path, revert, moment, act):
    assert refused(Room(tmp_path, revert), moment, act) == []


@pytest.mark.parametrize("revert", [False, True], ids=["apply", "revert"])
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6])
def test_a_value_written_between_two_of_our_writes_is_not_lost(tmp_path, revert, number):
    """Each scalar is read through the descriptor that writes it, just before it is written."""
    room = Room(tmp_path, revert)

    def act(room: Room) -> None:
        # Two places of the first shard, and one of the second, are written twice: the old bytes, then the new ones.
        file, tensor, place = swaps.EDITED[(1, 0, 1, 2, 0, 1)[number - 1]]
        swaps.write(room, file, tensor, place, b"\x11\x22")

    faults = refused(room, "storage.filesystem.write_at", act, number)
    assert faults == []


@pytest.mark.parametrize("revert", [False, True], ids=["apply", "revert"])
@pytest.mark.parametrize("moment", [m for m in MOMENTS if m != "during the check"])
def test_nothing_is_written_behind_a_link_that_the_directory_became(tmp_path, revert, moment):
    assert in_link(Room(tmp_path, revert), moment) == []


def test_an_undisturbed_run_ends_well(tmp_path):
    """The twin of all the above: the same rooms, and nobody acts."""
    room = Room(tmp_path)
    assert room.command() == (0, [])
    assert tree(room.base)[SECOND] != room.before[SECOND]
    assert room.run("verify", str(room.base)) == (0, [])
    room.revert = True
    assert room.command() == (0, [])
    assert tree(room.base) == room.before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("at", "count", "after", "said"),
    [
        ("storage.filesystem.remove_file", 1, True, "put back"),
        ("storage.filesystem.remove_file", 2, False, "put back"),
        ("storage.filesystem.remove_file", 2, True, "made"),
        ("storage.filesystem.sync_directory", 4, False, "made"),
        ("storage.filesystem.sync_directory", 4, True, "made"),
        ("editing.in_place.Applied", 1, False, "made"),
        ("cli.show.show_applied", 1, False, "made"),
        ("storage.filesystem.reserve", 1, False, "nothing"),
        ("editing.in_place._describe_untouched", 1, True, "nothing"),
    ],
)
def test_a_signal_is_answered_with_what_was_done(tmp_path, at, count, after, said, number):
    room = Room(tmp_path)
    words = [word for word in room.apply if word != "--quiet"]
    done = signalled(number, at, *words, number=count, after=after)
    lines = {
        "put back": "the old bytes were put back",
        "made": f"the edit was made: {room.base}",
        "nothing": "nothing was left behind",
    }
    assert (done.returncode, done.stderr) == (130, f"swsurgery: interrupted: {number.name} ({lines[said]})\n")
    assert names(room.base) & set(WORKING_FILES) == set()
    if said == "made":
        assert room.run("verify", str(room.base)) == (0, [])
    else:
        assert tree(room.base) == room.before


@pytest.mark.parametrize(
    ("at", "count"), [("storage.filesystem.remove_file", 2), ("storage.filesystem.sync_directory", 4)]
)
def test_a_signal_after_a_reversion_says_that_it_was_made(tmp_path, at, count):
    room = Room(tmp_path)
    before = room.before
    assert room.command()[0] == 0
    count += 3 if at == "storage.filesystem.remove_file" else 0  # the own files are removed first
    done = signalled(signal.SIGINT, at, "revert", room.base, number=count, after=True)
    messages = [line for line in done.stderr.splitlines() if not line.endswith(" ...")]  # a slow machine shows progress
    assert messages == [f"swsurgery: interrupted: SIGINT (the base was put back: {room.base})"]
    assert done.returncode == 130 and tree(room.base) == before


def test_a_signal_whose_undoing_fails_says_so(tmp_path, monkeypatch):
    """The journal stays, and the next command undoes the edit."""
    room = Room(tmp_path)

    def signalled(room: Room) -> None:
        monkeypatch.setattr(os, "pwrite", broken)
        signal.raise_signal(signal.SIGINT)

    def broken(*arguments: object) -> int:
        raise OSError(5, "Input/output error")

    with swaps.acting(room, "editing.in_place.run_check", signalled):
        code, lines = room.command()
    monkeypatch.undo()
    assert code == 130 and len(lines) == 1
    failed = "an edit in place was cut off and could not be undone yet"
    assert lines[0].startswith(f"swsurgery: interrupted: SIGINT ({failed}")
    assert JOURNAL in names(room.base)
    assert room.run("inspect", str(room.base))[0] == 0
    assert tree(room.base) == room.before


def test_an_edit_whose_end_cannot_be_synced_is_reported_as_made(tmp_path, monkeypatch):
    room, true, calls = Room(tmp_path), os.fsync, []

    def failing(fd: int) -> None:
        if not names(room.base) & set(WORKING_FILES) and (room.base / "SHA256SUMS").exists():
            calls.append(fd)
            raise OSError(5, "Input/output error")
        true(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        code, lines = room.command()
    assert calls and code == 2
    assert lines == [
        f"swsurgery: the edit was made: {room.base}, but a power cut could still undo it (Input/output error) "
        "(repair or replace the disk, then run the same command again)"
    ]
    assert room.run("verify", str(room.base)) == (0, [])
