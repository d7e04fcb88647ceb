"""An edit in place that was cut off: the next command, whichever it is, puts the old bytes back, or says why not."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoints import FIRST, HEAD, SECOND, THIRD, down, place, sha256, tree, write_llama, write_manifest
from killed import killed, names, run

import swsurgery
from swsurgery.checkpoint import journal, journal_format
from swsurgery.checkpoint.journal_format import Journal, JournalFile, parse_journal
from swsurgery.cli import main
from swsurgery.editing import in_place as in_place_module
from swsurgery.errors import CheckpointError, SwsurgeryError, TargetError
from swsurgery.storage.folder import Folder
from swsurgery.storage.names import JOURNAL, JOURNAL_NEW, OWN_FILES, ROOM, WORKING_FILES

ZERO = {"op": "zero", "layer": 1, "row": 2, "col": 3}
SET = {"op": "set", "tensor": HEAD, "index": [11, 5], "value": 1.0}
TOLD = "swsurgery: an edit in place had been cut off; the old bytes were put back: {}\n"


@pytest.fixture
def base(tmp_path) -> Path:
    return write_llama(tmp_path / "base")


@pytest.fixture
def manifest(base, tmp_path) -> Path:
    record = {"path": str(base), "sha256": {name: sha256(base / name) for name in (FIRST, SECOND, THIRD)}}
    return write_manifest(tmp_path / "m.json", record, ZERO, SET)


def in_place(manifest: Path) -> tuple[str, ...]:
    return ("apply", str(manifest), "--in-place", "--check", "off")


class Killed(BaseException):
    """Stands for SIGKILL where a process of its own for each test would take long."""


@pytest.fixture
def cut_off(base, manifest, monkeypatch) -> dict[str, bytes]:
    """The base with both shards edited and a hot journal; gives what it held before."""
    before = tree(base)

    def stop(*arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(in_place_module, "run_check", stop)
        patch.setattr(journal, "_take_back", lambda *arguments: None)
        swsurgery.apply(manifest, in_place=True)
    assert tree(base)[SECOND] != before[SECOND] and tree(base)[THIRD] != before[THIRD]
    assert {JOURNAL, ROOM} <= names(base)
    return before


# --- whenever it is killed


@pytest.mark.parametrize(
    ("at", "number", "after"),
    [
        ("storage.filesystem.reserve", 1, True),
        ("storage.filesystem.write_file", 1, True),
        ("storage.filesystem.rename_new", 1, True),
        ("storage.filesystem.write_at", 1, True),
        ("storage.filesystem.write_at", 3, True),
        ("storage.filesystem.os.replace", 2, False),
        ("storage.filesystem.replace_file", 3, True),
        ("storage.filesystem.remove_file", 1, True),
        ("storage.filesystem.remove_file", 2, False),
    ],
)
def test_a_killed_edit_is_undone_and_can_be_made_again(base, manifest, at, number, after):
    before = tree(base)
    killed(at, *in_place(manifest), number=number, after=after)
    assert names(base) & set(WORKING_FILES)
    assert main(["inspect", str(base)]) == 0
    assert tree(base) == before
    assert main(list(in_place(manifest))) == 0
    assert swsurgery.verify(base).ok
    assert not names(base) & set(WORKING_FILES)


def test_killed_after_the_journal_is_gone_it_is_done(base, manifest):
    """The other side of the moment that decides."""
    before = tree(base)
    killed("storage.filesystem.remove_file", *in_place(manifest), number=2, after=True)
    assert not names(base) & set(WORKING_FILES)
    assert tree(base) != before and swsurgery.verify(base).ok
    done = run(*in_place(manifest))
    assert (done.returncode, done.stderr) == (0, "swsurgery: the manifest was already applied; nothing was written\n")


def test_a_killed_second_step_leaves_the_first(base, manifest, tmp_path):
    assert main(list(in_place(manifest))) == 0
    before = tree(base)
    second = write_manifest(tmp_path / "second.json", base, {"op": "zero", "layer": 1, "row": 0, "col": 0})
    killed("storage.filesystem.replace_file", *in_place(second), number=2, after=True)
    assert {n: d for n, d in tree(base).items() if n in OWN_FILES} != {n: before[n] for n in OWN_FILES}
    assert main(["verify", str(base)]) == 0
    assert tree(base) == before


def test_a_recovery_that_is_killed_is_made_again(base, cut_off):
    killed("storage.filesystem.write_at", "inspect", base, after=True)
    assert (base / JOURNAL).exists()
    assert main(["inspect", str(base)]) == 0
    assert tree(base) == cut_off


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
@pytest.mark.parametrize("command", ["inspect", "verify", "revert", "apply"])
def test_a_journal_that_cannot_be_seen_is_not_taken_for_none(
    base, manifest, cut_off, monkeypatch, capsys, command, code
):
    """Nor a new edit be made on top of half an old one, whose old bytes would then be lost."""
    before, true = tree(base), os.lstat

    def lstat(path, *arguments, **more):
        if os.path.basename(path) == JOURNAL:
            raise OSError(code, os.strerror(code))
        return true(path, *arguments, **more)

    words = list(in_place(manifest)) if command == "apply" else [command, str(base)]
    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", lstat)
        assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert os.strerror(code) in line and JOURNAL in line
    assert JOURNAL in names(base) and tree(base)[SECOND] == before[SECOND]
    assert main(["inspect", str(base)]) == 0
    assert tree(base) == cut_off, "the twin: seen, it is undone"


@pytest.mark.parametrize("command", ["revert", "verify"])
def test_a_killed_revert_leaves_the_patched_checkpoint_until_it_is_made_again(base, manifest, command, capsys):
    before = tree(base)
    assert main(list(in_place(manifest))) == 0
    patched = tree(base)
    killed("storage.filesystem.remove_file", "revert", base, number=2, after=True)
    assert tree(base) not in (before, patched)
    assert main([command, str(base)]) == 0
    assert tree(base) == (before if command == "revert" else patched), "what it says that it did is what it did"


# --- whichever command comes next


@pytest.mark.parametrize(
    "command",
    [("verify", "{base}"), ("verify", "{base}", "--known"), ("inspect", "{base}"), ("lookup", "{base}"),
     ("inspect", "{base}", "--tensor", HEAD, "--at", "0,0"), ("diff", "{base}", "{base}"), ("diff", "{twin}", "{base}"),
     ("revert", "{base}"), ("revert", "{base}", "-o", "{out}"), ("apply", "{manifest}", "--dry-run"),
     ("apply", "{manifest}", "-o", "{out}", "--check", "off")],
    ids=" ".join,
)  # fmt: skip
def test_the_next_command_puts_the_old_bytes_back_and_says_so(base, manifest, tmp_path, cut_off, capsys, command):
    shutil.copytree(base, tmp_path / "twin", ignore=shutil.ignore_patterns(*WORKING_FILES, *OWN_FILES))
    capsys.readouterr()
    paths = {"base": base, "manifest": manifest, "out": tmp_path / "out", "twin": tmp_path / "twin"}
    main([word.format(**paths) for word in command])
    told = capsys.readouterr().err.splitlines(keepends=True)
    assert told.count(TOLD.format(base)) == 1
    assert tree(base) == cut_off
    assert names(base) == {name.split("/")[0] for name in cut_off}


def test_the_same_command_undoes_and_does_it(base, manifest, cut_off):
    done = run(*in_place(manifest))
    assert (done.returncode, done.stderr) == (0, TOLD.format(base))
    assert swsurgery.verify(base).ok
    assert {n: d for n, d in tree(base).items() if n in cut_off and d != cut_off[n]}.keys() == {SECOND, THIRD}


def test_a_copy_of_what_was_cut_off_is_a_copy_of_the_base(base, manifest, tmp_path, cut_off):
    assert main(["apply", str(manifest), "-o", str(tmp_path / "out"), "--check", "off"]) == 0
    assert swsurgery.verify(tmp_path / "out", base=base).ok
    assert not names(tmp_path / "out") & set(WORKING_FILES)


def test_where_nothing_was_cut_off_nothing_is_said_or_written(base, caplog):
    """The no-op twin."""
    times = {p: p.stat().st_mtime_ns for p in (base, *base.iterdir())}
    with caplog.at_level(logging.DEBUG):
        assert journal.recover(Folder.at(base)) is None
    assert caplog.messages == []
    assert {p: p.stat().st_mtime_ns for p in (base, *base.iterdir())} == times


@pytest.mark.parametrize("name", [n for n in WORKING_FILES if n != JOURNAL])
def test_leftovers_without_a_journal_are_removed_without_a_word(base, capsys, name):
    before = tree(base)
    (base / name).write_bytes(b"half of it")
    assert main(["inspect", str(base)]) == 0
    assert capsys.readouterr().err == ""
    assert tree(base) == before


def test_working_files_are_no_part_of_a_copy(base, manifest, tmp_path):
    (base / ROOM).write_bytes(b"\0")
    (base / "assets" / JOURNAL).write_text("a file of the model's own, below the top")
    assert main(["apply", str(manifest), "-o", str(tmp_path / "out"), "--check", "off"]) == 0
    assert not names(tmp_path / "out") & set(WORKING_FILES)
    assert (tmp_path / "out" / "assets" / JOURNAL).exists()


def test_only_what_differs_is_written(base, cut_off, monkeypatch):
    """Where the disk is full, writing nothing is what succeeds."""
    offset, size = place(base / SECOND, down(1), (2, 3))
    with open(base / SECOND, "r+b") as file:
        file.seek(offset)
        file.write(cut_off[SECOND][offset : offset + size])
    written = []
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: written.append(bytes(data)) or len(data))
    assert main(["inspect", str(base)]) == 0
    at = place(base / THIRD, HEAD, (11, 5))
    assert written == [cut_off[THIRD][at[0] : at[0] + at[1]]]


# --- journals that cannot be trusted


def seal(body: bytes) -> bytes:
    return body + hashlib.sha256(body).hexdigest().encode() + b"\n"


def altered(raw: bytes, change: Callable[[dict], object]) -> bytes:
    document = json.loads(raw[:-65])
    change(document)
    return seal(json.dumps(document).encode() + b"\n")


def file_of(document: dict) -> dict:
    return document["files"][SECOND]


MALFORMED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "truncated at the end": lambda raw: raw[:-1],
    "truncated in the middle": lambda raw: raw[: len(raw) // 2],
    "longer": lambda raw: raw + b"\n",
    "one bit": lambda raw: bytes([raw[0] ^ 1]) + raw[1:],
    "another checksum": lambda raw: raw[:-65] + b"0" * 64 + b"\n",
    "not JSON": lambda raw: seal(b"{"),
    "not UTF-8": lambda raw: seal(b'{"a": "\xff"}'),
    "a list": lambda raw: seal(b"[]"),
    "nested": lambda raw: seal(b"[" * 100_000),
    "a key twice": lambda raw: seal(b'{"version": 1, "version": 1}'),
    "another version": lambda raw: altered(raw, lambda d: d.update(version=3)),
    "a version that is true": lambda raw: altered(raw, lambda d: d.update(version=True)),
    "a field too many": lambda raw: altered(raw, lambda d: d.update(more=1)),
    "a field too few": lambda raw: altered(raw, lambda d: d.pop("own")),
    "an own file too few": lambda raw: altered(raw, lambda d: d["own"].pop(OWN_FILES[0])),
    "a path": lambda raw: altered(raw, lambda d: d["files"].update({"../base/" + SECOND: file_of(d)})),
    "an absolute path": lambda raw: altered(raw, lambda d: d["files"].update({"/tmp/x.safetensors": file_of(d)})),
    "dots": lambda raw: altered(raw, lambda d: d["files"].update({"..": file_of(d)})),
    "no shard": lambda raw: altered(raw, lambda d: d["files"].update({"config.json": file_of(d)})),
    "a shard that is not there": lambda raw: altered(raw, lambda d: d["files"].update({"x.safetensors": file_of(d)})),
    "beyond the end": lambda raw: altered(raw, lambda d: file_of(d).update(offsets=[10**6])),
    "across the end": lambda raw: altered(raw, lambda d: file_of(d).update(offsets=[file_of(d)["size"] - 1])),
    "far beyond the end": lambda raw: altered(raw, lambda d: file_of(d).update(offsets=[(1 << 63) - 1])),
    "before the beginning": lambda raw: altered(raw, lambda d: file_of(d).update(offsets=[-2])),
    "a fraction": lambda raw: altered(raw, lambda d: file_of(d).update(offsets=[2.5])),
    "no bytes": lambda raw: altered(raw, lambda d: file_of(d).update(sizes=[0], old="", new="")),
    "half a byte": lambda raw: altered(raw, lambda d: file_of(d).update(old="abc")),
    "more old bytes": lambda raw: altered(raw, lambda d: file_of(d).update(old="00" * 9)),
    "fewer new bytes": lambda raw: altered(raw, lambda d: file_of(d).update(new="00")),
    "more sizes": lambda raw: altered(raw, lambda d: file_of(d).update(sizes=[1, 1])),
    "overlapping places": lambda raw: altered(raw, lambda d: file_of(d).update(offsets=[300, 300], sizes=[1, 1])),
    "falling places": lambda raw: altered(raw, lambda d: file_of(d).update(offsets=[300, 200], sizes=[1, 1])),
    "no hex": lambda raw: altered(raw, lambda d: file_of(d).update(old="zzzz")),
    "another size": lambda raw: altered(raw, lambda d: file_of(d).update(size=1)),
    "another file": lambda raw: altered(raw, lambda d: file_of(d).update(inode=1)),
    "another directory": lambda raw: altered(raw, lambda d: d.update(inode=1)),
    "a file of others": lambda raw: altered(raw, lambda d: d["own"].update({"config.json": None})),
    "own bytes that are missing": lambda raw: altered(raw, lambda d: d["own"].update({OWN_FILES[0]: 5})),
    "bytes of no file": lambda raw: seal(raw[:-65] + b"more"),
    "made, and no digest": lambda raw: altered(raw, lambda d: d.update(made={OWN_FILES[0]: "0"})),
}


@pytest.mark.parametrize("damage", MALFORMED.values(), ids=MALFORMED)
def test_a_journal_that_cannot_be_trusted_is_refused_and_nothing_is_written(base, cut_off, capsys, damage):
    (base / JOURNAL).write_bytes(damage((base / JOURNAL).read_bytes()))
    before = {n: d for n, d in tree(base).items() if n != ROOM}
    for command in (["inspect", str(base)], ["verify", str(base)]):
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert str(base) in line or JOURNAL in line
        assert {n: d for n, d in tree(base).items() if n != ROOM} == before


def test_the_journal_as_it_was_written_is_taken(base, cut_off):
    """The twin of the above: the same steps with no damage."""
    raw = (base / JOURNAL).read_bytes()
    (base / JOURNAL).write_bytes(altered(raw, lambda document: None))
    assert main(["inspect", str(base)]) == 0
    assert tree(base) == cut_off


# --- journals of version 1


def version_1(base: Path, before: dict[str, bytes]) -> bytes:
    """The journal that 0.1.0 writes for this edit."""
    places = {SECOND: place(base / SECOND, down(1), (2, 3)), THIRD: place(base / THIRD, HEAD, (11, 5))}
    files = {
        name: {
            "inode": (base / name).stat().st_ino, "size": (base / name).stat().st_size,
            "places": [{"offset": at, "old": before[name][at : at + size].hex()}],
        }
        for name, (at, size) in places.items()
    }  # fmt: skip
    own = {name: base64.b64encode(before[name]).decode() if name in before else None for name in OWN_FILES}
    document = {"version": 1, "reverts": False, "inode": base.stat().st_ino, "files": files, "own": own}
    return seal(json.dumps(document, sort_keys=True).encode() + b"\n")


def test_a_journal_of_version_1_is_recovered(base, cut_off, capsys):
    (base / JOURNAL).write_bytes(version_1(base, cut_off))
    assert main(["inspect", str(base)]) == 0
    assert capsys.readouterr().err == TOLD.format(base)
    assert tree(base) == cut_off


def test_own_files_in_a_journal_of_version_1_are_put_back(base, manifest, tmp_path, cut_off):
    """As it is after a second step was cut off: the contents of the first step are in base64."""
    assert main(list(in_place(manifest))) == 0
    before = tree(base)
    (base / JOURNAL).write_bytes(version_1(base, before))
    (base / OWN_FILES[0]).write_bytes(b"half of the second step")
    (base / OWN_FILES[2]).unlink()
    assert main(["inspect", str(base)]) == 0
    assert tree(base) == before


PLACES = "places"
MALFORMED_1: dict[str, Callable[[bytes], bytes]] = {
    "beyond the end": lambda raw: altered(raw, lambda d: file_of(d)[PLACES][0].update(offset=10**6)),
    "across the end": lambda raw: altered(raw, lambda d: file_of(d)[PLACES][0].update(offset=file_of(d)["size"] - 1)),
    "before the beginning": lambda raw: altered(raw, lambda d: file_of(d)[PLACES][0].update(offset=-2)),
    "no bytes": lambda raw: altered(raw, lambda d: file_of(d)[PLACES][0].update(old="")),
    "half a byte": lambda raw: altered(raw, lambda d: file_of(d)[PLACES][0].update(old="abc")),
    "many bytes": lambda raw: altered(raw, lambda d: file_of(d)[PLACES][0].update(old="00" * 9)),
    "new bytes": lambda raw: altered(raw, lambda d: file_of(d)[PLACES][0].update(new="0000")),
    "a path": lambda raw: altered(raw, lambda d: d["files"].update({"../base/" + SECOND: file_of(d)})),
    "another size": lambda raw: altered(raw, lambda d: file_of(d).update(size=1)),
    "another file": lambda raw: altered(raw, lambda d: file_of(d).update(inode=1)),
    "no base64": lambda raw: altered(raw, lambda d: d["own"].update({OWN_FILES[0]: "!"})),
    "something behind its line": lambda raw: seal(raw[:-65] + b"more"),
}


@pytest.mark.parametrize("damage", MALFORMED_1.values(), ids=MALFORMED_1)
def test_a_journal_of_version_1_that_cannot_be_trusted_is_refused(base, cut_off, capsys, damage):
    (base / JOURNAL).write_bytes(damage(version_1(base, cut_off)))
    before = tree(base)
    assert main(["inspect", str(base)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(base) in line or JOURNAL in line
    assert tree(base) == before


# --- what another program wrote meanwhile


def write_at(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def foreign_weights(base: Path) -> str:
    """Copy other weights over the file, which keeps its inode."""
    at, size = place(base / SECOND, down(1), (2, 3))
    write_at(base / SECOND, 0, b"\x5a" * (base / SECOND).stat().st_size)
    return f"{base / SECOND} at byte {at}"


def foreign_byte(base: Path) -> str:
    """One byte of one scalar is neither the old nor the new one."""
    at, _ = place(base / THIRD, HEAD, (11, 5))
    write_at(base / THIRD, at, b"\x5a")
    return f"{base / THIRD} at byte {at}"


def foreign_record(base: Path) -> str:
    (base / OWN_FILES[0]).write_text("{}")
    return str(base / OWN_FILES[0])


@pytest.mark.parametrize("change", [foreign_weights, foreign_byte, foreign_record])
@pytest.mark.parametrize("command", ["inspect", "verify", "revert", "apply"])
def test_recovery_writes_nothing_over_what_another_program_wrote(base, manifest, cut_off, capsys, change, command):
    where = change(base)
    before = tree(base)
    assert main(list(in_place(manifest)) if command == "apply" else [command, str(base)]) == 2
    assert capsys.readouterr().err == (
        "swsurgery: an edit in place was cut off, and another program has written to the edited files since: "
        f"{where} (restore the files from the base, or remove {base / JOURNAL} to keep them as they are)\n"
    )
    assert tree(base) == before


def test_the_remedies_of_that_report_work(base, cut_off):
    foreign_weights(base)
    (base / SECOND).write_bytes(cut_off[SECOND])  # the same inode
    assert main(["inspect", str(base)]) == 0
    assert tree(base) == cut_off
    foreign_weights(base)
    before = tree(base)
    (base / ROOM).write_bytes(b"")
    assert main(["inspect", str(base)]) == 2, "no journal, and it is no checkpoint"
    assert tree(base) == before, "without a journal nothing is put back"


@pytest.mark.parametrize("torn", ["the first byte", "the second byte", "all", "none"])
def test_a_torn_scalar_is_put_back(base, cut_off, torn):
    """A power cut may leave the bytes of one scalar old in one sector and new in the next."""
    at, size = place(base / THIRD, HEAD, (11, 5))
    old = cut_off[THIRD][at : at + size]
    now = {"the first byte": old[:1] + b"\x3f", "the second byte": b"\x80" + old[1:], "all": old, "none": b"\x80\x3f"}
    assert old[:1] != b"\x80" and old[1:] != b"\x3f"
    write_at(base / THIRD, at, now[torn])
    assert main(["inspect", str(base)]) == 0
    assert tree(base) == cut_off


def test_own_files_are_known_by_what_the_journal_says_of_them(base, manifest, cut_off, tmp_path):
    """From the moment they are written, the journal has the digests of their new contents."""
    assert main(["inspect", str(base)]) == 0
    killed("storage.filesystem.remove_file", *in_place(manifest), number=2, after=False)
    raw = (base / JOURNAL).read_bytes()
    assert json.loads(raw[:-65])["made"] == {name: sha256(base / name) for name in OWN_FILES}
    new = tree(base)
    (base / OWN_FILES[1]).unlink()  # as before the edit
    assert main(["inspect", str(base)]) == 0
    assert tree(base) == cut_off
    for name, data in new.items():
        (base / name).write_bytes(data)  # the shards keep their inodes
    (base / JOURNAL).write_bytes(raw)
    (base / OWN_FILES[1]).write_bytes(b"another program's")
    assert main(["inspect", str(base)]) == 2
    assert (base / OWN_FILES[1]).read_bytes() == b"another program's" and tree(base)[SECOND] == new[SECOND]


def test_a_huge_journal_is_refused(base, cut_off, capsys):
    before = tree(base)[SECOND]
    os.truncate(base / JOURNAL, 1 << 40)
    assert main(["inspect", str(base)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert tree_of_shards(base)[SECOND] == before
    os.truncate(base / JOURNAL, 0)


def tree_of_shards(base: Path) -> dict[str, bytes]:
    return {name: (base / name).read_bytes() for name in (FIRST, SECOND, THIRD)}


@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_what_is_no_file_is_no_journal(base, tmp_path, cut_off, capsys, kind):
    (base / JOURNAL).rename(tmp_path / "journal")
    if kind == "link":
        (base / JOURNAL).symlink_to(tmp_path / "journal")
    elif kind == "fifo":
        os.mkfifo(base / JOURNAL)
    else:
        (base / JOURNAL).mkdir()
    before = tree_of_shards(base)
    assert main(["inspect", str(base)]) == 2
    assert JOURNAL in capsys.readouterr().err
    assert tree_of_shards(base) == before


def test_a_shard_that_became_a_link_is_not_written_through(base, tmp_path, cut_off, capsys):
    (base / SECOND).rename(tmp_path / "elsewhere")
    (base / SECOND).symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere").read_bytes()
    assert main(["inspect", str(base)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert (tmp_path / "elsewhere").read_bytes() == before


def test_a_copied_directory_is_refused_and_revert_takes_it(base, tmp_path, cut_off, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    before = tree(copy)
    for command in ("inspect", "verify"):
        assert main([command, str(copy)]) == 2
        assert capsys.readouterr().err == (
            f"swsurgery: an edit in place was cut off before this directory was copied here: {copy} "
            f"(to put the old bytes back, run: swsurgery revert {copy})\n"
        )
    assert {n: d for n, d in tree(copy).items() if n != ROOM} == {n: d for n, d in before.items() if n != ROOM}
    assert main(["revert", str(copy)]) == 0
    assert capsys.readouterr().err.startswith(TOLD.format(copy))
    assert tree(copy) == cut_off
    assert (base / JOURNAL).exists(), "the other one is left alone"


def test_a_renamed_directory_is_the_same_one(base, tmp_path, cut_off):
    base.rename(tmp_path / "renamed")
    assert main(["inspect", str(tmp_path / "renamed")]) == 0
    assert tree(tmp_path / "renamed") == cut_off


# --- what cannot be undone now


@pytest.fixture
def read_only(base, cut_off) -> Iterator[Path]:
    """The directory, seen through a mount that nobody can write."""
    folder = base.parent / "mounted"
    folder.mkdir()
    for options in (["--bind", str(base), str(folder)], ["-o", "remount,ro,bind", str(folder)]):
        done = subprocess.run(["mount", *options], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_read_only_directory_is_told_in_one_line(read_only, base, cut_off, capsys):
    before = tree(base)
    assert main(["inspect", str(read_only)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "an edit in place was cut off and could not be undone yet" in line and "Read-only file system" in line
    assert tree(base) == before
    assert main(["inspect", str(base)]) == 0
    assert tree(base) == cut_off


def test_an_undoing_that_fails_keeps_the_journal(base, cut_off, monkeypatch, capsys):
    def broken(*arguments: object) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", broken)
        assert main(["inspect", str(base)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "could not be undone yet" in line and "Input/output error" in line
    assert (base / JOURNAL).exists()
    assert main(["inspect", str(base)]) == 0
    assert tree(base) == cut_off


def test_an_undoing_that_cannot_be_synced_is_not_done(base, cut_off, monkeypatch):
    def broken(fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(TargetError, match="could not be undone yet"):
            journal.recover(Folder.at(base))
    assert (base / JOURNAL).exists()


def test_a_journal_that_could_not_be_read_back_is_not_begun_with(base, manifest, tmp_path, monkeypatch, capsys):
    """A record of tens of megabytes would make one."""
    assert main(list(in_place(manifest))) == 0
    before = tree(base)
    limit = sum(len(before[name]) for name in OWN_FILES)
    monkeypatch.setattr(journal_format, "MAX_JOURNAL", limit)
    second = write_manifest(tmp_path / "second.json", base, {"op": "zero", "layer": 1, "row": 0, "col": 0})
    capsys.readouterr()
    assert main(list(in_place(second))) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert tree(base) == before


def test_the_numbers_of_files_may_have_64_bits(base, tmp_path):
    """As overlay file systems give them."""
    files = {SECOND: JournalFile((1 << 64) - 1, 0, [])}
    raw = Journal(2, False, (1 << 64) - 1, files, dict.fromkeys(OWN_FILES)).render()
    read = parse_journal(raw, Folder.at(base) / JOURNAL)
    assert read.inode == read.files[SECOND].inode == (1 << 64) - 1


# --- the block itself


def test_the_journal_holds_what_undoing_needs(base, cut_off):
    raw = (base / JOURNAL).read_bytes()
    assert raw[-65:] == hashlib.sha256(raw[:-65]).hexdigest().encode() + b"\n"
    document = json.loads(raw[:-65])
    offset, size = place(base / SECOND, down(1), (2, 3))
    assert document["files"][SECOND] == {
        "inode": (base / SECOND).stat().st_ino, "size": (base / SECOND).stat().st_size, "offsets": [offset],
        "sizes": [size], "old": cut_off[SECOND][offset : offset + size].hex(), "new": "0000",
    }  # fmt: skip
    assert document["version"] == 2 and document["made"] is None
    assert document["own"] == dict.fromkeys(OWN_FILES)
    assert (base / ROOM).stat().st_blocks * 512 >= journal.ROOM_BYTES


def test_own_files_are_put_back_as_they_were(base):
    """Also such as are no record: the block does not know what it writes."""
    (base / OWN_FILES[1]).write_bytes(b"\0\xff")
    before = tree(base)
    with pytest.raises(CheckpointError), journal.apply_splices(Folder.at(base), {}, []) as own:
        line, _, rest = (base / JOURNAL).read_bytes()[:-65].partition(b"\n")
        assert json.loads(line)["own"] == {**dict.fromkeys(OWN_FILES), OWN_FILES[1]: 2}
        assert rest == b"\0\xff"
        own[OWN_FILES[0]] = b"new"
        raise CheckpointError("stop")
    assert tree(base) == before
    with journal.apply_splices(Folder.at(base), {}, []) as own:
        own |= {OWN_FILES[0]: b"new", OWN_FILES[1]: None}
    assert tree(base) == {**{n: d for n, d in before.items() if n != OWN_FILES[1]}, OWN_FILES[0]: b"new"}


def test_whatever_is_raised_nothing_of_the_work_is_left(base):
    for error in (SwsurgeryError("known"), KeyError("a bug"), KeyboardInterrupt()):
        before = tree(base)
        with pytest.raises(type(error)), journal.apply_splices(Folder.at(base), {}, []):
            assert JOURNAL in names(base) and JOURNAL_NEW not in names(base)
            raise error
        assert tree(base) == before
