"""Editing files where they lie: new bytes, or after any fault the old ones again.

A journal with the old bytes is synced before the first write and removed after the last one is synced; whoever opens
a directory that has one puts the old bytes back first. So at any instant the directory is one of the two. Knows
splices and files; what the bytes mean, and whether they may be changed, is for others to say.
"""

from __future__ import annotations

import base64
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
from swsurgery.edits import Position, Strict, Version
from swsurgery.errors import CheckpointError, Interrupted, TargetError
from swsurgery.jsonfile import MAX_JSON, parse_json, read_small
from swsurgery.names import JOURNAL, JOURNAL_NEW, OWN_FILES, ROOM, SHARD_NAME, WORKING_FILES
from swsurgery.shard import open_regular, read_exactly
from swsurgery.splice import Splice

_log = logging.getLogger(__name__)

ROOM_BYTES = 1 << 20
"""Space held for putting back; file systems that copy on write need some for every byte that is written. Plus two
blocks for each splice."""

Hex = Annotated[str, Field(pattern=r"^([0-9a-f]{2}){1,8}$")]


class _Place(Strict):
    offset: Position
    old: Hex


Inode = Annotated[int, Field(ge=0, lt=1 << 64)]


class _File(Strict):
    """One file as it is before the edit."""

    inode: Inode
    size: Position
    places: list[_Place]


class Journal(Strict):
    """What it takes to put a directory back. `own` holds swsurgery's own files in base64, None where one was not
    there. `inode` is the directory's: a journal that came along with a copy of it speaks of other files. `reverts` says
    that what was cut off was itself an undoing."""

    version: Version
    reverts: bool
    inode: Inode
    files: dict[Annotated[str, Field(pattern=f"^{SHARD_NAME.pattern}$")], _File]
    own: dict[
        Literal[OWN_FILES], Annotated[str, Field(pattern=r"^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2,3}={1,2})?$")] | None
    ]

    def render(self) -> bytes:
        body = json.dumps(self.model_dump(), sort_keys=True).encode() + b"\n"
        return body + hashlib.sha256(body).hexdigest().encode() + b"\n"

    def contents(self) -> dict[str, bytes | None]:
        """The bytes of swsurgery's own files."""
        return {n: None if data is None else base64.b64decode(data, validate=True) for n, data in self.own.items()}


@contextlib.contextmanager
def edited(root: Path, splices: Sequence[Splice], *, reverts: bool = False) -> Iterator[dict[str, bytes | None]]:
    """Within the block the splices are made; on an exception they are undone.

    What the block puts into the dict that it gets, name -> bytes or None, becomes of swsurgery's own files when the
    block ends well. The caller holds the directory's exclusive lock. Raises TargetError.
    """
    own: dict[str, bytes | None] = {}
    raw = _journal(root, splices, reverts).render()
    _parsed(raw, root / JOURNAL)  # what could not be read again must not be relied on
    with contextlib.ExitStack() as opened:
        targets = {}
        for name in sorted({s.file for s in splices}):  # a file that refuses does so before there is anything to undo
            with fsops.reported(root / name):
                targets[name] = fsops.open_for_patching(root / name)
            opened.callback(os.close, targets[name])
        try:
            with fsops.reported(root):
                fsops.reserve(root / ROOM, ROOM_BYTES + 8192 * len(splices))
                fsops.write_file(root / JOURNAL_NEW, raw)
                fsops.rename_new(root / JOURNAL_NEW, root / JOURNAL)
                fsops.sync_directory(root)
                for name, fd in targets.items():
                    _write(fd, [s for s in splices if s.file == name])
            yield own
            with fsops.reported(root):
                for name, data in own.items():
                    _put(root, name, data)
                fsops.sync_directory(root)
                fsops.remove_file(root / ROOM)
                fsops.remove_file(root / JOURNAL)
                fsops.sync_directory(root)
        except BaseException as error:
            begun = any(fsops.is_there(root / name) for name in WORKING_FILES)
            undone = begun and recover_locked(root)
            if undone and isinstance(error, Interrupted):
                raise error.leaving("the old bytes were put back") from None
            raise


def recover(root: Path, *, moved: bool = False) -> Journal | None:
    """Put back what an edit that was cut off had changed, and remove what it left; returns its journal, if any.

    `moved` takes a journal that came with a copy of its directory. Raises TargetError (another run is editing, or it
    cannot be written), CheckpointError (the journal cannot be trusted).
    """
    if not any(fsops.is_there(root / name) for name in WORKING_FILES):
        return None
    with fsops.locked(root, exclusive=True):
        recovered = recover_locked(root, moved=moved)
    if recovered:
        _log.warning("an edit in place had been cut off; the old bytes were put back: %s", root)
    return recovered


def recover_locked(root: Path, *, moved: bool = False) -> Journal | None:
    """`recover`, for a caller that holds the directory's exclusive lock."""
    try:
        with fsops.reported(root), contextlib.ExitStack() as opened:
            journal = _read(root)
            files = _files(root, journal, moved, opened) if journal else []
            fsops.remove_file(root / ROOM)  # first of all: it is the space that putting back may need
            for fd, path, file in files:
                _put_back(fd, path, file)
            for name in WORKING_FILES[1:]:
                fsops.remove_file(root / name)
            for name, data in journal.contents().items() if journal else ():
                there = fsops.is_there(root / name)
                if data is None or not there or read_small(root / name, name) != data:
                    _put(root, name, data)
            fsops.sync_directory(root)
            fsops.remove_file(root / JOURNAL)
            fsops.sync_directory(root)
    except TargetError as error:
        raise TargetError("an edit in place was cut off and could not be undone yet", root,
                          f"{error}; its journal is kept, and the next command tries again") from error  # fmt: skip
    return journal


def _journal(root: Path, splices: Sequence[Splice], reverts: bool) -> Journal:
    files = {}
    for name in sorted({s.file for s in splices}):
        status = os.stat(root / name)
        places = [_Place(offset=s.offset, old=s.old.hex()) for s in splices if s.file == name]
        files[name] = _File(inode=status.st_ino, size=status.st_size, places=places)
    own = {}
    for name in OWN_FILES:
        there = fsops.is_there(root / name)
        own[name] = base64.b64encode(read_small(root / name, name)).decode() if there else None
    return Journal(version=1, reverts=reverts, inode=os.stat(root).st_ino, files=files, own=own)


def _write(fd: int, splices: Sequence[Splice]) -> None:
    # Where blocks are shared with a clone, writing needs new ones, and the disk may be full. Writing what is there
    # already finds that out, and takes them, while nothing has changed yet.
    for data in ("old", "new"):
        for splice in splices:
            fsops.write_at(fd, getattr(splice, data), splice.offset)
        fsops.sync(fd)


def _put(root: Path, name: str, data: bytes | None) -> None:
    if data is None:
        fsops.remove_file(root / name)
    else:
        fsops.replace_file(root / name, data, root / f".{name}.new")


def _read(root: Path) -> Journal | None:
    path = root / JOURNAL
    return _parsed(read_small(path, JOURNAL), path) if fsops.is_there(path) else None


def _parsed(raw: bytes, path: Path) -> Journal:
    body, digest = raw[:-65], raw[-65:]
    if len(raw) > MAX_JSON:
        raise CheckpointError(f"the journal would have more than the {MAX_JSON} bytes accepted", path, "use apply -o")
    if digest != hashlib.sha256(body).hexdigest().encode() + b"\n":
        raise CheckpointError("the journal of an edit in place is damaged", path,
                              "restore the directory, or hold it against the base with swsurgery diff")  # fmt: skip
    try:
        return Journal.model_validate(parse_json(body, JOURNAL))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"is not a sound journal: {place}: {first['msg']}", path) from None


def _files(root: Path, journal: Journal, moved: bool, opened: contextlib.ExitStack) -> list[tuple[int, Path, _File]]:
    """The journal's files, opened for reading, if they are the ones that it speaks of."""
    files = []
    for name, file in journal.files.items():
        fd = open_regular(root / name)
        opened.callback(os.close, fd)
        status = os.fstat(fd)
        if not moved and (status.st_ino, os.stat(root).st_ino) != (file.inode, journal.inode):
            raise CheckpointError("an edit in place was cut off before this directory was copied here", root,
                                  f"to put the old bytes back, run: swsurgery revert {root}")  # fmt: skip
        if status.st_size != file.size or any(p.offset + len(p.old) // 2 > file.size for p in file.places):
            raise CheckpointError("it is not the file that the journal speaks of", root / name)
        files.append((fd, root / name, file))
    return files


def _put_back(fd: int, path: Path, file: _File) -> None:
    """Only what differs is written: where the fault was a full disk or a file that refuses, nothing may be left to
    write. A file that was written to is synced even if its bytes are right."""
    target = None
    fsops.drop_cache(fd)  # after a failed fsync the cache may hold old bytes, clean, that never reached the disk
    try:
        for place in file.places:
            old = bytes.fromhex(place.old)
            if read_exactly(fd, len(old), place.offset, path) != old:
                target = fsops.open_for_patching(path) if target is None else target
                fsops.write_at(target, old, place.offset)
        fsops.sync(fd if target is None else target)
    finally:
        if target is not None:
            os.close(target)
