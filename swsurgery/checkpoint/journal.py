"""Edit files in a directory so that it holds the new bytes, or after any fault the old ones again.

A journal with the old and the new bytes is synced before the first write and removed after the last one is synced;
whoever opens a directory that has one puts the old bytes back first. Everything is done relative to one descriptor of
the directory, and into files that were opened once. Bytes that are neither old nor new are another program's: they are
reported and never overwritten. Knows splices and files; what the bytes mean, and whether they may be changed, is for
others to say.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from swsurgery.checkpoint.journal_format import MAX_JOURNAL, Journal, JournalFile, Place, parse_journal
from swsurgery.errors import CheckpointError, Interrupted, TargetError, report_done
from swsurgery.storage import filesystem
from swsurgery.storage.files import read_exactly
from swsurgery.storage.folder import Entry, Folder, Identity
from swsurgery.storage.names import JOURNAL, JOURNAL_NEW, OWN_FILES, ROOM, WORKING_FILES
from swsurgery.storage.splice import Splice, by_file
from swsurgery.storage.strict_json import read_small

_log = logging.getLogger(__name__)

ROOM_BYTES = 1 << 20
"""Space held for putting back; file systems that copy on write need some for every byte that is written. Plus two
blocks for each block that is written to."""

BLOCK = 4096


class OpenShard:
    """A shard that is open for reading and writing, and what it was when it was last known to be undisturbed."""

    def __init__(self, entry: Entry):
        """Open the entry. Raises TargetError if it cannot be written, CheckpointError if it is not what was listed."""
        self.entry = entry
        with filesystem.reported(entry):
            self.fd = filesystem.open_for_patching(entry)
        self.identity = entry.identity or Identity.of(os.fstat(self.fd))

    def close(self) -> None:
        os.close(self.fd)

    def settle(self) -> None:
        """Record the file's identity after this run's own writes."""
        self.identity = Identity.of(os.fstat(self.fd))

    def refuse_changed(self) -> None:
        """Raise CheckpointError if another program changed the file or gave its name to another file."""
        try:
            named = Identity.of(self.entry.stat())
        except OSError as error:
            raise _changed("was removed", self.entry) from error
        if (named.dev, named.ino) != (self.identity.dev, self.identity.ino):
            raise _changed("was replaced", self.entry)
        if Identity.of(os.fstat(self.fd)) != self.identity:
            raise _changed("was changed", self.entry)

    def refuse_unlike(self, place: Place, wanted: bytes) -> None:
        """Raise CheckpointError if the place does not hold these bytes."""
        if read_exactly(self.fd, len(wanted), place.offset, self.entry) != wanted:
            raise _changed(f"was changed at byte {place.offset}", self.entry)


def _changed(what: str, where: object) -> CheckpointError:
    what = f"{what} by another program while it was edited in place"
    return CheckpointError(what, where, "run again when nothing else writes there")


@contextlib.contextmanager
def edited(
    folder: Folder,
    shards: Mapping[str, OpenShard],
    splices: Sequence[Splice],
    *,
    reverts: bool = False,
    mode: int = 0o600,
) -> Iterator[dict[str, bytes | None]]:
    """Within the block the splices are made in the open `shards`; on an exception they are undone.

    What the block puts into the dict that it gets, name -> bytes or None, becomes of swsurgery's own files when the
    block ends well. They and the journal get the permissions `mode`, as far as the umask allows. The caller holds the
    directory's exclusive lock. Raises TargetError; CheckpointError if another program changes the directory meanwhile,
    whose bytes are left as they are.
    """
    own: dict[str, bytes | None] = {}
    journal = _journal(folder, shards, splices, reverts)
    raw = journal.render()
    parse_journal(raw, folder / JOURNAL)  # recovery must be able to read what is about to be written
    ending = False
    for shard in shards.values():
        shard.refuse_changed()
    try:
        with filesystem.reported(folder):
            filesystem.reserve(folder / ROOM, ROOM_BYTES + 2 * BLOCK * journal.blocks(BLOCK))
            filesystem.write_file(folder / JOURNAL_NEW, raw, mode)
            filesystem.rename_new(folder / JOURNAL_NEW, folder / JOURNAL)
            filesystem.sync_directory(folder)
            for name, file in journal.files.items():
                _write(shards[name], file.places)
        yield own
        with filesystem.reported(folder):
            made = {name: None if data is None else hashlib.sha256(data).hexdigest() for name, data in own.items()}
            journal = replace(journal, made=made)
            # From here on recovery takes the new contents of these files for what they are.
            filesystem.replace_file(folder / JOURNAL, journal.render(), folder / JOURNAL_NEW, mode)
            filesystem.sync_directory(folder)
            for name, data in own.items():
                if _own_state(folder, journal, name) == "foreign":
                    raise _changed("was changed", folder / name)
                _put(folder, name, data, mode)
            filesystem.sync_directory(folder)
            _refuse_disturbed(folder, shards, journal)
            filesystem.remove_file(folder / ROOM)
            ending = True
            filesystem.remove_file(folder / JOURNAL)
            report_done(_done(folder, reverts))
            filesystem.sync_directory(folder)
    except BaseException as error:
        if ending and not filesystem.is_there(folder / JOURNAL):
            _finish(folder, reverts, error)
        elif any(filesystem.is_there(folder / name) for name in WORKING_FILES):
            _take_back(folder, shards, journal, error)
        raise


def _done(folder: Folder, reverts: bool) -> str:
    return f"{'the base was put back' if reverts else 'the edit was made'}: {folder}"


def _finish(folder: Folder, reverts: bool, error: BaseException) -> None:
    """Report that the edit was made although its end was disturbed. Raises Interrupted, TargetError."""
    report_done(_done(folder, reverts))
    try:
        filesystem.sync_directory(folder)
    except OSError as failed:
        reason = os.strerror(failed.errno or 0)
        what = f"{_done(folder, reverts)}, but a power cut could still undo it ({reason})"
        raise TargetError(what, remedy="see to the disk, then run the same command again") from error
    if isinstance(error, Interrupted):
        raise error.leaving(_done(folder, reverts)) from None


def _take_back(folder: Folder, shards: Mapping[str, OpenShard], journal: Journal, error: BaseException) -> None:
    """Undo what this run did. Raises Interrupted, saying so, for a signal; TargetError if it cannot be undone."""
    begun = filesystem.is_there(folder / JOURNAL)
    files = [_Held(shards[name].fd, folder / name, file, writable=True) for name, file in journal.files.items()]
    left = [f"{file.path} at byte {place.offset}" for file in files for place in file.foreign()]
    left += [str(folder / name) for name in journal.own if _own_state(folder, journal, name) == "foreign"]
    try:
        _put_all_back(folder, journal, files)
    except TargetError as failed:
        if isinstance(error, Interrupted):
            raise error.leaving(str(failed)) from failed
        raise
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        _log.warning("left as another program wrote it: %s%s", left[0], more)
    if begun and isinstance(error, Interrupted):
        raise error.leaving("the old bytes were put back") from None


def recover(root: Path, *, moved: bool = False) -> Journal | None:
    """Put back what an edit that was cut off had changed, and remove what it left; returns its journal, if any.

    `moved` takes a journal that came with a copy of its directory. Raises TargetError (another run is editing, or it
    cannot be written), CheckpointError (the journal cannot be trusted, or does not fit the files).
    """
    if not any(filesystem.is_there(root / name) for name in WORKING_FILES):
        return None
    with filesystem.reported(root):
        folder = Folder.at(root)
    with folder, filesystem.locked(folder, exclusive=True):
        return recover_locked(folder, moved=moved)


def recover_locked(folder: Folder, *, moved: bool = False) -> Journal | None:
    """`recover`, for a caller that holds the directory's exclusive lock."""
    if not any(filesystem.is_there(folder / name) for name in WORKING_FILES):
        return None
    with filesystem.reported(folder), contextlib.ExitStack() as opened:
        journal = _read(folder)
        files = _files(folder, journal, moved, opened) if journal else []
        _refuse_foreign(folder, journal, files)
        _put_all_back(folder, journal, files)
    if journal:
        _log.warning("an edit in place had been cut off; the old bytes were put back: %s", folder)
    return journal


def _journal(folder: Folder, shards: Mapping[str, OpenShard], splices: Sequence[Splice], reverts: bool) -> Journal:
    files = {}
    for name, mine in sorted(by_file(splices).items()):
        identity = shards[name].identity
        files[name] = JournalFile(identity.ino, identity.size, _places(mine))
    own = {name: _read_own(folder, name) for name in OWN_FILES}
    return Journal(2, reverts, os.fstat(folder.fd).st_ino, files, own)


def _places(splices: list[Splice]) -> list[Place]:
    """Join splices that touch each other; they are in the order of their offsets."""
    places: list[list[Splice]] = []
    for splice in splices:
        if places and places[-1][-1].end == splice.offset:
            places[-1].append(splice)
        else:
            places.append([splice])
    return [Place(p[0].offset, b"".join(s.old for s in p), b"".join(s.new for s in p)) for p in places]


def _write(shard: OpenShard, places: list[Place]) -> None:
    # Where blocks are shared with a clone, writing needs new ones, and the disk may be full. Writing what is there
    # already finds that out, and takes them, while nothing has changed yet.
    for data in ("old", "new"):
        shard.refuse_changed()
        for place in places:
            shard.refuse_unlike(place, place.old)
            filesystem.write_at(shard.fd, getattr(place, data), place.offset)
        filesystem.sync(shard.fd)
        shard.settle()


def _refuse_disturbed(folder: Folder, shards: Mapping[str, OpenShard], journal: Journal) -> None:
    """Raise CheckpointError if the directory, a shard or an own file is no longer what this run left."""
    for name, file in journal.files.items():
        shards[name].refuse_changed()
        for place in file.places:
            shards[name].refuse_unlike(place, place.new or b"")
    for name in journal.made or ():
        if _own_state(folder, journal, name) == "foreign":
            raise _changed("was changed", folder / name)
    try:
        moved = not os.path.samestat(os.lstat(folder.path), os.fstat(folder.fd))
    except OSError:
        moved = True
    if moved:
        raise _changed("was moved or replaced", folder)


def _read_own(folder: Folder, name: str) -> bytes | None:
    """The bytes of one of swsurgery's own files, None if it is not there."""
    return read_small(folder / name, name, MAX_JOURNAL) if filesystem.is_there(folder / name) else None


def _own_state(folder: Folder, journal: Journal, name: str) -> str:
    """Say whether one of swsurgery's own files has its "old" contents, its "new" ones, or is "foreign"."""
    data = _read_own(folder, name)
    if data == journal.own[name]:
        return "old"
    if journal.version == 1:
        return "new"  # a journal of version 1 does not say what the new contents are
    digest = None if data is None else hashlib.sha256(data).hexdigest()
    return "new" if journal.made is not None and journal.made.get(name, "") == digest else "foreign"


def _put(folder: Folder, name: str, data: bytes | None, mode: int) -> None:
    if data is None:
        filesystem.remove_file(folder / name)
    else:
        with contextlib.suppress(FileNotFoundError):  # what was more private stays so
            mode &= (folder / name).stat().st_mode & 0o777 | 0o600
        filesystem.replace_file(folder / name, data, folder / f".{name}.new", mode)


def _read(folder: Folder) -> Journal | None:
    path = folder / JOURNAL
    return parse_journal(read_small(path, JOURNAL, MAX_JOURNAL), path) if filesystem.is_there(path) else None


@dataclass(frozen=True)
class _Held:
    """A file that a journal speaks of, open."""

    fd: int
    path: Entry
    file: JournalFile
    writable: bool = False

    def foreign(self) -> Iterator[Place]:
        """Yield the places with a byte that is neither the old nor the new one. A power cut may leave some bytes of a
        place old and others new."""
        for place in self.file.places:
            if not place.is_ours(read_exactly(self.fd, len(place.old), place.offset, self.path)):
                yield place

    def put_back(self) -> None:
        """Only what differs is written: where the fault was a full disk or a file that refuses, nothing may be left to
        write. A file that was written to is synced even if its bytes are right."""
        target = self.fd if self.writable else None
        filesystem.drop_cache(self.fd)  # after a failed fsync the cache may hold old bytes that never reached the disk
        try:
            for place in self.file.places:
                now = read_exactly(self.fd, len(place.old), place.offset, self.path)
                if now != place.old and place.is_ours(now):
                    target = self._reopened() if target is None else target
                    filesystem.write_at(target, place.old, place.offset)
            filesystem.sync(self.fd if target is None else target)
        finally:
            if target not in (None, self.fd):
                os.close(target)

    def _reopened(self) -> int:
        """Open the same file for writing."""
        fd = filesystem.open_for_patching(self.path)
        if not os.path.samestat(os.fstat(fd), os.fstat(self.fd)):
            os.close(fd)
            raise _changed("was replaced", self.path)
        return fd


def _files(folder: Folder, journal: Journal, moved: bool, opened: contextlib.ExitStack) -> list[_Held]:
    """The journal's files, opened for reading, if they are the ones that it speaks of."""
    files = []
    for name, file in journal.files.items():
        fd = (folder / name).open()
        opened.callback(os.close, fd)
        status = os.fstat(fd)
        if not moved and (status.st_ino, os.fstat(folder.fd).st_ino) != (file.inode, journal.inode):
            what = "an edit in place was cut off before this directory was copied here"
            raise CheckpointError(what, folder, f"to put the old bytes back, run: swsurgery revert {folder}")
        if status.st_size != file.size or any(p.offset + len(p.old) > file.size for p in file.places):
            raise CheckpointError("it is not the file that the journal speaks of", folder / name)
        files.append(_Held(fd, folder / name, file))
    return files


def _refuse_foreign(folder: Folder, journal: Journal | None, files: list[_Held]) -> None:
    """Raise CheckpointError if anything that recovery would write over is not this edit's work."""
    found: list[object] = []
    for file in files:
        filesystem.drop_cache(file.fd)
        found += [f"{file.path} at byte {place.offset}" for place in file.foreign()]
    if journal:
        found += [folder / name for name in journal.own if _own_state(folder, journal, name) == "foreign"]
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise CheckpointError(
            "an edit in place was cut off, and another program has written since to what it edited",
            f"{found[0]}{more}",
            f"restore the files from the base, or keep them as they are by removing {folder / JOURNAL}",
        )


def _put_all_back(folder: Folder, journal: Journal | None, files: list[_Held]) -> None:
    """Give the directory its old bytes, and remove the journal last. Raises TargetError, keeping the journal."""
    modes = (os.fstat(file.fd).st_mode for file in files)
    mode = functools.reduce(operator.and_, modes, 0o666) | 0o600
    try:
        with filesystem.reported(folder):
            filesystem.remove_file(folder / ROOM)  # first of all: it is the space that putting back may need
            for file in files:
                file.put_back()
            for name in WORKING_FILES[1:]:
                filesystem.remove_file(folder / name)
            if journal is not None:
                for name, data in journal.own.items():
                    if _own_state(folder, journal, name) == "new":
                        _put(folder, name, data, mode)
            filesystem.sync_directory(folder)
            filesystem.remove_file(folder / JOURNAL)
            filesystem.sync_directory(folder)
    except TargetError as error:
        remedy = f"{error}; its journal is kept, and the next command tries again"
        raise TargetError("an edit in place was cut off and could not be undone yet", folder, remedy) from error
