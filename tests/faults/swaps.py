"""Another program changes a checkpoint at a chosen moment of an edit in place: what is wrong with the result.

Each scenario makes a checkpoint, runs the command with one of its functions replaced by one that lets the other program
act first, and returns the promises that did not hold. Nothing is left to chance.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from checkpoints import FIRST, HEAD, SECOND, THIRD, down, place, sha256, tree, write_llama, write_manifest

from swsurgery.cli import main
from swsurgery.storage.names import OWN_FILES, WORKING_FILES

EDITED = ((SECOND, down(1), (2, 3)), (SECOND, down(1), (5, 9)), (THIRD, HEAD, (11, 5)))
SHARDS = (FIRST, SECOND, THIRD)

MOMENTS = {
    "after planning": "editing.in_place._open_shards",
    "after hashing": "editing.in_place._describe_untouched",
    "before the first write": "checkpoint.journal._write",
    "during the check": "editing.in_place.run_check",
    "before the end": "checkpoint.journal._refuse_disturbed",
}
"""Moment -> the function of the package that is called then."""


@dataclass
class Room:
    """A checkpoint and a manifest for it; `acted` once the other program had its turn."""

    folder: Path
    revert: bool = False
    acted: bool = False

    def __post_init__(self) -> None:
        self.base = write_llama(self.folder / "base")
        record = {"path": str(self.base), "sha256": {name: sha256(self.base / name) for name in (SECOND, THIRD)}}
        edits = [{"op": "zero", "tensor": tensor, "index": list(index)} for _, tensor, index in EDITED]
        self.manifest = write_manifest(self.folder / "m.json", record, *edits)
        self.apply = ("apply", str(self.manifest), "--in-place", "--check", "off", "--quiet")
        if self.revert:
            assert self.run(*self.apply)[0] == 0
        self.before = tree(self.base)

    def after(self, act: Callable[[Room], None]) -> dict[str, bytes]:
        """What the directory is if only the other program does something."""
        twin = Room(self.folder / "twin", self.revert)
        act(twin)
        return tree(twin.base) if not self.revert else {
            name: self.before[name] if name in OWN_FILES and data == twin.before.get(name) else data
            for name, data in tree(twin.base).items()
        }  # fmt: skip

    def command(self) -> tuple[int, list[str]]:
        return self.run(*(("revert", str(self.base), "--quiet") if self.revert else self.apply))

    def run(self, *words: str) -> tuple[int, list[str]]:
        """Run a command: (exit code, lines on stderr)."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(list(words))
        return code, err.getvalue().splitlines()


@contextlib.contextmanager
def acting(room: Room, function: str, act: Callable[[Room], None], number: int = 1) -> Iterator[None]:
    """Within the block, `act` happens just before the `number`-th call of a function of the package."""
    module, _, name = function.rpartition(".")
    owner = importlib.import_module(f"swsurgery.{module}")
    true, calls = getattr(owner, name), []

    def first(*arguments: object, **more: object) -> object:
        calls.append(name)
        if len(calls) == number:
            act(room)
            room.acted = True
        return true(*arguments, **more)

    with mock.patch.object(owner, name, first):
        yield


def replace_shard(room: Room) -> None:
    """Another file gets the name of an edited shard, as a download that finishes does."""
    data = bytearray(room.before[SECOND])
    data[-1] ^= 1
    (room.base / "new").write_bytes(data)
    os.replace(room.base / "new", room.base / SECOND)


def move_shard(room: Room) -> None:
    """The shard is moved away, and a copy of what it was put in its place."""
    os.rename(room.base / SECOND, room.folder / "kept")
    (room.base / SECOND).write_bytes(room.before[SECOND])


def change_edited_scalar(room: Room) -> None:
    write(room, SECOND, down(1), (5, 9), b"\x11\x22")


def change_other_scalar(room: Room) -> None:
    write(room, SECOND, down(1), (0, 0), b"\x11\x22")


def change_untimely(room: Room) -> None:
    """The file's times are put back, as far as anybody can."""
    status = os.stat(room.base / SECOND)
    change_edited_scalar(room)
    os.utime(room.base / SECOND, ns=(status.st_atime_ns, status.st_mtime_ns))


def link_shard(room: Room) -> None:
    """From now on an edit of the shard would show under another name."""
    os.link(room.base / SECOND, room.folder / "peer")


def remove_shard(room: Room) -> None:
    os.unlink(room.base / SECOND)


def swap_folder(room: Room) -> None:
    """The directory becomes a link to somebody's files of the same names."""
    (room.folder / "theirs").mkdir()
    for name in (*SHARDS, *OWN_FILES):
        (room.folder / "theirs" / name).write_bytes(b"theirs")
    os.rename(room.base, room.folder / "moved")
    room.base.symlink_to(room.folder / "theirs")


def write_own_file(room: Room) -> None:
    (room.base / OWN_FILES[1]).write_bytes(b"another program's")


ACTS = (
    replace_shard, move_shard, change_edited_scalar, change_other_scalar, change_untimely, link_shard, remove_shard,
    write_own_file,
)  # fmt: skip


def refused(room: Room, moment: str, act: Callable[[Room], None], number: int = 1) -> list[str]:
    """Run the command with the other program acting: it must refuse, and leave what the other program left."""
    with acting(room, MOMENTS.get(moment, moment), act, number):
        code, lines = room.command()
    faults = [] if room.acted else ["the other program had no turn"]
    if code != 2 or not lines or any("Traceback" in line for line in lines):
        faults.append(f"it ended with {code}: {lines}")
    state, wanted = tree(room.base), room.after(act)
    if left := set(state) & set(WORKING_FILES):
        faults.append(f"it leaves {sorted(left)}")
    faults += [f"{n} is not what the other program left" for n in {*state, *wanted} if state.get(n) != wanted.get(n)]
    moved = room.folder / "kept"
    if moved.exists() and moved.read_bytes() != room.before[SECOND]:
        faults.append("the file that was moved away is not as it was")
    if state != room.before and room.run("verify", str(room.base))[0] == 0:
        faults.append("verify passes")
    return faults


def in_link(room: Room, moment: str) -> list[str]:
    """The directory becomes a link: nothing is written behind it, and the directory that was meant is as it was."""
    with acting(room, MOMENTS.get(moment, moment), swap_folder):
        code, lines = room.command()
    faults = [] if room.acted else ["the other program had no turn"]
    if code != 2:
        faults.append(f"it ended with {code}: {lines}")
    theirs = tree(room.folder / "theirs")
    faults += [f"it wrote into {name} of another directory" for name, data in theirs.items() if data != b"theirs"]
    faults += ["the directory is not as it was"] if tree(room.folder / "moved") != room.before else []
    return faults


FINDING: dict[str, Callable[[Room], list[str]]] = {
    "a shard is not compared with what it was": lambda room: refused(room, "during the check", replace_shard),
    "old bytes are not read before they are overwritten": lambda room: refused(
        room, "storage.filesystem.write_at", change_edited_scalar
    ),
    "files are opened by their paths": lambda room: in_link(room, "before the first write"),
}
"""Planted bug -> the race that finds it, which returns the promises that did not hold."""


def write(room: Room, file: str, tensor: str, index: tuple[int, ...], data: bytes) -> None:
    at, _ = place(room.base / file, tensor, index)
    with open(room.base / file, "r+b") as shard:
        shard.seek(at)
        shard.write(data)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"XDG_CACHE_HOME": f"{folder}/cache"}):
        print(json.dumps(FINDING[sys.argv[1]](Room(Path(folder)))))
