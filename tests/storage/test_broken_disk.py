"""A disk that fails while it is read: every command says so in one line, exit 2, and changes nothing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from checkpoints import down, tree, write_llama, write_manifest

from swsurgery import cli

COMMANDS = {
    "apply": ("apply", "m.json", "-o", "new", "--check", "off"),
    "apply in place": ("apply", "m.json", "--in-place", "--check", "off"),
    "plan": ("apply", "m.json", "--dry-run"),
    "revert": ("revert", "patched", "-o", "new"),
    "verify": ("verify", "patched"),
    "verify known": ("verify", "base", "--known", "--model", "mistral-7b"),
    "diff": ("diff", "base", "patched"),
    "inspect": ("inspect", "base", "--tensor", down(1), "--at", "2,3"),
    "export": ("export", "m.json", "--format", "sparse", "-o", "new"),
    "lint": ("lint", "m.json"),
}
CALLS = ("preadv", "pread", "read", "scandir", "listdir", "read_bytes")


def fail(monkeypatch: pytest.MonkeyPatch, call: str, room: Path) -> list[str]:
    """Let one way of reading fail below `room`, and on any descriptor; returns the calls that failed."""
    failed: list[str] = []
    owner = Path if call == "read_bytes" else os
    true = getattr(owner, call)

    def failing(where: object = ".", *arguments: object) -> object:
        path = None if isinstance(where, int) else Path(os.fsdecode(where))
        if path is not None and room not in path.absolute().parents:
            return true(where, *arguments)
        failed.append(call)
        raise OSError(errno.EIO, os.strerror(errno.EIO), None if path is None else str(path))

    monkeypatch.setattr(owner, call, failing)
    return failed


def make_room(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base, its manifest and a patched checkpoint, in the directory in which commands then run."""
    room.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(room / "cache"))
    monkeypatch.chdir(room)
    base = write_llama(room / "base")
    write_manifest(room / "m.json", base, {"op": "zero", "layer": 1, "row": 2, "col": 3})
    assert cli.main(["apply", "m.json", "-o", "patched", "--check", "off", "--quiet"]) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_a_failing_read_is_one_line(command, tmp_path, monkeypatch, capsys):
    seen = []
    for call in CALLS:
        room = tmp_path / call
        make_room(room, monkeypatch)
        before = tree(room / "base"), tree(room / "patched")
        with monkeypatch.context() as patch:
            failed = fail(patch, call, room)
            code = cli.main([*COMMANDS[command], "--quiet"])
        seen += failed
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err, err
        if failed:
            assert code == 2 and len(err.splitlines()) == 1 and os.strerror(errno.EIO) in err, (call, code, err)
            assert (tree(room / "base"), tree(room / "patched")) == before and not (room / "new").exists()
    assert seen, "no read of this command was made to fail"
