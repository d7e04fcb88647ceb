"""Editing files where they lie: new bytes, or after any fault the old ones again.

A journal with the old bytes is synced before the first write and removed after the last one is synced; whoever opens
a directory that has one puts the old bytes back first. So at any instant the directory is one of the two. Knows
splices and files; what the bytes mean, and whether they may be changed, is for others to say.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from swsurgery import fsops
from swsurgery.edits import Position, Strict
from swsurgery.errors import CheckpointError, Interrupted, TargetError
from swsurgery.jsonfile import parse_json, read_small
from swsurgery.names import JOURNAL, JOURNAL_NEW, OWN_FILES, ROOM, SHARD_NAME, WORKING_FILES
from swsurgery.shard import read_exactly
from swsurgery.splice import Splice

_log = logging.getLogger(__name__)

ROOM_BYTES = 1 << 20
"""Space held for putting back; file systems that copy on write need some for every byte that is written. Plus two
blocks for each splice."""

Hex = Annotated[str, Field(pattern=r"^([0-9a-f]{2}){1,8}$")]


class _Place(Strict):
    offset: Position
    old: Hex


class _File(Strict):
    """One file as it is before the edit."""

    inode: Position
    size: Position
    places: list[_Place]


class Journal(Strict):
    """What it takes to put a directory back. `own` holds swsurgery's own files in base64, None where one was not
    there. `inode` is the directory's: a journal that came along with a copy of it speaks of other files."""

    version: Literal[1]
    inode: Position
    files: dict[Annotated[str, Field(pattern=f"^{SHARD_NAME.pattern}$")], _File]
    own: dict[Literal[OWN_FILES], str | None]

    def render(self) -> bytes:
        body = json.dumps(self.model_dump(), sort_keys=True).encode() + b"\n"
        return body + hashlib.sha256(body).hexdigest().encode() + b"\n"


@contextlib.contextmanager
def edited(root: Path, splices: Sequence[Splice]) -> Iterator[dict[str, bytes | None]]:
    """Within the block the splices are made; on an exception they are undone.

    What the block puts into the dict that it gets, name -> bytes or None, becomes of swsurgery's own files when the
    block ends well. The caller holds the directory's exclusive lock. Raises TargetError.
    """
    own: dict[str, bytes | None] = {}
    try:
        with fsops.reported(root):
            fsops.reserve(root / ROOM, ROOM_BYTES + 8192 * len(splices))
            fsops.write_file(root / JOURNAL_NEW, _journal(root, splices).render())
            fsops.rename_new(root / JOURNAL_NEW, root / JOURNAL)
            fsops.sync_directory(root)
            for name in sorted({s.file for s in splices}):
                _write(root / name, [s for s in splices if s.file == name])
        yield own
        with fsops.reported(root):
            for name, data in own.items():
                _put(root, name, data)
            fsops.sync_directory(root)
            fsops.remove_file(root / ROOM)
            fsops.remove_file(root / JOURNAL)
            fsops.sync_directory(root)
    except BaseException as error:
        recover_locked(root)
        if isinstance(error, Interrupted):
            raise error.leaving("the old bytes were put back") from None
        raise


def recover(root: Path, *, moved: bool = False) -> bool:
    """Put back what an edit that was cut off had changed, and remove what it left; True where there was a journal.

    `moved` takes a journal that came with a copy of its directory. Raises TargetError (another run is editing, or it
    cannot be written), CheckpointError (the journal cannot be trusted).
    """
    if not any(os.path.lexists(root / name) for name in WORKING_FILES):
        return False
    with fsops.locked(root, exclusive=True):
        recovered = recover_locked(root, moved=moved)
    if recovered:
        _log.warning("an edit in place had been cut off; the old bytes were put back: %s", root)
    return recovered


def recover_locked(root: Path, *, moved: bool = False) -> bool:
    """`recover`, for a caller that holds the directory's exclusive lock."""
    try:
        with fsops.reported(root):
            journal = _read(root)
            fsops.remove_file(root / ROOM)  # first of all: it is the space that putting back may need
            if journal:
                _undo(root, journal, moved)
            for name in WORKING_FILES[1:]:
                fsops.remove_file(root / name)
            fsops.sync_directory(root)
            fsops.remove_file(root / JOURNAL)
            fsops.sync_directory(root)
    except TargetError as error:
        raise TargetError("an edit in place was cut off and could not be undone yet", root,
                          f"{error}; its journal is kept, and the next command tries again") from error  # fmt: skip
    return journal is not None


def _journal(root: Path, splices: Sequence[Splice]) -> Journal:
    files = {}
    for name in sorted({s.file for s in splices}):
        status = os.stat(root / name)
        places = [_Place(offset=s.offset, old=s.old.hex()) for s in splices if s.file == name]
        files[name] = _File(inode=status.st_ino, size=status.st_size, places=places)
    own = {}
    for name in OWN_FILES:
        there = os.path.lexists(root / name)
        own[name] = base64.b64encode(read_small(root / name, name)).decode() if there else None
    return Journal(version=1, inode=os.stat(root).st_ino, files=files, own=own)


def _write(path: Path, splices: Sequence[Splice]) -> None:
    fd = fsops.open_for_patching(path)
    try:
        # Where blocks are shared with a clone, writing needs new ones, and the disk may be full. Writing what is there
        # already finds that out, and takes them, while nothing has changed yet.
        for data in ("old", "new"):
            for splice in splices:
                fsops.write_at(fd, getattr(splice, data), splice.offset)
            fsops.sync(fd)
    finally:
        os.close(fd)


def _put(root: Path, name: str, data: bytes | None) -> None:
    if data is None:
        fsops.remove_file(root / name)
    else:
        fsops.replace_file(root / name, data, root / f".{name}.new")


def _read(root: Path) -> Journal | None:
    if not os.path.lexists(root / JOURNAL):
        return None
    raw = read_small(root / JOURNAL, JOURNAL)
    body, digest = raw[:-65], raw[-65:]
    if digest != hashlib.sha256(body).hexdigest().encode() + b"\n":
        raise CheckpointError("the journal of an edit in place is damaged", root / JOURNAL,
                              "restore the directory, or hold it against the base with swsurgery diff")  # fmt: skip
    try:
        return Journal.model_validate(parse_json(body, JOURNAL))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"is not a sound journal: {place}: {first['msg']}", root / JOURNAL) from None


def _undo(root: Path, journal: Journal, moved: bool) -> None:
    """Only what differs is written: where the fault was a full disk, nothing may be left to write."""
    with contextlib.ExitStack() as opened:
        files = []
        for name, file in journal.files.items():
            fd = fsops.open_for_patching(root / name)
            opened.callback(os.close, fd)
            status = os.fstat(fd)
            ours = (status.st_ino, os.stat(root).st_ino) == (file.inode, journal.inode)
            if not ours and not moved:
                raise CheckpointError("an edit in place was cut off before this directory was copied here", root,
                                      f"to put the old bytes back, run: swsurgery revert {root}")  # fmt: skip
            if status.st_size != file.size or any(p.offset + len(p.old) // 2 > file.size for p in file.places):
                raise CheckpointError("it is not the file that the journal speaks of", root / name)
            files.append((fd, root / name, file))
        try:
            own = {n: None if data is None else base64.b64decode(data, validate=True)
                   for n, data in journal.own.items()}  # fmt: skip
        except binascii.Error:
            raise CheckpointError("is not a sound journal: own: not base64", root / JOURNAL) from None
        for fd, path, file in files:
            for place in file.places:
                old = bytes.fromhex(place.old)
                if read_exactly(fd, len(old), place.offset, path) != old:
                    fsops.write_at(fd, old, place.offset)
            fsops.sync(fd)
    for name in OWN_FILES:
        fsops.remove_file(root / f".{name}.new")
    for name, data in own.items():
        there = os.path.lexists(root / name)
        if data is None or not there or read_small(root / name, name) != data:
            _put(root, name, data)
